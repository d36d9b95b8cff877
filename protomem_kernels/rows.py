"""Rows of embeddings and prototypes: dtype of their sums, unit length, refreshing. Plain PyTorch, for every room."""

from __future__ import annotations

import torch
from torch import Tensor

AT_A_TIME = 512 * 1024  # elements that are scaled in place at a time: 2 MiB of float32
VANISHED = 1e-6  # a refreshed row this short has no direction: the new prototype takes its place


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64 and float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_rows(x: Tensor) -> Tensor:
    """Scale each row of ``x`` (N, D) to length 1; a non-finite row becomes NaN, a zero row stays zero and passes none.

    The row's largest entry is divided out first, as a constant, so that squares neither overflow nor underflow.
    """
    largest = x.detach().abs().amax(dim=1, keepdim=True)
    y = x / torch.where(largest > 0, largest, 1)
    norm = torch.linalg.vector_norm(y, dim=1, keepdim=True)
    return torch.where(norm == 0, 0, y / torch.where(norm == 0, 1, norm))


def unit_embeddings(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Return unit rows (B, D) and norms (B,) in the accumulation dtype (float32, float64 for float64)."""
    e = embeddings.to(accumulation_dtype(embeddings.dtype))
    return unit_rows(e), torch.linalg.vector_norm(e, dim=1)


def normalize_rows_(x: Tensor) -> None:
    """Scale the rows of ``x`` (M, D) to length 1 in place, tile by tile; zero rows stay zero."""
    for rows in x.split(AT_A_TIME // x.shape[1] + 1):
        rows.copy_(unit_rows(rows.to(accumulation_dtype(x.dtype))))


def refreshed_rows(old: Tensor, known: Tensor, prototypes: Tensor, refresh_ratio: float) -> Tensor:
    """Return the rows (P, D) that the memory will hold, in the accumulation dtype; differentiable in ``prototypes``.

    ``unit((1 - r) old + r p)`` where the identity is ``known`` (P,), ``unit(p)`` where it is new or the sum vanishes.
    """
    p = unit_rows(prototypes)
    blend = (1 - refresh_ratio) * old + refresh_ratio * p
    keeps_direction = torch.linalg.vector_norm(blend.detach(), dim=1) > VANISHED
    return unit_rows(torch.where((known & keeps_direction)[:, None], blend, p))
