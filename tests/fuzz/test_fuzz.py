"""A minute of the fuzz, and that it would notice: what breaks rules, what dies, what hangs."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from tests.fuzz.case import Outcome
from tests.fuzz.known import KNOWN
from tests.fuzz.run import run
from tests.fuzz.subjects import SUBJECTS

# The same cases each time, so that a change is judged and not the dice; `make fuzz` draws others.
SEED = int(os.environ.get("PROTOMEM_FUZZ_SEED", "0"))
# Together a minute. tests/faults/fuzz.py plants faults, each of which has to show in this time.
GROUPS = {
    "operators": (
        "aggregate_prototypes",
        "enqueue",
        "hardest_negatives",
        "margin_softmax_loss",
        "margin_softmax_logits",
    ),
    "memory": ("prototype_memory",),
    "losses": ("prototype_memory_loss",),
    "states": ("broken_states", "broken_checkpoints", "bad_calls"),
}
SECONDS = {"operators": 25.0, "memory": 10.0, "losses": 15.0, "states": 10.0}
# A fault has to show, on however busy a machine; then it is over.
MOST, FACTOR = (1, 8) if os.environ.get("PROTOMEM_MUTANT") else (5, 1)


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_no_rule_is_broken(group: str) -> None:
    tally = run(GROUPS[group], SEED, FACTOR * SECONDS[group], most=MOST)
    print(f"from seed {SEED}\n{tally}")
    assert not tally.findings, "\n".join(map(str, tally.findings))
    assert all(tally.cases[subject] for subject in GROUPS[group])


def test_every_subject_has_its_minute() -> None:
    assert sorted(name for group in GROUPS.values() for name in group) == sorted(SUBJECTS)


def test_nothing_is_known_to_be_broken() -> None:
    assert KNOWN == []


# A subject that ends its process, or never ends: each is a finding with its seed, and the run goes on with the next.
PLANTED = """
import os, signal, time
import tests.fuzz.run
from tests.fuzz.__main__ import main
from tests.fuzz.subjects import SUBJECTS

tests.fuzz.run.HANGS = 2

def planted(draw):
    if draw.number % 3 == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    if draw.number % 3 == 2:
        time.sleep(60)

class Numbered(tests.fuzz.case.Draw):
    def __init__(self, subject, seed):
        super().__init__(subject, seed)
        self.number = seed

tests.fuzz.case.Draw = Numbered
SUBJECTS["planted"] = planted
main()
"""


def test_what_dies_or_hangs_is_a_finding_with_its_seed() -> None:
    tally = run(["planted"], 3, 60.0, most=2, command=(sys.executable, "-c", PLANTED))
    assert tally.cases["planted"] == 3
    died, hung = tally.findings
    assert (died.seed, hung.seed) == (4, 5)
    assert died.message.startswith("SIGSEGV")
    assert "it hung" in hung.message
    assert "python -m tests.fuzz --seed 4 --only planted" in str(died)


def test_a_case_is_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.fuzz import case

    seen: list[dict[str, object]] = []

    def spy(subject: str, seed: int) -> case.Draw:
        seen.append((draw := original(subject, seed)).notes)
        return draw

    original = case.Draw
    monkeypatch.setattr(case, "Draw", spy)
    for subject in SUBJECTS:
        outcomes: list[Outcome] = [case.run_case(subject, 11) for _ in range(2)]
        assert outcomes[0] == outcomes[1]
        first, second = (re.sub(" at 0x[0-9a-f]+", "", str(notes)) for notes in seen[-2:])
        assert first == second


def test_oracles_know_nothing_of_the_package() -> None:
    for path in (Path(__file__).parent / "oracles").glob("*.py"):
        assert "protomem_kernels" not in path.read_text(), path
