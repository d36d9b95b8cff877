"""The loop in Lightning, on one process and on two, where it is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.examples.running import falling, of_each_rank, run


@pytest.mark.parametrize("processes", [1, 2])
def test_it_trains(processes: int, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    said = of_each_rank(run("lightning_loop.py", str(processes), str(tmp_path)))  # Lightning starts them itself
    assert sorted(said) == list(range(processes))
    assert all(falling(line) for line in said.values())
    assert "'health/identities': 12.0" in said[0]
    assert "'health/refresh_drift': " in said[0]
    assert len({line.partition("{")[2] for line in said.values()}) == 1  # the figures of the whole memory
