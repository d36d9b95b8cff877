"""Two processes train, three go on with their checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

from tests.examples.running import run


def losses(ranks: int, steps: int, folder: Path) -> dict[int, float]:
    """Run the example under torchrun; return the losses that it prints, by step."""
    printed = run("distributed.py", "--steps", str(steps), "--folder", str(folder), processes=ranks)
    assert 0.5 < float(printed.split("ten unseen people: ")[1]) <= 1
    told = re.findall(rf"step (\d+): loss ([\d.]+) on {ranks} ranks", printed)
    return {int(step): float(loss) for step, loss in told}


def test_it_goes_on_with_more_processes_to_a_lower_loss(tmp_path: Path) -> None:
    two = losses(2, 16, tmp_path)
    three = losses(3, 32, tmp_path)
    assert (min(two), max(two), min(three), max(three)) == (1, 16, 17, 32)
    assert three[32] < two[16] - 0.5
