"""Health and schedules of a memory over ranks, beside those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import protomem_kernels as pmk
from tests.distributed.cases import part
from tests.distributed.pool import Pool

DIM, SIZES = 6, (5, 3)


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(8, DIM, generator=generator), torch.randint(-1, 12, (8,), generator=generator)) for _ in range(5)
    ]


def watched(group: Any, capacities: tuple[int, ...]) -> Any:
    """Return the health of a memory after each step, and its losses."""
    loss_fn = pmk.PrototypeMemoryLoss(DIM, 40, process_group=group, scale=8.0)
    schedule = pmk.HeadSchedule(loss_fn, capacity=lambda step: capacities[step], margin=lambda step: 0.1 * step)
    told = []
    for step, (embeddings, labels) in enumerate(batches()):
        if group is not None:
            embeddings, labels = part(embeddings, SIZES, group.rank()), part(labels, SIZES, group.rank())
        loss_fn.watch()
        loss = loss_fn(embeddings, labels)
        told.append((loss.item(), loss_fn.health()._asdict()))
        if step < 4:
            schedule.step()
    return told


def test_health_and_schedules_are_those_of_one_process(pool: Pool) -> None:
    capacities = (30, 30, 40, 40, 32)  # room for everybody, on every rank
    alone = watched(None, capacities)
    for told in pool.run(2, watched, capacities):
        for (loss, health), (expected, truth) in zip(told, alone, strict=True):
            assert loss == pytest.approx(expected, abs=1e-5)
            assert health.pop("age_histogram") == truth["age_histogram"]
            assert health == pytest.approx({name: truth[name] for name in health}, abs=1e-5, nan_ok=True)
