"""The loop with Accelerate, on one process and on two, where it is installed."""

from __future__ import annotations

import pytest

from tests.examples.running import falling, of_each_rank, run


@pytest.mark.parametrize("processes", [1, 2])
def test_it_trains(processes: int) -> None:
    pytest.importorskip("accelerate")
    said = of_each_rank(run("accelerate_loop.py", processes=processes))
    assert sorted(said) == list(range(processes))
    assert all(falling(line) for line in said.values())
    assert sum(int(line.split()[3]) for line in said.values()) == 12  # each identity is in one shard
