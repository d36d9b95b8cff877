"""Apply every fault to a copy of the package, one at a time, and print whether the suite noticed it.

``python -m tests.mutants``; ``--only TEXT`` runs the faults whose name contains it, ``--jobs N`` that many at once.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.mutants.faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[2]
CRASHES = (-signal.SIGSEGV, -signal.SIGABRT)  # the interpreter writes wherever a faulty Triton kernel points
IGNORE = shutil.ignore_patterns("__pycache__", ".*_cache", ".hypothesis")


def killed(fault: Fault) -> str:
    """Return "killed", or what went wrong: the suite passed, or the fault no longer fits the code."""
    source = (ROOT / "protomem_kernels" / fault.file).read_text()
    if source.count(fault.before) != 1:
        return f"STALE: {fault.before!r} stands {source.count(fault.before)} times in {fault.file}"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(ROOT / "protomem_kernels", copy / "protomem_kernels", ignore=IGNORE)
        shutil.copytree(ROOT / "tests", copy / "tests", ignore=IGNORE)
        shutil.copy(ROOT / "pyproject.toml", copy)
        (copy / "protomem_kernels" / fault.file).write_text(source.replace(fault.before, fault.after))
        run = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "--no-header",
            "--tb=no",
            *(["-m", "triton"] if fault.in_triton else []),
            fault.tests,
        ]
        environment = os.environ | {"PYTHONPATH": folder, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        environment["PROTOMEM_MUTANT"] = "1"
        environment["PROTOMEM_DISABLE_COMPILED"] = "1"  # the faults are in Python: the reference has to serve
        environment["TRITON_INTERPRET"] = "1" if fault.in_triton else "0"
        done = subprocess.run(run, cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode in (1, *CRASHES):
        return "killed"
    return "SURVIVED" if done.returncode == 0 else f"pytest ended with {done.returncode}: {done.stdout[-300:]}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", default="", help="only faults whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    faults = [fault for fault in FAULTS if options.only in fault.name]
    start = time.monotonic()
    alive = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for fault, verdict in zip(faults, pool.map(killed, faults), strict=True):
            alive += verdict != "killed"
            print(f"{verdict:<8}  {fault.file:<34} {fault.name}", flush=True)
    print(f"{len(faults) - alive} of {len(faults)} mutants killed in {time.monotonic() - start:.0f} s")
    return int(alive > 0 or not faults)


if __name__ == "__main__":
    sys.exit(main())
