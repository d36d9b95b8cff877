"""Small fixed problems that a GPU's kernels have to solve before they serve: what the operators' problems share.

Odd sizes and whole tiles, one sample alone, an ignored sample, empty slots, one slot alone, so that a sample has no
negative and its sum is -inf; the same numbers on every machine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from protomem_kernels.rows import accumulation_dtype, unit_rows

SIZES = [(1, 5, 16), (13, 131, 37), (80, 300, 64), (2, 1, 16)]  # (B, M, D)
SCALE = 8.0  # so that no single negative decides the sum
Size = tuple[int, int, int]
_drawn: tuple[int, Sequence[Size]] = (0, SIZES)  # the first seed, and the sizes


class Problem(NamedTuple):
    """A batch beside a memory.

    Attributes:
        x: (B, D) unit rows, of the accumulation dtype.
        prototypes: (M, D) unit rows, zero where empty.
        targets: (B,) int64, one of them -1 unless it is the only one.
        occupied: (M,) bool, most of them.
        grad: (B,) of the accumulation dtype, to go backward with.
    """

    x: Tensor
    prototypes: Tensor
    targets: Tensor
    occupied: Tensor
    grad: Tensor


@contextlib.contextmanager
def drawn(seed: int, sizes: Sequence[Size] = SIZES) -> Iterator[None]:
    """Within the block draw the problems from another seed, of other sizes (B, M, D): for who looks at more of them."""
    global _drawn
    before, _drawn = _drawn, (seed, sizes)
    try:
        yield
    finally:
        _drawn = before


def problems(dtype: torch.dtype) -> Iterator[Problem]:
    """Yield one problem per size, with a memory of this dtype."""
    first, sizes = _drawn
    for seed, (batch, slots, dim) in enumerate(sizes, first):
        generator = torch.Generator().manual_seed(seed)
        rows = unit_rows(torch.randn(slots, dim, generator=generator, dtype=torch.float64))
        occupied = torch.rand(slots, generator=generator) < 0.9
        occupied[0] = True
        targets = torch.randint(0, slots, (batch,), generator=generator)
        targets[1:2] = -1
        near = rows[targets.clamp(min=0)] + 0.5 * torch.randn(batch, dim, generator=generator, dtype=torch.float64)
        exact = accumulation_dtype(dtype)
        yield Problem(
            unit_rows(near).to(exact),
            torch.where(occupied[:, None], rows, 0).to(dtype),
            targets,
            occupied,
            torch.randn(batch, generator=generator, dtype=torch.float64).to(exact),
        )


def hard_form(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return a threshold (B,) and coefficients (3,) under which some negatives are hard."""
    return torch.full_like(problem.grad, 0.1), problem.x.new_tensor([0.3, 0.2, 0.5])
