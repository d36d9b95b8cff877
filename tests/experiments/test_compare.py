"""Tables over files: rows that stay, trials that are run once, pages that say what is there."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
import tomli_w

from protomem_kernels.data.images import DatasetError
from protomem_kernels.experiments import compare as comparing
from protomem_kernels.experiments.compare import CompareObserver, alone_in, compare, plan
from protomem_kernels.experiments.report import figure, markdown
from protomem_kernels.experiments.results import Results, Row, read_rows, write_rows
from protomem_kernels.experiments.table import read_table, table_from
from protomem_kernels.experiments.work import run_all
from protomem_kernels.training.errors import RunError
from tests.experiments.conftest import SMALL

TABLE = {
    "title": "Heads",
    "question": "Which one?",
    "seeds": [0, 1],
    "shared": SMALL,
    "quick": {"steps": 2},
    "methods": {"memory": {"share": 0.5}, "full": {"head": "full"}},
}


def table(**other):
    return table_from(TABLE | other, "heads")


def row(method, seed, of=None, **figures):
    digest = (of or table()).methods[method].trial.digest()
    return Row(method, seed, digest, "c0ffee", {"accuracy": 0.5, "tar_at_far_1e-3": 0.25, **figures})


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [row("memory", 0, rank1=0.75), row("full", 0, cosine_at_age_4=-0.5)]
    write_rows(tmp_path / "rows.csv", rows)
    assert read_rows(tmp_path / "rows.csv") == rows


def test_what_was_run_is_not_missing_and_what_has_changed_is(tmp_path):
    path = tmp_path / "heads.csv"
    results = Results(path, table())
    assert [(method.name, seed) for method, seed in results.missing()] == [
        ("memory", 0),
        ("full", 0),
        ("memory", 1),
        ("full", 1),
    ]
    results.add(row("full", 1))
    results.add(row("memory", 0))
    again = Results(path, table())
    assert [(method.name, seed) for method, seed in again.missing()] == [("full", 0), ("memory", 1)]
    assert again.dropped == 0
    other = Results(path, table(methods={"memory": {"share": 0.25}, "full": {"head": "full"}}))
    assert [(method.name, seed) for method, seed in other.missing()] == [("memory", 0), ("full", 0), ("memory", 1)]
    assert other.dropped == 1
    other.add(row("full", 0))
    assert [(found.method, found.seed) for found in read_rows(path)] == [("full", 0), ("full", 1)]
    assert len(read_rows(tmp_path / "heads.before-1.csv")) == 2, "nothing is lost"
    back = Results(path, table())
    assert back.borrow(back.table.methods["memory"], 0)


@pytest.mark.parametrize(
    "text",
    ["", "a,b\n1,2\n", "method,seed,settings,commit,accuracy\nfull,zero,a,b,0.5\n", "method,seed,settings,commit\nx\n"],
)
def test_a_file_that_holds_no_results_is_told_and_left_alone(tmp_path, text):
    path = tmp_path / "heads.csv"
    path.write_text(text)
    with pytest.raises(RunError, match=r"heads\.csv (must begin with the columns|holds no results)"):
        Results(path, table())
    assert path.read_text() == text


def test_a_trial_of_another_table_is_borrowed(tmp_path):
    write_rows(tmp_path / "other.csv", [row("memory", 0)._replace(method="half")])
    (tmp_path / "foreign.csv").write_text("name,age\nann,7\n")
    (tmp_path / "picture.csv").write_bytes(bytes(range(256)))
    results = Results(tmp_path / "heads.csv", table())
    memory, full = results.table.methods.values()
    assert results.borrow(memory, 0)
    assert not results.borrow(memory, 1)
    assert not results.borrow(full, 0)
    assert read_rows(tmp_path / "heads.csv") == [row("memory", 0)]
    ages = Results(tmp_path / "ages.csv", table(ages=True))
    assert not ages.borrow(memory, 0), "its ages were not looked at"


def test_mean_and_deviation_over_seeds():
    rows = [row("memory", 0, accuracy=0.5), row("memory", 1, accuracy=0.7), row("full", 0)]
    assert figure(rows, "memory", "accuracy") == pytest.approx((0.6, 0.02**0.5, 2))
    assert figure(rows, "full", "accuracy") == (0.5, 0.0, 1)
    assert figure(rows, "full", "rank1") is None


def test_the_page_tells_figures_settings_and_the_command():
    costs = {"ms_per_step": 12.34, "head_mib": 0.5, "peak_mib": 321.0, "impostor_pairs": 4500.0}
    rows = [row("memory", 0, accuracy=0.5, **costs), row("memory", 1, accuracy=0.7, **costs)]
    page = markdown(table(claim="One is better."), rows, "protomem compare heads", ["heads.png"])
    assert "# Heads\n\n**Claim.** One is better.\n\nWhich one?\n\n![Heads](heads.png)\n" in page
    assert "| memory | 60.00 ± 14.14 | 25.00 ± 0.00 | 12.3 | 0.5 | 321 | 2 |" in page
    assert "on 10 identities of orl that nothing was trained on (4,500 impostor pairs)" in page
    assert "Again: `protomem compare heads` (measured at c0ffee)" in page
    assert "| share | by method: 0.5, 1 |" in page
    assert "| steps | 8 |" in page
    assert "full |" not in page.split("| setting")[0], "it has no rows yet"


def test_an_unknown_method_names_the_known_ones(tmp_path):
    with pytest.raises(RunError, match="there is no method 'half'; there are 'memory', 'full'"):
        plan([table()], tmp_path, ["half"])


def test_a_comparison_runs_what_is_missing_and_writes_its_page(tmp_path):
    small = table_from({**TABLE, "ages": True}, "heads", quick=True)
    first = compare(plan([small], tmp_path, ["memory"]), command="again")
    before = read_rows(tmp_path / "heads.csv")
    assert [(found.method, found.seed) for found in before] == [("memory", 0)]
    pages = compare(plan([small], tmp_path), command="again", jobs=2)
    assert pages == first == [tmp_path / "heads.md"]
    rows = read_rows(tmp_path / "heads.csv")
    assert [(found.method, found.seed) for found in rows] == [("memory", 0), ("full", 0)]
    assert rows[0] == before[0], "nothing is run twice"
    assert {path.name for path in tmp_path.iterdir()} == {"heads.csv", "heads.md", "heads.png", "heads_ages.png"}
    assert all(path.stat().st_size > 5000 for path in tmp_path.glob("*.png"))


def test_a_table_whose_images_are_not_there_keeps_no_other_from_being_made(tmp_path):
    fonts = {"data": "hangul", "fonts": str(tmp_path / "nowhere")}
    first = table_from(TABLE | {"shared": SMALL | fonts}, "first", quick=True)
    second = table_from(TABLE | {"methods": {"memory": {}}}, "second", quick=True)
    notes = []
    watch = CompareObserver()
    watch.note = notes.append
    with pytest.raises(DatasetError, match="nowhere: expected font files"):
        compare(plan([first, second], tmp_path), command="again", watch=watch)
    assert (tmp_path / "second.md").exists()
    assert not (tmp_path / "first.md").exists()
    assert notes[0].startswith("first is left out: ")


def test_the_commit_is_that_of_the_sources_and_of_nothing_around_them(tmp_path, monkeypatch):
    def git(*words):
        options = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *options, "-C", tmp_path, *words], capture_output=True, text=True, check=True)

    git("init")
    (tmp_path / "theirs.py").touch()
    git("add", "theirs.py")
    git("commit", "-m", "theirs")
    installed = tmp_path / "package" / "experiments" / "compare.py"
    installed.parent.mkdir(parents=True)
    installed.touch()
    monkeypatch.setattr(comparing, "__file__", str(installed))
    assert comparing.commit() == ""
    git("add", ".")
    git("commit", "-m", "ours")
    (tmp_path / "theirs.py").write_text("a page that was made again")
    assert comparing.commit() == git("rev-parse", "--short", "HEAD").stdout.strip()
    installed.write_text("changed")
    assert comparing.commit().endswith("-dirty")
    monkeypatch.setattr(comparing, "__file__", str(tmp_path.parent / "nowhere" / "compare.py"))
    assert comparing.commit() == ""


def test_one_comparison_at_a_time_writes_into_a_folder(tmp_path):
    told = f"{tmp_path / 'new'} is in use by .*; wait until it is done or stop it, or name another folder with --out"
    with alone_in(tmp_path / "new"), pytest.raises(RunError, match=told), alone_in(tmp_path / "new"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot write to"), alone_in(tmp_path / "file"):
        pass


def test_a_table_in_small_has_files_of_its_own(tmp_path):
    path = tmp_path / "heads.toml"
    path.write_text(tomli_w.dumps(TABLE))
    assert (read_table(str(path)).name, read_table(str(path), quick=True).name) == ("heads", "heads-quick")


def test_what_keeps_a_trial_from_running_is_told_with_its_name(tmp_path):
    wrong = table(methods={"memory": {"identities": 38}})
    with pytest.raises(RunError, match="memory, seed 0: orl has 40 identities of two images or more; 38 to train"):
        list(run_all(wrong.trials[:1], jobs=1))
    nowhere = table(methods={"memory": {"data": str(tmp_path / "nowhere")}})
    with pytest.raises(DatasetError, match=r"memory, seed 0: .*nowhere"):
        list(run_all(nowhere.trials[:1], jobs=1))


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_the_command_stops_at_a_signal_and_goes_on(tmp_path):
    file, rows_file = tmp_path / "heads.toml", tmp_path / "out" / "heads.csv"
    slow = {"full": {"head": "full", "steps": 100_000}}
    file.write_text(tomli_w.dumps(TABLE | {"seeds": [0], "methods": TABLE["methods"] | slow}))
    command = [sys.executable, "-m", "protomem_kernels", "compare", str(file), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not rows_file.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)  # SIGINT is ignored by what a shell has started in the background
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, told
    assert told.splitlines()[-1].startswith("stopped by SIGTERM; go on with: protomem compare ")
    rows = read_rows(rows_file)
    assert [found.method for found in rows] == ["memory"]
    file.write_text(tomli_w.dumps(TABLE | {"seeds": [0]}))
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "heads: Heads; 1 trials are there, 1 to run" in done.stdout
    assert read_rows(rows_file)[0] == rows[0]
