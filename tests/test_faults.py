"""Every planted fault has its place: a change that moves it is told at once, and not first by ``make mutants``."""

from __future__ import annotations

from pathlib import Path

import protomem_kernels
from tests.faults.__main__ import all_faults

PACKAGE = Path(protomem_kernels.__file__).parent
ROOT = Path(__file__).parents[1]


def test_every_fault_stands_at_one_place_and_names_tests_that_are_there() -> None:
    faults = all_faults()
    assert len(faults) > 200
    stale = []
    for fault in faults:
        times = (PACKAGE / fault.file).read_text(encoding="utf-8").count(fault.before)
        if times != 1:
            stale.append(f"{fault.name}: {fault.before!r} stands {times} times in {fault.file}")
        stale += [
            f"{fault.name}: there is no {path}"
            for path in (word.partition("::")[0] for word in fault.tests.split())
            if path.startswith("tests/") and not (ROOT / path).exists()
        ]
    assert stale == []
