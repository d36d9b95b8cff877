"""Many cases in processes of their own: one that dies or hangs is a finding, with its seed."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.case import Outcome, run_case

ROOT = Path(__file__).parents[2]
HANGS = 120.0  # seconds for one case
# Threads that wait give way; how many there are, a case says itself.
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}


def work(subjects: Sequence[str], seed: int, stride: int, seconds: float) -> None:
    """In a process of its own: say on stdout before each case which it is, and after it what came of it."""
    faulthandler.enable()
    end = time.monotonic() + seconds
    for subject, number in _cases(subjects, seed, stride):
        if time.monotonic() > end:
            return
        print(json.dumps(["begins", subject, number]), flush=True)
        faulthandler.dump_traceback_later(HANGS, exit=True)
        print(json.dumps(["ended", *run_case(subject, number)]), flush=True)


def _cases(subjects: Sequence[str], seed: int, stride: int) -> Iterator[tuple[str, int]]:
    while True:
        yield from ((subject, seed) for subject in subjects)
        seed += stride


@dataclass
class Tally:
    """What a run has done: cases per subject, findings, and known ones by their reason."""

    cases: Counter[str] = field(default_factory=Counter)
    findings: list[Outcome] = field(default_factory=list)
    known: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: Outcome) -> bool:
        """Count a case, and say whether it is a finding that counts."""
        self.cases[outcome.subject] += 1
        if outcome.known:
            self.known[outcome.known] += 1
        elif outcome.rule:
            self.findings.append(outcome)
            return True
        return False

    def __str__(self) -> str:
        lines = [f"{count:>8}  {subject}" for subject, count in sorted(self.cases.items())]
        lines += [f"{count:>8}  known: {reason}" for reason, count in self.known.items()]
        return "\n".join([*lines, f"{sum(self.cases.values())} cases, {len(self.findings)} findings"])


def run(
    subjects: Sequence[str],
    seed: int,
    seconds: float,
    jobs: int = 1,
    *,
    most: int = 20,
    tell: Callable[[Outcome], None] = lambda outcome: None,
    command: Sequence[str] = (sys.executable, "-m", "tests.fuzz"),
) -> Tally:
    """Run cases from ``seed`` on for some seconds, in ``jobs`` processes; stop at ``most`` findings."""
    tally, lock = Tally(), threading.Lock()
    end = time.monotonic() + seconds

    def heard(outcome: Outcome) -> bool:
        """Take an outcome in; say whether to go on."""
        with lock:
            if tally.add(outcome):
                tell(outcome)
            return len(tally.findings) < most

    def watch(job: int) -> None:
        """Keep one process at work: where one dies, the next goes on with the next seed."""
        first, going = seed + job, True
        while going and time.monotonic() < end:
            order = json.dumps([list(subjects), first, jobs, end - time.monotonic()])
            with subprocess.Popen(
                [*command, "--work", order],
                stdout=subprocess.PIPE,
                cwd=ROOT,
                env={**os.environ, **ENVIRONMENT},
                text=True,
            ) as process:
                assert process.stdout is not None
                at = None
                for line in process.stdout:
                    if not line.startswith('["'):
                        continue
                    kind, subject, number, *rest = json.loads(line)
                    at, first = ((subject, number) if kind == "begins" else None), number + jobs
                    if kind == "ended" and not heard(Outcome(subject, number, *rest)):
                        process.kill()
                        return
            if at is None:
                if process.returncode:
                    raise RuntimeError(f"a process of the fuzz ended with {process.returncode}, in no case")
                return
            code = process.returncode
            name = signal.Signals(-code).name if code < 0 else f"exit code {code} (1 after {HANGS:g} s: it hung)"
            going = heard(Outcome(at[0], at[1], f"{at[0]}: the process died", name))

    with ThreadPoolExecutor(jobs) as pool:
        for done in [pool.submit(watch, job) for job in range(jobs)]:
            done.result()
    return tally
