"""Fuzz the package, or run one case again.

python -m tests.fuzz --seconds 600           cases of every subject from a seed that is drawn and printed
python -m tests.fuzz --from 1000             from this seed on
python -m tests.fuzz --seed 17 --only NAME   that one case, in this process

TRITON_INTERPRET=1 brings the Triton kernels in, in its interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys

from tests.fuzz.case import Outcome, run_case
from tests.fuzz.places import WANTED
from tests.fuzz.run import run, work
from tests.fuzz.subjects import SUBJECTS


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, help="run this case of each subject, and no others")
    parser.add_argument("--from", type=int, dest="first", help="the first seed of a run (default: drawn)")
    parser.add_argument("--only", default="", help=f"subjects whose name contains this: {', '.join(SUBJECTS)}")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to run (default: 60)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--most", type=int, default=20, help="stop after this many findings (default: 20)")
    parser.add_argument("--work", help=argparse.SUPPRESS)  # a process of a run
    parser.add_argument("--backend", help="this backend alone, out of those available here")
    options = parser.parse_args()
    if options.backend:
        os.environ[WANTED] = options.backend
    if options.work:
        work(*json.loads(options.work))
        return 0
    chosen = [name for name in SUBJECTS if options.only in name]
    if not chosen:
        parser.error(f"--only {options.only!r} matches none of {', '.join(SUBJECTS)}")
    if options.seed is not None:
        return these(chosen, options.seed)
    first = random.SystemRandom().randrange(10**9) if options.first is None else options.first
    print(f"fuzz: {options.seconds:g} s in {options.jobs} processes, from seed {first}", flush=True)
    tally = run(chosen, first, options.seconds, options.jobs, most=options.most, tell=lambda o: print(o, flush=True))
    print(tally)
    return int(bool(tally.findings))


def these(subjects: list[str], seed: int) -> int:
    found = 0
    for subject in subjects:
        outcome: Outcome = run_case(subject, seed)
        print(
            f"known ({outcome.known}): {outcome}" if outcome.known else outcome if outcome.rule else f"{subject}: fine"
        )
        found += bool(outcome.rule) and not outcome.known
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
