"""``python -m benchmarks``: its verdicts, files, plots and errors; the suite itself runs at tiny sizes."""

from __future__ import annotations

import csv
import doctest
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import protomem_kernels.cli as cli
from benchmarks import __main__ as main
from benchmarks import command, results
from benchmarks.results import verdict

MACHINE = ("date", "cpu", "flags", "cores", "threads", "torch", "capability", "backends")
SIZE = {"B": 16, "M": 300, "D": 8}
RATIO = {"unit": "G", "ratio": 2.0, "ratio_min": 1.9, "ratio_max": 2.2, "unit_seconds": 0.1}
LOSS = {**SIZE, **RATIO, "operator": "margin_softmax_loss", "regime": "fresh"}
STEP = {**SIZE, **RATIO, "operator": "training step", "regime": "fresh", "peer": "eager"}
ROWS: list[dict[str, Any]] = [
    {**LOSS, "what": "forward", "peer": "eager"},
    {**LOSS, "what": "embeddings' gradient", "peer": "eager", "peak_extra_bytes": 3 << 20},
    {**LOSS, "what": "embeddings' gradient", "peer": "protomem-cpu", "peak_extra_bytes": 0},
    {**LOSS, "what": "embeddings' gradient", "peer": "protomem-cpu", "peak_extra_bytes": 0, "M": 3000},
    {**STEP, "what": "prototype memory", "identities": 10_000_000},
    {**STEP, "what": "classifier", "identities": 10_000},
]


def invoke(*args: str, sizes: str = "tiny") -> Any:
    environment = {"COLUMNS": "200", "PROTOMEM_BENCH_SIZES": sizes}
    return CliRunner(env=environment).invoke(main.app(), list(args))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that says what the suite will have measured instead of running it."""

    def will_measure(rows: list[dict[str, Any]], junit: str = "") -> None:
        def run(file: str, options: list[str], output: Path, *_: Any) -> None:
            stats = {"median": 0.25, "min": 0.2, "rounds": 7}
            items = [
                {"fullname": f"benchmarks/x.py::{i}", "extra_info": row, "stats": stats} for i, row in enumerate(rows)
            ]
            (output / "benchmark.json").write_text(json.dumps({"benchmarks": items}))
            (output / "junit.xml").write_text(f"<testsuites><testsuite>{junit}</testsuite></testsuites>")

        monkeypatch.setattr(command, "_run_suite", run)

    return will_measure


def figure(name: str, value: float, must: float, aim: float, unit: str = "G") -> dict[str, Any]:
    return {"figure": name, "value": value, "must": must, "aim": aim, "unit": unit}


@pytest.mark.parametrize(
    ("value", "must", "aim", "expected"),
    [
        (1.08, 1.08, 0.8, (True, False)),
        (1.09, 1.08, 0.8, (False, False)),
        (0.80, 1.08, 0.8, (True, True)),
        (4.99, 5, 10, (False, False)),
        (5.00, 5, 10, (True, False)),
        (10.0, 5, 10, (True, True)),
        (float("nan"), 5, 10, (False, False)),
    ],
)
def test_verdict(value: float, must: float, aim: float, expected: tuple[bool, bool]) -> None:
    assert verdict(value, must, aim) == expected


def test_the_example_of_verdict_is_true() -> None:
    assert doctest.testmod(results) == (0, 1)


def test_quick_passes_where_every_must_is_met(measured: Any, tmp_path: Path) -> None:
    measured([figure("forward", 1.0, 1.08, 0.8), figure("enqueue_", 25, 5, 20, "times faster")])
    result = invoke("--quick", "--output", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "1.08 G pass" in result.output
    assert "0.8 G not yet" in result.output
    assert "25.00x" in result.output
    assert "MISS" not in result.output


def test_quick_fails_where_a_must_is_missed(measured: Any, tmp_path: Path) -> None:
    measured([figure("forward", 1.0, 1.08, 0.8), figure("enqueue_", 4, 5, 20, "times faster")])
    result = invoke("--quick", "--output", str(tmp_path))
    assert result.exit_code == 1
    assert "5x MISS" in result.output


@pytest.mark.parametrize(
    ("outcome", "shown"),
    [
        ('<skipped message="backend &apos;cpu&apos; [x] cannot"/>', "not measured: backend 'cpu' [x] cannot"),
        ('<failure message="boom"/>', "failed: bench_it"),
    ],
)
def test_quick_fails_where_a_figure_is_missing(measured: Any, tmp_path: Path, outcome: str, shown: str) -> None:
    measured([figure("forward", 1.0, 1.08, 0.8)], f'<testcase name="bench_it">{outcome}</testcase>')
    result = invoke("--quick", "--output", str(tmp_path))
    assert result.exit_code == 1
    assert shown in result.output


def test_writes_tables_csv_json_and_plots(measured: Any, tmp_path: Path) -> None:
    reason = "cut-cross-entropy: not installed"
    skips = f'<testcase name="a"><skipped message="{reason}"/></testcase>' * 2
    measured(ROWS, skips)
    result = invoke("--output", str(tmp_path), "--threads", "3")
    assert result.exit_code == 0, result.output  # a peer that is not there is reported, and no failure
    assert result.output.count(f"not measured: {reason}") == 1
    for text in ("margin_softmax_loss", "training step", "protomem-cpu", "10,000,000", "3 MiB", "2.00"):
        assert text in result.output

    content = json.loads((tmp_path / "results.json").read_text())
    assert content["machine"].keys() >= set(MACHINE)
    assert content["machine"]["threads"] == 3
    assert content["not_measured"] == [reason]
    assert [row["peer"] for row in content["results"]] == [row["peer"] for row in ROWS]
    with (tmp_path / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(ROWS)
    assert lines[0].keys() >= {*MACHINE, "operator", "peer", "B", "M", "D", "ratio", "seconds", "peak_extra_bytes"}
    assert lines[1]["peak_extra_bytes"] == str(3 << 20)
    for plot in ("ratio_to_g.png", "against_memory_size.png", "against_identities.png"):
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG"), plot


def test_a_run_is_held_against_the_last_one_on_such_a_machine(measured: Any, tmp_path: Path) -> None:
    def run(rows: list[dict[str, Any]], threads: int = 3) -> tuple[str, list[tuple[float, float] | None]]:
        measured(rows)
        output = invoke("--output", str(tmp_path), "--threads", str(threads)).output
        found = json.loads((tmp_path / "results.json").read_text())["results"]
        return output, [(row["last"], row["change"]) if "last" in row else None for row in found]

    slower = [{**row, "ratio": 2.5} for row in ROWS]
    output, lasts = run(ROWS)
    assert lasts == [None] * len(ROWS)
    assert "last" not in output
    output, lasts = run(slower[:1])  # a part: what it leaves out is kept
    assert lasts == [(2.0, 0.25)]
    assert "2.00" in output
    assert "+25%" in output
    output, lasts = run(slower)
    assert lasts == [(2.5, 0.0), *[(2.0, 0.25)] * (len(ROWS) - 1)]
    assert (output.count("+0%"), output.count("+25%")) == (1, len(ROWS) - 1)
    assert run(slower, threads=2)[1] == [None] * len(ROWS)  # another machine, as it were
    assert run(slower)[1] == [(2.5, 0.0)] * len(ROWS)


@pytest.mark.parametrize("held", ["", "[]", '{"a": 3}', '{"a": {"b": "c"}}'])
def test_what_is_no_last_run_is_none(measured: Any, tmp_path: Path, held: str) -> None:
    (tmp_path / "last.json").write_text(held)
    measured([figure("forward", 1.0, 1.08, 0.8), figure("memory", 0.0, 100, 32, "MiB")])
    assert invoke("--quick", "--output", str(tmp_path)).exit_code == 0
    again = invoke("--quick", "--output", str(tmp_path)).output
    assert "1.00" in again
    assert again.count("+0%") == 1  # and of no memory none


def test_draws_only_what_was_measured(measured: Any, tmp_path: Path) -> None:
    measured(ROWS[-1:])
    assert invoke("--output", str(tmp_path)).exit_code == 0
    assert [path.name for path in tmp_path.glob("*.png")] == ["against_identities.png"]


def test_static_writes_a_report_into_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The harness itself is tested in tests/benchmarks/static; here a stand-in takes its place."""
    harness = tmp_path / "benchmarks" / "static"
    harness.mkdir(parents=True)
    write = "import os, pathlib, sys; assert 'TRITON_INTERPRET' not in os.environ\n"
    (harness / "__main__.py").write_text(write + "pathlib.Path(sys.argv[-1], 'static.md').write_text('counted')")
    monkeypatch.setattr(command, "SUITE", tmp_path / "benchmarks")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert invoke("--static").exit_code == 0
    assert (tmp_path / "docs" / "static.md").read_text() == "counted"
    assert invoke("--static", "--output", str(tmp_path / "out")).exit_code == 0
    assert (tmp_path / "out" / "static.md").read_text() == "counted"
    (harness / "__main__.py").write_text("raise ValueError('no such kernel')")
    result = invoke("--static")
    assert result.exit_code == 2
    assert "the static report failed: ValueError: no such kernel" in result.output


def test_static_without_triton(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "triton" else name)
    result = invoke("--static", "--output", str(tmp_path))
    assert result.exit_code == 2
    assert "needs triton: pip install triton" in result.output


def test_without_pytest_benchmark_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "pytest_benchmark" else name)
    result = invoke("--output", str(tmp_path))
    assert result.exit_code == 2
    assert "needs pytest_benchmark: pip install" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quick", "--full"], "--quick and --full exclude each other"),
        (["--full", "--static"], "--full and --static exclude each other"),
        (["--backend", "abacus"], "backend must be one of"),
        (["--dtype", "int8"], "--dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (["--quick", "--dtype", "bfloat16"], "the figures of --quick are those of float32"),
        (["--backend", "triton"], "backend 'triton' is not available"),
        (["--device", "abacus"], "device 'abacus' cannot be used here"),
    ],
)
def test_options_that_cannot_be(options: list[str], message: str, tmp_path: Path) -> None:
    result = invoke(*options, "--output", str(tmp_path))
    assert result.exit_code == 2
    assert message in result.output


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = invoke("--output", str(tmp_path / "file"))
    assert result.exit_code == 2
    assert "cannot write to" in result.output


@pytest.mark.parametrize("select", ["nothing_of_this_name", "aggregate and ("])
def test_an_unknown_selection_lists_what_there_is(select: str, tmp_path: Path) -> None:
    result = invoke("--select", select, "--output", str(tmp_path))
    assert result.exit_code == 2
    assert f"no benchmark matches --select '{select}'" in result.output
    assert "aggregate_prototypes, enqueue, hardest_negatives" in result.output


def test_the_suite_runs(tmp_path: Path) -> None:
    options = ["--backend", "reference", "--dtype", "bfloat16", "--output", str(tmp_path)]
    result = invoke("--select", "logits and M300", *options)
    assert result.exit_code == 0, result.output
    assert "bfloat16" in result.output
    rows = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [row["peer"] for row in rows] == ["eager", "protomem-reference"]
    for row in rows:
        assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
        assert (row["B"], row["M"], row["D"], row["unit"]) == (16, 300, 8, "G")


def test_the_quick_figures_run(tmp_path: Path) -> None:
    result = invoke("--quick", "--select", "aggregate", "--backend", "reference", "--output", str(tmp_path))
    assert result.exit_code in (0, 1), result.output
    assert result.output.count("aggregate_prototypes against eager") == 3


def test_python_m_runs_it_and_needs_the_train_extra(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    done = subprocess.run([sys.executable, "-m", "benchmarks", "--full", "--quick"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: --quick and --full exclude each other\n")
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "rich" else object())
    with pytest.raises(SystemExit) as stop:
        main.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: python -m benchmarks needs rich: pip install 'protomem-kernels[train]'\n"
