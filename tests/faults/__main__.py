"""Apply every fault to a copy of the package, one at a time, and print whether the suite noticed it.

``python -m tests.faults``; ``--only TEXT`` runs the faults whose name contains it, ``--jobs N`` that many at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import tests.faults
from tests.faults.fault import Fault
from tests.faults.runner import verdict_on


def all_faults() -> list[Fault]:
    """Return the faults of every file of this folder."""
    modules = [
        importlib.import_module(f"tests.faults.{found.name}")
        for found in pkgutil.iter_modules(tests.faults.__path__)
        if not found.ispkg and found.name != "__main__"
    ]
    return [fault for module in modules for fault in getattr(module, "FAULTS", [])]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--only", default="", help="only faults whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    faults = [fault for fault in all_faults() if options.only in fault.name]
    start = time.monotonic()
    alive = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for fault, verdict in zip(faults, pool.map(verdict_on, faults), strict=True):
            alive += verdict != "killed"
            print(f"{verdict:<8}  {fault.file:<44} {fault.name}", flush=True)
    print(f"{len(faults) - alive} of {len(faults)} mutants killed in {time.monotonic() - start:.0f} s")
    return int(alive > 0 or not faults)


if __name__ == "__main__":
    sys.exit(main())
