"""What stands in the file: whole lines, no paths, no names; and what becomes of them."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest

from protomem_kernels.gpu_check import records
from protomem_kernels.gpu_check.records import Lines, Record, merged, shown, without_names, write_whole


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('  File "/opt/x/lib/python3.11/site-packages/torch/a.py", line 3', '  File "a.py", line 3'),
        ("cannot open /home/alice", "cannot open "),
        ("in /srv/ann/kernels/b.cu(3)", "in b.cu(3)"),
        ("~/secret/place/c.py:1", "c.py:1"),
        ("tests/gpu/test_steps.py::test_it[a/b] at 3.2 TB/s, 1 / 2 and a//b", None),
        ("x = /tmp/q/d.so, y", "x = d.so, y"),
    ],
)
def test_paths_lose_all_but_their_end(text: str, kept: str | None) -> None:
    assert without_names(text) == (text if kept is None else kept)


def test_names_of_the_machine_and_its_user_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "node", lambda: "gpu-box7.example.org")
    monkeypatch.setattr(records.getpass, "getuser", lambda: "alice")
    said = without_names({"alice": ["by alice@gpu-box7.example.org on gpu-box7", "malice", 1, None, True]})
    assert said == {"<name>": ["by <name>@<name> on <name>", "malice", 1, None, True]}


def test_a_path_is_cut_before_the_text_is() -> None:
    long = "/srv/ann/" + "a" * 100 + "/b.py " + "x" * (records.LONGEST - 60)
    assert "srv" not in without_names(long)
    assert len(without_names("y" * 9000)) == records.LONGEST


def test_what_json_has_no_number_for_is_a_text(tmp_path: Path) -> None:
    record = Record(tmp_path / "a.jsonl", 0.0, "part", "task")
    record.write("it", None, nan=float("nan"), inf=[-float("inf")], pi=3.14159265358979)
    (line,) = map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines())
    assert (line["nan"], line["inf"], line["pi"]) == ("nan", ["-inf"], 3.14159)
    assert json.loads(json.dumps(merged([line], True), allow_nan=False))


def test_lines_come_whole_and_once(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    lines = Lines(file)
    assert list(lines.new()) == []
    file.write_text('{"a": 1}\n{"b"')
    assert list(lines.new()) == [{"a": 1}]
    assert list(lines.new()) == []
    file.write_text('{"a": 1}\n{"b": 2}\n')
    assert list(lines.new()) == [{"b": 2}]


def test_results_are_shown_and_merged(tmp_path: Path) -> None:
    record = Record(tmp_path / "a.jsonl", 0.0, "speed", "task")
    record.begin("a case", 3)
    record.write("a case", False, "two\nlines")
    record.write("a figure", None, quiet=True, ms=3)
    lines = list(Lines(tmp_path / "a.jsonl").new())
    texts = [shown(line) for line in lines]
    assert texts[0] is texts[2] is None
    assert str(texts[1]).endswith("s  speed       WRONG a case: two lines")
    content = merged(lines, False)
    assert content["wrong"] == ["speed: a case: two\nlines"]
    assert [line["what"] for line in content["parts"]["speed"]] == ["a case", "a figure"]
    assert content["parts"]["speed"][1]["ms"] == 3
    assert content["complete"] is False
    write_whole(tmp_path / "out.json", content)
    assert json.loads((tmp_path / "out.json").read_text()) == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out.json"]
