"""Part 1: what is here, which backends serve which operator and why the others do not, what they said of themselves."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import protomem_kernels as pmk
from protomem_kernels._installed import version_of
from protomem_kernels.backends.choice import BACKENDS, explain
from protomem_kernels.backends.operators import FUNCTIONS, OPERATORS
from protomem_kernels.backends.verdicts import remembered
from protomem_kernels.gpu_check.device import found, stands_in
from protomem_kernels.gpu_check.processes import Task
from protomem_kernels.gpu_check.records import Record

PACKAGES = ["triton", "numpy", "pytest", "hypothesis", "cut-cross-entropy", "liger-kernel"]
SMI = "driver_version,clocks.max.sm,clocks.max.memory,power.limit,persistence_mode,mig.mode.current"
ROWS, COLUMNS = 8, 512  # of the tensors that backends are asked about


def tasks(checkout: Path) -> list[Task]:
    """Return the part's one task."""
    return [Task("environment", "all", silence=60, resumes=True)]


def run(record: Record, name: str, first: int, checkout: Path) -> None:
    """Look at everything; what fails takes nothing else along."""
    looks = [_versions, _gpus, _programs, _backends, _explanations, _verdicts]
    for case, look in enumerate(looks[first:], first):
        record.begin(look.__name__.strip("_"), case)
        try:
            look(record, checkout)
        except Exception as problem:
            record.write(look.__name__.strip("_"), False, f"{type(problem).__name__}: {problem}")


def said(command: list[str], folder: Path | None = None) -> str:
    """Return what a program prints; nothing if it is not there or fails."""
    try:
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=True, timeout=20, stdin=subprocess.DEVNULL
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _versions(record: Record, checkout: Path) -> None:
    commit = said(["git", "rev-parse", "HEAD"], checkout)
    changed = len(said(["git", "status", "--porcelain"], checkout).splitlines())
    record.write(
        "versions",
        None,
        f"protomem_kernels {pmk.__version__}, torch {torch.__version__} with CUDA {torch.version.cuda or 'none'}",
        protomem_kernels=pmk.__version__,
        commit=commit,
        changed_files=changed,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        packages={name: version_of(name) for name in PACKAGES},
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cores=os.cpu_count(),
        stand_in=stands_in(),
        switches={name: value for name, value in os.environ.items() if name.startswith(("PROTOMEM_", "TRITON_"))},
    )


def _gpus(record: Record, checkout: Path) -> None:
    for index in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(index)
        record.write(
            f"GPU {index}",
            None,
            f"{of.name}, sm_{of.major}{of.minor}, {of.total_memory / 2**30:.0f} GiB",
            name=of.name,
            capability=f"{of.major}.{of.minor}",
            bytes=of.total_memory,
            free_bytes=torch.cuda.mem_get_info(index)[0],
            processors=of.multi_processor_count,
            l2_bytes=getattr(of, "L2_cache_size", None),
            shared_bytes=getattr(of, "shared_memory_per_block_optin", None),
            code=torch.cuda.get_arch_list(),
        )
    rows = said(["nvidia-smi", f"--query-gpu={SMI}", "--format=csv,noheader"]).splitlines()
    about: dict[str, Any] = dict(zip(SMI.split(","), rows[0].split(", "), strict=False)) if rows else {}
    known = Path("/proc/driver/nvidia/version")
    if not about and known.exists():
        number = re.search(r"\d{3}\.\d+(\.\d+)?", known.read_text(encoding="utf-8"))
        about = {"driver_version": number.group() if number else ""}
    record.write("driver", None, about.get("driver_version", "unknown"), **about)


def _programs(record: Record, checkout: Path) -> None:
    """Triton compiles with the one, the last parts of the check need the others."""
    compiler = next(filter(None, map(shutil.which, [os.environ.get("CC", "cc"), "gcc", "clang"])), None)
    shown = said([compiler, "--version"]).partition("\n")[0] if compiler else "none: Triton cannot build its launchers"
    headers = Path(sys.base_prefix, "include", f"python{sys.version_info.major}.{sys.version_info.minor}", "Python.h")
    record.write("C compiler", None, shown, python_headers=headers.exists(), nvcc=said(["nvcc", "--version"])[-80:])


def _backends(record: Record, checkout: Path) -> None:
    for name, backend in BACKENDS.items():
        reason = backend.unavailable()
        record.write(f"backend {name}", None, reason or "available", available=reason is None, built=backend.built())


def _explanations(record: Record, checkout: Path) -> None:
    device = found() or "cpu"
    for operator in [*OPERATORS, *FUNCTIONS]:
        for dtype in (torch.float32, torch.bfloat16):
            rows = torch.zeros(ROWS, COLUMNS, dtype=dtype, device=device)
            choices = explain(operator, rows.float(), rows)
            chosen = next((choice.backend for choice in choices if choice.chosen), "nothing")
            record.write(
                f"explain {operator} {str(dtype).removeprefix('torch.')}",
                None if chosen != "nothing" else False,
                f"{chosen} serves it",
                quiet=True,
                choices={choice.backend: str(choice)[11:].strip() for choice in choices},
            )


def _verdicts(record: Record, checkout: Path) -> None:
    verdicts = remembered(torch.device(found() or "cpu", 0) if not stands_in() else torch.device("cpu"))
    refused = [verdict for verdict in verdicts if verdict.reason is not None]
    record.write(
        "self-checks on disk",
        None if not refused else False,
        f"{len(verdicts)}, {len(refused)} of them against a kernel",
        verdicts=[verdict._asdict() for verdict in verdicts],
    )
