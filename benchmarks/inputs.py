"""The sizes and the data of every benchmark; fixed seeds, so every peer and every run sees the same numbers.

``regime`` says how a memory looks at three moments of a training:

- "fresh": embeddings and prototypes point anywhere (isotropic); every negative has cosine about 0.
- "trained": a target has cosine 0.7, and each sample has a few look-alikes of cosine 0.5 among its negatives.
- "hub-heavy": like "trained", but everything leans towards a common mean direction, and a few prototypes lie almost on
  it, so that they are near everything.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import protomem_kernels as pmk

REGIMES = ("fresh", "trained", "hub-heavy")
TARGET_COSINE, LOOK_ALIKE_COSINE, LOOK_ALIKES = 0.7, 0.5, 4
CALLS = 64  # of enqueue_ one after another
CHUNK = 100_000  # rows made at a time, so that making a large memory needs no second one


class Size(NamedTuple):
    """B samples of dimension D against M prototypes."""

    B: int
    M: int
    D: int

    def __str__(self) -> str:
        return f"B{self.B}-M{self.M}-D{self.D}"


def _star(centre: Size) -> list[Size]:
    """Return the centre, then every size that differs from it along one axis."""
    others = [
        *(centre._replace(B=B) for B in (128, 2048)),
        *(centre._replace(M=M) for M in (10_000, 1_000_000)),
        *(centre._replace(D=D) for D in (128, 256)),
    ]
    return [centre, *others]


CENTRE = Size(512, 100_000, 512)
GRID = itertools.product((128, 512, 2048, 4096), (10_000, 100_000, 1_000_000), (128, 256, 512))
# The first of each is its centre: where only one size is measured, it is that one.
SIZES: dict[str, list[Size]] = {
    "tiny": [Size(16, 300, 8), Size(16, 600, 8)],  # for the tests of the suite itself
    "moderate": _star(CENTRE),
    "full": [CENTRE, *(size for size in itertools.starmap(Size, GRID) if size != CENTRE)],
}
# Identities in the data of a training step; the memory holds as many as the first, so it is full in every case.
IDENTITIES = {
    "tiny": (100, 1_000),
    "moderate": (10_000, 100_000, 1_000_000, 10_000_000),
    "full": (10_000, 100_000, 1_000_000, 10_000_000),
}


class Problem(NamedTuple):
    """What a loss takes: raw embeddings (B, D), unit prototypes (M, D), targets (B,) int64, all distinct."""

    embeddings: Tensor
    prototypes: Tensor
    targets: Tensor


def unit_rows(rows: int, dim: int, seed: int) -> Tensor:
    """Return (rows, dim) unit vectors that point anywhere."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.empty(rows, dim)
    for part in made.split(CHUNK):
        part.normal_(generator=generator)
        part /= torch.linalg.vector_norm(part, dim=1, keepdim=True)
    return made


def at_cosine(cosine: float, rows: Tensor, seed: int) -> Tensor:
    """Return unit vectors (B, D), each at this cosine to its unit row (B, D), in a random direction around it."""
    aside = unit_rows(*rows.shape, seed)
    aside = functional.normalize(aside - (aside * rows).sum(dim=1, keepdim=True) * rows)
    return cosine * rows + (1 - cosine**2) ** 0.5 * aside


@functools.lru_cache(maxsize=2)
def problem(size: Size, regime: str = "fresh", device: str = "cpu", dtype: torch.dtype = torch.float32) -> Problem:
    """Return the embeddings, prototypes (both in ``dtype``) and targets of a regime; M must be at least B."""
    B, M, D = size
    w = unit_rows(M, D, seed=1)
    # Distinct slots: first the targets, then each sample's look-alikes, then the hubs.
    slots = torch.randperm(M, generator=torch.Generator().manual_seed(2))
    targets, others = slots[:B], slots[B:]
    if regime == "fresh":
        x = unit_rows(B, D, seed=3)
    else:
        if regime == "hub-heavy":
            mean = unit_rows(1, D, seed=4)
            for part in w.split(CHUNK):
                part.add_(mean, alpha=0.7)
                part /= torch.linalg.vector_norm(part, dim=1, keepdim=True)
            hubs = others[-max(1, M // 10_000) :]
            others = others[: -len(hubs)]
            w[hubs] = at_cosine(0.95, mean.expand(len(hubs), D), seed=5)
        x = at_cosine(TARGET_COSINE, w[targets], seed=6)
        for k in range(min(LOOK_ALIKES, len(others) // B)):
            w[others[k * B : (k + 1) * B]] = at_cosine(LOOK_ALIKE_COSINE, x, seed=10 + k)
    lengths = 20 + 5 * torch.rand(B, 1, generator=torch.Generator().manual_seed(7))  # encoders do not normalise
    return Problem((x * lengths).to(device, dtype), w.to(device, dtype), targets.to(device))


def labels_in_pairs(B: int, identities: int, seed: int) -> Tensor:
    """Return labels (B,) int64 of B / 2 different identities with two images each, spread over all of them."""
    generator = torch.Generator().manual_seed(seed)
    step = identities // (B // 2)
    first = torch.randint(step, (), generator=generator)
    return (first + step * torch.arange(B // 2)).repeat(2)[torch.randperm(B, generator=generator)]


def full_memory(prototypes: Tensor) -> pmk.MemoryState:
    """Return a full memory of these rows, with identities 0, 1, 2, ..."""
    state = pmk.MemoryState.empty(*prototypes.shape, dtype=prototypes.dtype, device=prototypes.device)
    state.prototypes.copy_(prototypes)
    state.identities.copy_(torch.arange(len(prototypes)))
    return state


def identities_half_known(M: int, P: int) -> list[Tensor]:
    """Return identities (P,) for one call after another: half known, from slots the ring will not reach, half new."""
    generator = torch.Generator().manual_seed(1)
    new = P // 2
    known = [M - 1 - torch.randperm(M // 8, generator=generator)[: P - new] for _ in range(CALLS)]
    fresh = [torch.arange(M + call * new, M + (call + 1) * new) for call in range(CALLS)]
    return [torch.cat(both)[torch.randperm(P, generator=generator)] for both in zip(known, fresh, strict=True)]
