"""Part 5, second half: the counters that ``ncu`` reads of every kernel."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from protomem_kernels.gpu_check import problems
from protomem_kernels.gpu_check.device import backends
from protomem_kernels.gpu_check.processes import Task, started
from protomem_kernels.gpu_check.records import Record
from protomem_kernels.gpu_check.sanitizer import program

OPTIONS = ["--csv", "--print-units", "base", "--target-processes", "all"]
METRICS = [
    "gpu__time_duration.sum",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed",
    "l1tex__data_bank_conflicts_pipe_lsu.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "launch__shared_mem_per_block",
    "launch__grid_size",
    "launch__block_size",
]


def absent(checkout: Path) -> str | None:
    """Return why this part is left out, or None."""
    return "ncu is not here: no counters" if program("ncu") is None else None


def tasks(checkout: Path) -> list[Task]:
    """Return a task per backend that has kernels of its own, in large and in small."""
    own = [name for name in backends() if name != "reference"]
    return [Task("counters", f"{backend} {size}", silence=240) for size in ("large", "small") for backend in own]


def run(record: Record, name: str, first: int, checkout: Path) -> None:
    """Run the problems under ``ncu``, and write each kernel's counters: the mean of its launches."""
    command = [program("ncu") or "", *OPTIONS, "--metrics", ",".join(METRICS)]
    printed = []
    with started([*command, *problems.command(*name.split())], os.environ) as lines:
        for line in lines:
            printed.append(line)
            if line.startswith(problems.MARK):
                record.begin(f"{name} {line.removeprefix(problems.MARK).strip()}")
    found = kernels(printed)
    for kernel, counters in found.items():
        record.write(f"{name} {kernel}"[:200], None, f"{counters['launches']} launches", quiet=True, **counters)
    said = f"counters of {len(found)} kernels" if found else "no counters (see what was printed)"
    record.write(name, None, said, printed=[] if found else [line.rstrip() for line in printed[-20:]])


def kernels(printed: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return by kernel the mean of each counter over its launches, from what ``ncu --csv`` prints."""
    rows = [line for line in printed if line.startswith('"')]
    values: dict[str, dict[str, list[float]]] = {}
    launches: dict[str, set[str]] = {}
    for row in csv.DictReader(rows):
        kernel, metric = row.get("Kernel Name") or "", row.get("Metric Name") or ""
        try:
            value = float((row.get("Metric Value") or "").replace(",", ""))
        except ValueError:  # "n/a": not on this GPU
            continue
        values.setdefault(kernel, {}).setdefault(metric, []).append(value)
        launches.setdefault(kernel, set()).add(row.get("ID") or "")
    return {
        kernel: {"launches": len(launches[kernel]), **{name: sum(each) / len(each) for name, each in of.items()}}
        for kernel, of in values.items()
    }
