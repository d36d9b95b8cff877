"""Many processes compute what one does: losses, gradients, statistics, the memory, doppelgangers.

A part of the grid of ``test_grid.py``, which goes through all of it.
"""

from __future__ import annotations

import math

import pytest
import torch

from tests.distributed import cases
from tests.distributed.cases import run
from tests.distributed.pool import Pool

MODES = ("none", "fresh", "memory")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mining", cases.MININGS)
def test_mining_rules(pool: Pool, mining: str, mode: str) -> None:
    run(pool, 2, "ragged", mining=mining, prototype_gradient=mode)


@pytest.mark.parametrize("margin", cases.MARGINS)
def test_margins(pool: Pool, margin: str) -> None:
    run(pool, 3, "ragged", margin=margin, prototype_gradient="fresh")
    run(pool, 2, "empty", margin=margin, mining="curricular")


@pytest.mark.parametrize("quality", cases.QUALITIES)
def test_qualities(pool: Pool, quality: str) -> None:
    run(pool, 3, "empty", quality=quality, prototype_gradient="fresh")


@pytest.mark.parametrize("raggedness", ["even", "ragged", "empty"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(pool: Pool, reduction: str, raggedness: str) -> None:
    run(pool, 3, raggedness, reduction=reduction, margin="mag", mining="samples", prototype_gradient="memory")


@pytest.mark.parametrize("mode", MODES)
def test_least_recently_written(pool: Pool, mode: str) -> None:
    run(pool, 2, "even", policy="lru", prototype_gradient=mode, refresh_ratio=0.6)


@pytest.mark.parametrize("mode", MODES)
def test_weights_of_the_users_own(pool: Pool, mode: str) -> None:
    run(pool, 3, "ragged", weighted=True, prototype_gradient=mode)


@pytest.mark.parametrize("average", [True, 5])
def test_the_factor_of_data_parallel(pool: Pool, average: bool | int) -> None:
    """It is on what comes from the encoder and on nothing else: rows that an optimiser steps do not know it."""
    run(pool, 2, "ragged", average=average, weighted=True, prototype_gradient="memory", equal_batches=False)


def test_equal_batches(pool: Pool) -> None:
    run(pool, 3, "even", equal_batches=True, prototype_gradient="fresh")


@pytest.mark.parametrize("mining", ["none", "mv", "curricular", "hardest"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_float32_at_the_usual_scale(pool: Pool, ranks: int, mining: str) -> None:
    """A fixed offset, or a running maximum for CurricularFace, as one process has it."""
    options = {"capacity": 2000, "scale": 64.0, "margin": "arc", "mining": mining, "prototype_gradient": "fresh"}
    run(pool, ranks, "ragged", total=512, steps=2, identities=150, dtype=torch.float32, **options)


def test_a_scale_beyond_every_offset(pool: Pool) -> None:
    run(pool, 2, "ragged", scale=800.0, prototype_gradient="memory")


def test_nobody_has_a_sample(pool: Pool) -> None:
    run(pool, 2, "even", total=0, steps=2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mining", ["none", "mv", "curricular", "hardest"])
def test_a_broken_embedding_shows_in_its_own_loss_alone(pool: Pool, mining: str, mode: str) -> None:
    for value in (math.nan, math.inf):
        run(pool, 2, "ragged", broken=value, mining=mining, prototype_gradient=mode, reduction="none")
    run(pool, 3, "empty", broken=math.nan, mining=mining, prototype_gradient=mode)


@pytest.mark.parametrize("mode", MODES)
def test_a_bfloat16_memory(pool: Pool, mode: str) -> None:
    run(pool, 2, "ragged", dtype=torch.float32, memory_dtype=torch.bfloat16, prototype_gradient=mode, steps=3)
