"""``python -m protomem_kernels gpu-check`` in a checkout that is not installed, by a Python that has nothing else."""

from __future__ import annotations

import getpass
import json
import platform
import random
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from protomem_kernels.backends.operators import OPERATORS, PROBLEMS

ROOT = Path(__file__).parents[2]
SUITE = """
import warnings
import pytest

pytestmark = pytest.mark.gpu

def test_good():
    warnings.warn("is no error")

@pytest.mark.skip(reason="only on Tuesdays")
def test_left_out(): pass

def test_bad():
    assert __file__ == "elsewhere"
"""
SETTINGS = "[pytest]\nmarkers = gpu\nfilterwarnings = error\n"


def command(bare: Path, *options: object) -> list[str]:
    return [str(bare), "-m", "protomem_kernels", "gpu-check", *map(str, options)]


def check(bare: Path, environment: dict[str, str], *options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(bare, *options), cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    for folder in ("tests/gpu", "tests/ops"):
        (root / folder).mkdir(parents=True)
    (root / "pytest.ini").write_text(SETTINGS)
    (root / "tests/gpu/test_it.py").write_text(SUITE)
    (root / "tests/ops/test_broken.py").write_text("import no_such_module")
    return root


def test_it_is_bare(bare: Path, outside: dict[str, str]) -> None:
    names = ["typer", "rich", "hypothesis", "pytest_benchmark", "pytest_cov", "xdist", "sklearn", "elftools", "timm"]
    names += ["pytorch_metric_learning", "matplotlib", "PIL"]
    code = f"import importlib.util as u, torch, numpy, pytest; print([n for n in {names} if u.find_spec(n)])"
    done = subprocess.run([bare, "-c", code], env=outside, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
    done = subprocess.run([bare, "-c", "import protomem_kernels"], env=outside, capture_output=True, cwd=bare.parent)
    assert done.returncode == 1


def test_without_a_gpu_one_line_says_what_it_would_do(bare: Path, outside: dict[str, str], tmp_path: Path) -> None:
    done = check(bare, outside, "--output", tmp_path / "out.json", "--minutes", "7")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert re.match(r"error: protomem gpu-check needs a GPU; torch \S+, built with(out)? CUDA", line)
    assert "at most 7 minutes on the environment; every kernel beside float64; ceilings" in line
    assert not list(tmp_path.glob("out*"))


def test_with_a_stand_in_every_part_runs_through(
    bare: Path, outside: dict[str, str], checkout: Path, tmp_path: Path
) -> None:
    stand_in = {**outside, "PROTOMEM_GPU_STAND_IN": "cpu", "PROTOMEM_CACHE_DIR": str(tmp_path / "cache")}
    done = check(bare, stand_in, "--output", tmp_path / "out.json", "--checkout", checkout, "--minutes", "20")
    assert done.returncode == 1, done.stdout + done.stderr  # the suite has a failing test and a broken file
    text = (tmp_path / "out.json").read_text()
    content = json.loads(text)
    assert (content["format"], content["version"], content["complete"]) == ("protomem-gpu-check", 2, True)
    parts: dict[str, Any] = content["parts"]
    assert list(parts) == ["environment", "correctness", "speed", "steps", "sanitizer", "counters", "suite"]

    by_name = {line["what"]: line for line in parts["environment"]}
    assert by_name["versions"]["stand_in"] is True
    assert by_name["backend reference"]["available"] is True
    assert by_name["backend cuda"]["available"] is False
    assert by_name["explain margin_softmax_loss bfloat16"]["choices"]["triton"]
    judged = [line for line in parts["correctness"] if "allowed" in line]
    assert len(judged) == -(-sum(operator in PROBLEMS for operator in OPERATORS) // 3)  # every third of them
    assert all(line["ok"] and line["error"] <= line["allowed"] for line in judged)
    timed = {line["what"]: line for line in parts["speed"]}
    assert all(line["ms"] > 0 for line in timed.values())
    assert sum("ceil" in line["task"] for line in parts["speed"]) == 4
    assert any("margin_softmax_loss prototypes' gradient reference" in what for what in timed)
    assert any("enqueue_ lru reference" in what for what in timed)
    assert [line["what"].split(": ")[1] for line in parts["steps"]] == ["host", "kernels", "graph"]
    assert 0 < parts["steps"][0]["share"] <= 1
    assert parts["steps"][1]["each"]
    outcomes = {line["what"].split("::")[-1]: line for line in parts["suite"]}
    assert outcomes["test_good"]["ok"] is True
    assert outcomes["test_left_out"]["ok"] is None
    assert "only on Tuesdays" in outcomes["test_left_out"]["said"]
    assert "elsewhere" in outcomes["test_bad"]["said"]
    assert outcomes["tests/gpu/test_it.py"]["passed"] == 1
    assert [wrong.split(": ")[:2] for wrong in content["wrong"]] == [
        ["suite", what] for what in [line["what"] for line in parts["suite"] if line["ok"] is False]
    ]
    assert "no_such_module" in str(content["wrong"])

    lines = (tmp_path / "out.jsonl").read_text()
    shown = [line for line in map(json.loads, lines.splitlines()) if "what" in line and not line.get("quiet")]
    assert sum(re.match(r" *[\d.]+ s  ", line) is not None for line in done.stdout.splitlines()) == len(shown)
    for private in (str(tmp_path), str(ROOT), str(Path.home()), platform.node()):
        assert private in ("/", "") or private not in text + lines, private
    if getpass.getuser() != "root":
        assert getpass.getuser() not in text + lines


def test_killed_at_any_moment_its_file_holds_what_was_done(bare: Path, outside: dict[str, str], tmp_path: Path) -> None:
    file, moment = tmp_path / "out.jsonl", random.SystemRandom().randint(1, 12)
    options = ["--output", tmp_path / "out.json", "--parts", "speed"]
    environment = {**outside, "PROTOMEM_GPU_STAND_IN": "cpu"}
    with subprocess.Popen(command(bare, *options), cwd=ROOT, env=environment, stdout=subprocess.PIPE) as process:
        for _ in range(6000):
            if file.exists() and file.read_bytes().count(b"\n") >= moment:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) >= moment, moment
    assert all({"part", "task", "at"} <= line.keys() for line in lines)
    assert "begun" in lines[0]
    assert not (tmp_path / "out.json").exists()
    for _ in range(1000):  # nobody is left behind, nor has anybody gone on to the end
        if not any(str(file) in command_line for command_line in command_lines()):
            break
        time.sleep(0.02)
    else:
        pytest.fail("a process of the check goes on")
    assert "enqueue_ lru reference" not in file.read_text()


def command_lines() -> list[str]:
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(place.read_text(errors="replace"))
        except OSError:
            continue
    return found


def test_the_suites_of_a_gpu_can_be_collected_and_skip_what_needs_more(bare: Path, outside: dict[str, str]) -> None:
    """Without hypothesis (and xdist, coverage, benchmarks, elftools, pytorch-metric-learning) in the whole of both."""
    chosen = "worked_example or ties_go_to or any_batch or any_small or TestMemory_reference"
    options = ["-q", "-rs", "--no-header", "-p", "no:cacheprovider", "-o", "filterwarnings=default", "-k", chosen]
    done = subprocess.run(
        [bare, "-m", "pytest", *options, "tests/gpu", "tests/ops"],
        cwd=ROOT,
        env=outside,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed, skipped = (int(re.findall(rf"(\d+) {word}", done.stdout)[-1]) for word in ("passed", "skipped"))
    assert passed >= 4
    assert skipped >= 5
    assert done.stdout.count("SKIPPED") == done.stdout.count("needs hypothesis, which is not installed")
