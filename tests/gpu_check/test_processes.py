"""Tasks that fail in every way a process can, run by stand-ins for the parts that import nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from protomem_kernels.gpu_check.processes import Runner, Setting, Task, how_it_ended, started

# Writes its lines itself, so that it need not import torch.
MODULE = """
import ctypes, json, os, sys, time
given = json.loads(sys.argv[1])
def write(**content):
    line = {"part": given["part"], "task": given["name"], "at": 0.0, **content}
    with open(given["lines"], "a") as file:
        file.write(json.dumps(line) + "\\n")
def case(number):
    write(begun=f"case {number}", case=number)
    if number == 1 and given["name"] == "segfault":
        ctypes.string_at(0)
    if number == 1 and given["name"] == "raises":
        raise ValueError("the words of an error")
    if number == 1 and given["name"].startswith("hangs"):
        time.sleep(60)
    if number == 1 and given["name"] == "lost":
        write(what="case 1", ok=False, said="sticky")
        sys.exit(75)
    write(what=f"case {number}", ok=True, said="")
for number in range(given["first"], 3):
    case(number)
"""


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "a_part.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    environment = {"PATH": os.environ["PATH"]}
    show = lambda line: None  # noqa: E731
    return Runner(Setting(tmp_path / "out.jsonl", time.time(), tmp_path, tmp_path, environment, show, "a_part"))


def results(runner: Runner, task: str) -> list[tuple[str, Any, str]]:
    return [(line["what"], line["ok"], line["said"]) for line in runner.seen if line["task"] == task and "what" in line]


def test_no_failure_stops_what_comes_next(runner: Runner) -> None:
    names = ["segfault", "raises", "hangs", "lost", "fine"]
    runner.run("part", [Task("part", name, silence=1.5, resumes=True) for name in names], at_once=3, seconds=60)
    good = ("case 0", True, ""), ("case 2", True, "")
    assert results(runner, "fine") == [good[0], ("case 1", True, ""), good[1]]
    for name, said in {
        "segfault": "the process was ended by SIGSEGV",
        "raises": "the process ended with exit code 1",
        "hangs": "nothing came for 1.5 s: ended",
        "lost": "sticky",
    }.items():
        assert results(runner, name) == [good[0], ("case 1", False, said), good[1]], name
    printed = {line["task"]: line["printed"] for line in runner.seen if "printed" in line}
    assert "ValueError: the words of an error" in printed["raises"]
    assert "Segmentation fault" in printed["segfault"]


def test_what_does_not_resume_is_told_and_left(runner: Runner) -> None:
    runner.run("part", [Task("part", "raises", silence=20), Task("part", "fine", silence=20)], at_once=1, seconds=60)
    assert [what for what, _, _ in results(runner, "raises")] == ["case 0", "case 1"]
    assert len(results(runner, "fine")) == 3


def test_a_process_that_says_nothing_at_all_is_not_begun_again(runner: Runner, tmp_path: Path) -> None:
    (tmp_path / "modules" / "a_part.py").write_text("raise SystemExit('no such machine')")
    runner.run("part", [Task("part", "mute", silence=20, resumes=True)], at_once=1, seconds=60)
    assert results(runner, "mute") == [("mute", False, "the process ended with exit code 1")]


def test_the_budget_ends_a_part_and_says_what_it_left_out(runner: Runner) -> None:
    tasks = [Task("part", name, silence=50) for name in ("fine", "hangs", "hangs too", "never begun")]
    start = time.monotonic()
    runner.run("part", tasks, at_once=1, seconds=3)
    assert time.monotonic() - start < 20
    (left,) = [line for line in runner.seen if line.get("what") == "left out"]
    assert left["ok"] is None
    assert left["tasks"] == ["hangs (case 1)", "hangs too", "never begun"]
    assert not runner.running
    runner.run("part", [Task("part", "no time", silence=50)], at_once=1, seconds=-1)
    assert runner.seen[-1]["tasks"] == ["no time"]


def test_how_it_ended() -> None:
    assert how_it_ended(-9) == "the process was ended by SIGKILL"
    assert how_it_ended(-200) == "the process was ended by signal 200"


def test_a_started_program_is_read_as_it_prints() -> None:
    with started([sys.executable, "-S", "-c", "print('a'); print('b')"], os.environ) as lines:
        assert [line.strip() for line in lines] == ["a", "b"]


KILLED = """
import os, sys
from protomem_kernels.gpu_check.processes import started
sleeper = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
with started([sys.executable, "-S", "-c", sleeper], os.environ) as lines:
    print(next(lines), end="", flush=True)
    os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can be asked for it")
def test_nobody_outlives_a_process_that_is_killed() -> None:
    done = subprocess.run([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True)
    assert done.returncode == -9
    place = Path("/proc", done.stdout.strip(), "cmdline")
    for _ in range(500):
        if not place.exists() or not place.read_bytes():  # gone, or waiting to be buried
            return
        time.sleep(0.01)
    pytest.fail("it goes on")
