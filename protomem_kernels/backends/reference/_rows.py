"""Tiles, gathered rows and sums over rows: what several reference operators share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from protomem_kernels.rows import row_lengths, unit_rows

# Logits of one tile: 512 x 1024 float32 is 2 MiB, which stays in cache between the product and the exponential.
TILE_ELEMENTS = 512 * 1024
GATHERED_ELEMENTS = 4 * 1024 * 1024  # prototypes gathered at a time for chosen slots: 16 MiB of float32


def unit_rows_backward(grad: Tensor, raw: Tensor, unit: Tensor) -> Tensor:
    """Return the gradient of ``raw`` (..., D) given that of its unit rows ``unit``: (g - (g . u) u) / |raw|; 0 at 0."""
    length = row_lengths(raw)[..., None]
    along = (grad * unit).sum(dim=-1, keepdim=True)
    alive = (unit != 0).any(dim=-1, keepdim=True)  # a zero `unit` row stands for nothing, whatever `raw` holds there
    return torch.where(alive, (grad - along * unit) / torch.where(length > 0, length, 1), 0)


def add_rows_(total: Tensor, index: Tensor, values: Tensor) -> None:
    """Add ``values`` (N, ...) to the rows ``index`` (N,) of ``total``, in order; a negative index takes no part.

    Deterministic on every device: ``index_add_`` is a sequential loop on the CPU but uses atomics on CUDA, where
    ``index_put_`` sorts instead.
    """
    if total.shape[0] == 0:
        return
    absent = (index < 0).view(-1, *[1] * (values.ndim - 1))
    values, index = torch.where(absent, 0, values), index.clamp(min=0)
    if total.is_cuda:
        total.index_put_((index,), values, accumulate=True)
    else:
        total.index_add_(0, index, values)


def sum_rows(values: Tensor, index: Tensor, rows: int) -> Tensor:
    """Sum ``values`` (B, ...) into ``rows`` rows by ``index`` (B,), in batch order; a negative index takes no part."""
    total = values.new_zeros(rows, *values.shape[1:])
    add_rows_(total, index, values)
    return total


def valid_slots(slots: Tensor, capacity: int) -> Tensor:
    """Return the slots as int64, with -1 for every one outside ``[0, capacity)``."""
    return torch.where((slots >= 0) & (slots < capacity), slots.long(), -1)


def gather_rows(x: Tensor, slots: Tensor, dtype: torch.dtype, normalize: bool) -> Tensor:
    """Return rows ``x[slots]`` (..., D) in ``dtype``, unit rows if ``normalize``; zero rows where the slot is -1."""
    flat = slots.flatten()
    if x.shape[0] == 0:
        return x.new_zeros(*slots.shape, x.shape[1], dtype=dtype)
    rows = x.index_select(0, flat.clamp(min=0)).to(dtype)
    rows = torch.where((flat >= 0)[:, None], rows, 0)
    return (unit_rows(rows) if normalize else rows).view(*slots.shape, x.shape[1])


def row_blocks(slots: Tensor, embedding_dim: int) -> list[slice]:
    """Cut the rows of ``slots`` (B, k) so that the prototypes gathered for one block stay small."""
    step = max(1, GATHERED_ELEMENTS // max(1, slots.shape[1] * embedding_dim))
    return [slice(start, start + step) for start in range(0, slots.shape[0], step)]


def chosen_rows_backward(grad: Tensor, x: Tensor, raw: Tensor, unit: Tensor, normalize: bool) -> Tensor:
    """Return the gradient (B, k, D) of chosen prototypes whose cosines to ``x`` (B, D) have the gradient (B, k).

    ``raw`` (B, k, D) are the rows as stored, ``unit`` as used: unit rows if ``normalize``.
    """
    rows = grad[:, :, None] * x[:, None, :]
    return unit_rows_backward(rows, raw, unit) if normalize else rows


def tile_width(batch: int) -> int:
    """Return how many slots one tile of the memory spans for ``batch`` rows of logits."""
    return max(128, min(4096, TILE_ELEMENTS // max(batch, 1)))


def keep_rows(x: Tensor, kept: Tensor) -> Tensor:
    """Return ``x`` (N, D) with zeros in the rows that are not ``kept`` (N,), NaN or not.

    On the bits: ``where`` with a bool mask costs eight times as much on the CPU, a product would keep NaN.
    """
    bits = {4: torch.int32, 8: torch.int64}[x.element_size()]
    return (x.view(bits) & -kept.to(bits)[:, None]).view(x.dtype)


def minus_infinity_unless(kept: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where ``kept`` and -inf elsewhere, to be added to logits (a bool mask costs ten times as much)."""
    return torch.where(kept, 0.0, float("-inf")).to(dtype)


def memory_tiles(
    prototypes: Tensor, present: Tensor | None, dtype: torch.dtype, normalize: bool, width: int
) -> Iterator[tuple[int, Tensor]]:
    """Walk the memory (M, D) in tiles of ``width`` slots: yield each first slot and its rows in ``dtype``.

    Rows that are not ``present`` (M,) become zero, whatever they hold.
    """
    for start in range(0, prototypes.shape[0], width):
        tile = prototypes[start : start + width].to(dtype)
        if present is not None:
            tile = keep_rows(tile, present[start : start + width])
        yield start, unit_rows(tile) if normalize else tile


def put_in_tile_(tile: Tensor, columns: Tensor, values: Tensor | float) -> None:
    """Set ``tile[i, columns[i]] = values[i]`` wherever the column lies inside the tile (B, T)."""
    inside = (columns >= 0) & (columns < tile.shape[1])
    columns = columns.clamp(0, tile.shape[1] - 1)[:, None]
    kept = tile.gather(1, columns)[:, 0]
    tile.scatter_(1, columns, torch.where(inside, values, kept)[:, None])
