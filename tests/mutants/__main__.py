"""Apply every fault to a copy of the package, one at a time, and print whether the suite noticed it.

``python -m tests.mutants``; ``--only TEXT`` runs the faults whose name contains it, ``--jobs N`` that many at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from tests.mutants.faults import FAULTS
from tests.mutants.runner import verdict_on


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", default="", help="only faults whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    faults = [fault for fault in FAULTS if options.only in fault.name]
    start = time.monotonic()
    alive = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for fault, verdict in zip(faults, pool.map(verdict_on, faults), strict=True):
            alive += verdict != "killed"
            print(f"{verdict:<8}  {fault.file:<34} {fault.name}", flush=True)
    print(f"{len(faults) - alive} of {len(faults)} mutants killed in {time.monotonic() - start:.0f} s")
    return int(alive > 0 or not faults)


if __name__ == "__main__":
    sys.exit(main())
