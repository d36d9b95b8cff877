"""The whole grid: margins x mining rules x gradient modes x policies x raggedness, on 2 to 4 ranks, B = 512 in all.

``python -m tests.distributed.grid [--ranks 2 3 4] [--only TEXT]`` (``make test-distributed``).
Prints what differs from one process and, at the end, the largest difference by ranks and dtype.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
import traceback

import torch

from tests.distributed import cases
from tests.distributed.pool import Pool, RankError

AXES = (
    list(cases.MARGINS),
    list(cases.MININGS),
    ["none", "fresh", "memory"],
    ["fifo", "lru"],
    ["even", "ragged", "empty"],
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.distributed.grid", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--dtypes", nargs="+", default=["float64", "float32"])
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pool, failed, start = Pool(max(options.ranks)), 0, time.monotonic()
    for ranks in options.ranks:
        for name in options.dtypes:
            dtype, worst, ran = getattr(torch, name), 0.0, 0
            for margin, mining, mode, policy, raggedness in itertools.product(*AXES):
                case = f"{margin}, {mining}, {mode}, {policy}, {raggedness}, W = {ranks}, {name}"
                if options.only not in case:
                    continue
                ran += 1
                try:
                    difference = cases.run(
                        pool,
                        ranks,
                        raggedness,
                        total=512,
                        steps=2,
                        identities=150,
                        dtype=dtype,
                        capacity=1200,
                        margin=margin,
                        mining=mining,
                        prototype_gradient=mode,
                        policy=policy,
                        scale=30.0,
                    )
                    worst = max(worst, difference)
                except (AssertionError, RankError):
                    failed += 1
                    print(f"FAILED  {case}\n{traceback.format_exc(limit=1)}", flush=True)
            passed = f"largest difference {worst:.1e} of {cases.TOLERANCE[dtype]:.0e}"
            print(f"W = {ranks}, {name}: {ran} cases, {passed} ({time.monotonic() - start:.0f} s)", flush=True)
    pool.close()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
