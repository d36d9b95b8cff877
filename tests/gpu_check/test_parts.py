"""The parts, each within this process: nothing wrong is missed, nothing right is called wrong."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from protomem_kernels.backends.choice import BACKENDS
from protomem_kernels.backends.operators import PROBLEMS
from protomem_kernels.gpu_check import (
    command,
    correctness,
    counters,
    device,
    environment,
    problems,
    sanitizer,
    speed,
    steps,
)
from protomem_kernels.gpu_check.correctness import judge
from protomem_kernels.gpu_check.plan import PARTS
from protomem_kernels.ops.problems import SIZES, drawn

CPU, REFERENCE = torch.device("cpu"), BACKENDS["reference"]
FAST = "cpu" if BACKENDS["cpu"].unavailable() is None else "reference"


# Correctness


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("operator", PROBLEMS)
def test_right_kernels_are_called_right(operator: str, dtype: torch.dtype) -> None:
    definition = REFERENCE.kernel(operator)
    kernel = BACKENDS[FAST].kernel(operator) or definition
    for seed in (0, 483):  # 483: a gradient that is the difference of large numbers
        with drawn(seed):
            for args in PROBLEMS[operator](dtype):
                assert [j.wrong for j in judge(kernel, definition, args, dtype, CPU, operator) if j.wrong] == []


def changed(place: int, change: Any) -> Any:
    def fault(*args: Any) -> Any:
        results = list(REFERENCE.kernel("negative_logsumexp")(*args))
        results[place] = change(results[place])
        return results

    return fault


def with_nan(x: Tensor) -> Tensor:
    x = x.clone()
    x[-1] = torch.nan
    return x


@pytest.mark.parametrize(
    ("place", "change", "words"),
    [
        (1, lambda n: n * 1.0001, "is off by"),
        (3, lambda o: 1.3 * o, "is off by"),
        (0, with_nan, "is off by inf"),
        (1, torch.zeros_like, "is off by"),
        (1, lambda n: n.double(), "is torch.float64"),
        (2, lambda rows: rows[:, :1], r"is torch.float32 \(1, 1\), not"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wrong_results_are_found(place: int, change: Any, words: str, dtype: torch.dtype) -> None:
    said = []
    for args in PROBLEMS["negative_logsumexp"](dtype):
        fault, definition = changed(place, change), REFERENCE.kernel("negative_logsumexp")
        said += [(i, j.wrong) for i, j in enumerate(judge(fault, definition, args, dtype, CPU, "negative_logsumexp"))]
    wrong = [text for index, text in said if index == place and text]
    assert wrong
    assert any(re.search(words, text) for text in wrong)
    assert not [text for index, text in said if index != place and text]


def test_a_wrong_index_and_a_lost_write_are_found() -> None:
    definition = REFERENCE.kernel("hardest_negatives")
    args = list(PROBLEMS["hardest_negatives"](torch.float32))[2]
    off = lambda *args: (lambda c, s: (c, s.flip(1)))(*definition(*args))  # noqa: E731
    assert judge(off, definition, args, torch.float32, CPU, "hardest_negatives")[1].wrong.endswith("integers differ")
    args = list(PROBLEMS["enqueue_"](torch.float32))[4]
    unwritten = lambda *args: REFERENCE.kernel("enqueue_")(*[torch.clone(a) for a in args[:5]], *args[5:])  # noqa: E731
    judged = judge(unwritten, REFERENCE.kernel("enqueue_"), args, torch.float32, CPU, "enqueue_")
    assert any("is off by" in j.wrong for j in judged)
    assert any("integers differ" in j.wrong for j in judged)
    short = lambda *args: definition(*args)[:1]  # noqa: E731
    args = list(PROBLEMS["hardest_negatives"](torch.float32))[2]
    assert "results, not" in judge(short, definition, args, torch.float32, CPU, "hardest_negatives")[0].wrong


def test_a_task_writes_what_it_finds(stand_in: None, recorded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    record, lines = recorded("correctness")
    correctness.run(record, "hardest_negatives reference bfloat16", 0, Path())
    assert [line["ok"] for line in lines()] == [True] * (2 * len(SIZES) + 1)
    assert lines()[-1]["said"].startswith(f"{2 * len(SIZES)} problems, 0 wrong; worst error")

    def broken(*args: Any) -> Any:
        raise RuntimeError("misaligned address")

    record, lines = recorded("broken")
    definition, kernels = REFERENCE.kernel("hardest_negatives"), {"cpu": broken, "reference": None}
    kernels["reference"] = definition
    for name, kernel in kernels.items():
        monkeypatch.setitem(BACKENDS[name]._kernels, "hardest_negatives", kernel)
    correctness.run(record, "hardest_negatives cpu bfloat16", 0, Path())
    assert {line["ok"] for line in lines()} == {False}
    assert lines()[0]["said"] == "RuntimeError: misaligned address"
    record, lines = recorded("lost")
    monkeypatch.setattr(correctness, "lost", lambda: True)
    correctness.run(record, "hardest_negatives cpu bfloat16", 0, Path())
    assert [line["said"] for line in lines()][1:] == ["the device is lost to this process"]


def test_a_gpu_gets_a_process_for_each_operator_backend_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correctness, "stands_in", lambda: False)
    monkeypatch.setattr(correctness, "backends", lambda: ["triton", "cuda"])
    names = [task.name for task in correctness.tasks(Path())]
    assert len(set(names)) == len(names) == len(PROBLEMS) * 2 * 4
    monkeypatch.setattr(correctness, "backends", lambda: ["chunked"])
    own = {task.name.split()[0] for task in correctness.tasks(Path())}
    assert "negative_logsumexp" in own
    assert "enqueue_" not in own  # Triton's kernel, looked at as Triton's
    monkeypatch.setattr(speed, "stands_in", lambda: False)
    tasks = [task.name for task in speed.tasks(Path())]
    assert tasks[:3] == ["ceilings", "512 100000 512 bfloat16", "512 100000 512 float32"]
    assert len(set(tasks)) == len(tasks) == 1 + 2 * 8


# Speed


def test_speed_judges_results(stand_in: None, recorded: Any) -> None:
    record, lines = recorded("speed")
    one, off = torch.ones(3), torch.tensor([1.0, 1.0, 1.1])
    assert speed.measure(record, "", speed.Case("good", lambda: lambda: [one], True, lambda: [one], 1e-3))
    assert speed.measure(record, "", speed.Case("wrong", lambda: lambda: [off], True, lambda: [one], 1e-3))
    assert speed.measure(record, "", speed.Case("NaN", lambda: lambda: [one * torch.nan], True, lambda: [one], 1e-3))
    assert [line["ok"] for line in lines()] == [True, False, False]


def test_speed_tells_our_failures_from_others(stand_in: None, recorded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    record, lines = recorded("speed")

    def failing(error: Exception) -> Any:
        def run() -> list[Tensor]:
            raise error

        return lambda: run

    for error, ours in [
        (RuntimeError("illegal address"), True),
        (RuntimeError("illegal address"), False),
        (RuntimeError("backend 'cuda' cannot serve it"), True),
        (torch.OutOfMemoryError("too much"), True),
    ]:
        assert speed.measure(record, "", speed.Case("it", failing(error), ours))
    assert [line["ok"] for line in lines()] == [False, None, None, None]
    monkeypatch.setattr(speed, "lost", lambda: True)
    monkeypatch.setattr(speed, "_ceilings", lambda: iter([speed.Case(n, failing(RuntimeError(n))) for n in "abc"]))
    record, lines = recorded("ceilings")
    assert speed.run(record, "ceilings", 1, Path()) == 75  # another process goes on with c
    assert [line["what"] for line in lines()] == ["b"]


def test_both_ways_compute_the_same_at_the_small_size(stand_in: None) -> None:
    """The formulas that judge at large sizes, beside the operators in float32."""
    seen = 0
    for case in speed.Inputs(*speed.SMALL[0], torch.float32).cases():
        if case.truth is not None and case.name.endswith("reference"):
            assert speed._distance(case.make()(), case.truth) < 1e-5, case.name
            seen += 1
    assert seen == 8


def test_steps_are_looked_at(stand_in: None, recorded: Any) -> None:
    record, lines = recorded("steps")
    assert steps.run(record, "fresh bfloat16", 0, Path()) == 0
    host, kernels, graph = lines()
    assert host["ms"] > 0
    assert kernels["aten_calls"] > 10
    assert graph["said"] == "left out: a CPU has no CUDA graphs"


# Sanitizer and counters, by programs that print what the real ones do


def program(folder: Path, name: str, text: str) -> None:
    """Put a program there that writes its arguments to a file and prints a text."""
    file = folder / name
    file.write_text(
        f"#!{sys.executable} -S\nimport sys\nopen({str(folder / 'got')!r}, 'w').write(' '.join(sys.argv))\n"
    )
    with file.open("a") as more:
        more.write(f"print({text!r})\n")
    file.chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


SANITIZED = """========= COMPUTE-SANITIZER
@ aggregate_prototypes
@ hardest_negatives
========= Invalid __global__ read of size 4 bytes
=========     at list_kernel+0x1f0 in list.cuh:12
=========     by thread (0,0,0) in block (0,0,0)
@ enqueue_
========= ERROR SUMMARY: 1 error"""


def test_the_sanitizers_findings_are_told_by_operator(
    stand_in: None, recorded: Any, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(programs, "compute-sanitizer", SANITIZED)
    record, lines = recorded("sanitizer")
    assert sanitizer.absent(Path()) is None
    sanitizer.run(record, "memcheck cuda", 0, Path())
    assert [(line["what"].split()[-1], line["ok"]) for line in lines()] == [
        ("aggregate_prototypes", True),
        ("hardest_negatives", False),
        ("enqueue_", True),
    ]
    assert "list_kernel" in str(lines()[1]["printed"])
    got = (programs / "got").read_text()
    assert "--tool memcheck" in got
    assert got.endswith("protomem_kernels.gpu_check.problems cuda small")
    program(programs, "compute-sanitizer", "========= Error: Target application returned an error\n@ enqueue_")
    record, lines = recorded("ended")
    sanitizer.run(record, "racecheck triton", 0, Path())
    assert [(line["ok"], line["said"]) for line in lines()] == [(None, "did not end well at enqueue_")]


COUNTED = '''==PROF== Connected to process 12
@ hardest_negatives
==PROF== Profiling "list_kernel"
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","list_kernel","gpu__time_duration.sum","ns","1,000"
"0","list_kernel","launch__registers_per_thread","register/thread","64"
"1","list_kernel","gpu__time_duration.sum","ns","3,000"
"1","other","dram__x","%","n/a"'''


def test_counters_are_told_by_kernel(stand_in: None, recorded: Any, programs: Path) -> None:
    program(programs, "ncu", COUNTED)
    record, lines = recorded("counters")
    assert counters.absent(Path()) is None
    counters.run(record, "triton large", 0, Path())
    kernel, whole = lines()
    assert (kernel["launches"], kernel["gpu__time_duration.sum"], kernel["launch__registers_per_thread"]) == (
        2,
        2000,
        64,
    )
    assert whole["said"] == "counters of 1 kernels"
    program(programs, "ncu", "==ERROR== ERR_NVGPUCTRPERM - no permission")
    record, lines = recorded("refused")
    counters.run(record, "triton large", 0, Path())
    assert [line["said"] for line in lines()] == ["no counters (see what was printed)"]
    assert "ERR_NVGPUCTRPERM" in str(lines()[0]["printed"])


def test_the_problems_that_they_run(stand_in: None, capsys: pytest.CaptureFixture[str]) -> None:
    problems.main(FAST, "small")
    served = [operator for operator in PROBLEMS if BACKENDS[FAST].kernel(operator) is not None]
    assert capsys.readouterr().out.splitlines() == [f"@ {operator}" for operator in served]


# The command


def test_the_environment_steers_no_check_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in device.MISLEADING:
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not set(device.MISLEADING) & device.environment().keys()
    assert device.found() == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.found() is None  # the stand-in's name is not "1"


def test_a_failing_look_at_the_environment_leaves_the_others(
    stand_in: None, recorded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> None:
        raise OSError("no such device")

    monkeypatch.setattr(environment, "_gpus", broken)
    record, lines = recorded("environment")
    environment.run(record, "all", 0, Path())
    assert [line["said"] for line in lines() if line["ok"] is False] == ["OSError: no such device"]
    assert lines()[-1]["what"] == "self-checks on disk"


@pytest.fixture
def nothing_there(stand_in: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Have every part say that it is left out."""
    for name, part in PARTS.items():
        monkeypatch.setitem(PARTS, name, part._replace(absent=lambda checkout: "not today"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_check_without_a_fault_ends_with_0(nothing_there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--parts", "speed", "suite"]) == 0
    content = json.loads((nothing_there / "gpu-check.json").read_text())
    assert (content["complete"], content["wrong"], list(content["parts"])) == (True, [], ["speed", "suite"])
    assert "left out: not today" in capsys.readouterr().out


def test_a_part_that_breaks_in_the_command_itself_is_told(nothing_there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(checkout: Path) -> str:
        raise OSError("no process can be started")

    monkeypatch.setitem(PARTS, "steps", PARTS["steps"]._replace(absent=broken))
    assert command.main(["--parts", "steps", "suite"]) == 1
    content = json.loads((nothing_there / "gpu-check.json").read_text())
    assert content["wrong"] == ["steps: the part itself: OSError: no process can be started"]
    assert list(content["parts"]) == ["steps", "suite"]


def test_interrupted_it_writes_what_it_has(nothing_there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(checkout: Path) -> str:
        raise KeyboardInterrupt

    monkeypatch.setitem(PARTS, "steps", PARTS["steps"]._replace(absent=interrupted))
    assert command.main(["--parts", "speed", "steps", "suite"]) == 1
    content = json.loads((nothing_there / "gpu-check.json").read_text())
    assert (content["complete"], list(content["parts"])) == (False, ["speed"])


@pytest.mark.parametrize("output", ["folder", "lines.jsonl", "nowhere/out.json"])
def test_an_output_that_cannot_be_is_refused(output: str, nothing_there: Path, capsys: Any) -> None:
    (nothing_there / "folder").mkdir()
    assert command.main(["--output", output]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert [path.name for path in nothing_there.iterdir()] == ["folder"]


def test_the_suite_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = PARTS["suite"].absent
    assert "no tests/gpu and no tests/ops here" in str(absent(tmp_path))
    monkeypatch.setattr("protomem_kernels.gpu_check.suite.find_spec", lambda name: None)
    assert absent(tmp_path) == "pytest is not installed: the GPU suite was left out"
