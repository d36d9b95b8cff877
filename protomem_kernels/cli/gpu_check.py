"""``protomem gpu-check``: everything that needs a GPU, in one command, and one file with what came of it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from protomem_kernels.backends.choice import BACKENDS
from protomem_kernels.cli.errors import CommandError, errors_in_one_line
from protomem_kernels.cli.machine import machine
from protomem_kernels.cli.pytest_runs import read_outcomes, run_pytest
from protomem_kernels.training.files import written_whole

PARTS = {"tests/gpu": "the GPU suite", "tests/ops": "the contract suites", "benchmarks/__main__.py": "the benchmarks"}
PACKAGES = ["hypothesis", "pytest", "pytest_benchmark"]
DEVICE = "cuda"
# The environment must not turn the check of a GPU into a check of something else.
MISLEADING = ("TRITON_INTERPRET", "PROTOMEM_GPU_STAND_IN")
LONGEST = 4000  # characters kept of one failure's report


@errors_in_one_line
def gpu_check(
    output: Annotated[Path, typer.Option(help="The file to write.")] = Path("gpu-check.json"),
    peers: Annotated[
        bool, typer.Option("--peers/--no-peers", help="Measure all peers too, not our own figures alone.")
    ] = True,
    checkout: Annotated[
        Path,
        typer.Option(
            help="The checkout whose tests and benchmarks are run. [dim]Default: the current folder.[/]",
            show_default=False,
        ),
    ] = Path(),
) -> None:
    """Run the tests and the benchmarks that need a GPU, and write one JSON file to send back.

    Needs a GPU and a checkout. The file holds versions, the GPU's name, every test's outcome and every figure; no paths
    and no names of people or machines. The exit code is 1 if a test failed or a benchmark did not run to its end (a
    figure that is not what it should be is a result); the file is written then too.
    """
    root = checkout.resolve()
    _check_what_is_needed(root)
    if output.is_dir():
        raise CommandError(f"output must be a file, {output} is a folder")
    console, start = Console(), time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        content: dict[str, Any] = {"format": "protomem-gpu-check", "version": 1, "environment": _environment(root)}
        content["tests"] = _run_tests(root, folder, console)
        content["benchmarks"] = {"quick": _run_benchmarks(root, folder / "quick", "--quick")}
        if peers:  # in the dtype that all of them are made for
            content["benchmarks"]["peers"] = _run_benchmarks(root, folder / "peers", "--dtype", "bfloat16")
        content["seconds"] = round(time.monotonic() - start, 1)
        text = json.dumps(content, indent=1).replace(str(root), ".").replace(str(folder), "<temporary>")
    with written_whole(output) as file:
        file.write_text(text + "\n", encoding="utf-8")
    failed = _summarize(content, console)
    console.print(f"written: {output} (please send it back)", markup=False)
    if failed:
        raise typer.Exit(1)


def _check_what_is_needed(root: Path) -> None:
    if not torch.cuda.is_available():
        built = f"with CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        raise CommandError(f"protomem gpu-check needs a GPU; torch {torch.__version__}, built {built}, sees none here")
    missing = [f"{what} ({place})" for place, what in PARTS.items() if not (root / place).exists()]
    if missing:
        raise CommandError(
            f"not here: {', '.join(missing)}; they come with the repository: run protomem gpu-check in a checkout "
            "that was installed with pip install -e '.[dev]', or name it with --checkout"
        )
    packages = [name for name in PACKAGES if find_spec(name) is None]
    if packages:
        raise CommandError(f"protomem gpu-check needs {', '.join(packages)}: pip install -e '.[dev]'")


def _environment(root: Path) -> dict[str, Any]:
    """Describe the GPU and the software, without a path, a host or a user."""
    devices = range(torch.cuda.device_count())
    return {
        **machine(DEVICE, 0),
        "python": platform.python_version(),
        "system": platform.system(),
        "gpus": [
            {
                "name": torch.cuda.get_device_name(index),
                "capability": ".".join(map(str, torch.cuda.get_device_capability(index))),
                "bytes": torch.cuda.get_device_properties(index).total_memory,
            }
            for index in devices
        ],
        "driver": _said(root, ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).split("\n")[0],
        "cuda": torch.version.cuda,
        "packages": {name: _version(name) for name in ("triton", "numpy", "cut-cross-entropy", "liger-kernel")},
        "commit": _said(root, ["git", "rev-parse", "HEAD"]),
        "changed_files": len(_said(root, ["git", "status", "--porcelain"]).splitlines()),
        "backends": {name: backend.unavailable() for name, backend in BACKENDS.items()},
    }


def _said(root: Path, command: list[str]) -> str:
    """Return what a program prints; nothing if it is not there or fails."""
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _run_tests(root: Path, folder: Path, console: Console) -> dict[str, Any]:
    """Run every test with the mark "gpu"; return the counts and each test's outcome."""
    junit, log = folder / "junit.xml", folder / "pytest.log"
    arguments = ["tests", "-m", "gpu", f"--junit-xml={junit}"]
    code = run_pytest(arguments, root, log, console, "collecting the GPU suite ...", without=MISLEADING)
    outcomes = read_outcomes(junit) if junit.exists() else []
    result = {"exit_code": code, "counts": dict(Counter(outcome.outcome for outcome in outcomes))}
    result["results"] = [
        outcome._replace(details=outcome.details[-LONGEST:], message=outcome.message[:LONGEST])._asdict()
        for outcome in outcomes
    ]
    if code not in (0, 1):  # pytest itself failed: what it said last
        result["log"] = log.read_text(encoding="utf-8")[-LONGEST:]
    return result


def _run_benchmarks(root: Path, folder: Path, *options: str) -> dict[str, Any]:
    """Run ``python -m benchmarks --device cuda`` with these options; return its exit code and what it wrote."""
    command = [sys.executable, "-m", "benchmarks", "--output", str(folder), "--device", DEVICE, *options]
    kept = {name: value for name, value in os.environ.items() if name not in MISLEADING}
    code = subprocess.run(command, cwd=root, env=kept).returncode
    file, log = folder / "results.json", folder / "pytest.log"
    if file.exists():
        return {"exit_code": code, **json.loads(file.read_text(encoding="utf-8"))}
    return {"exit_code": code, "log": log.read_text(encoding="utf-8")[-LONGEST:] if log.exists() else ""}


def _summarize(content: dict[str, Any], console: Console) -> bool:
    """Show what came out, and return whether anything failed."""
    tests = content["tests"]
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(tests["counts"].items())) or "none ran"
    console.print(f"tests: {counts}", markup=False)
    for result in tests["results"]:
        if result["outcome"] == "failed":
            console.print(f"failed: {result['name']}: {result['message'].splitlines()[:1]}", markup=False)
    broken = [name for name, run in content["benchmarks"].items() if "results" not in run or run["failed"]]
    for name, run in content["benchmarks"].items():
        state = "FAILED" if name in broken else f"{len(run['results'])} figures"
        console.print(f"benchmarks, {name}: {state}", markup=False)
    return bool(tests["exit_code"] != 0 or not tests["counts"].get("passed") or broken)
