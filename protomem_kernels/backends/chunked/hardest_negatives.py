"""hardest_negatives by chunks: the stream over the memory is PyTorch's product, and one kernel takes maxima of tiles.

The two levels, and why the k best tiles of 128 slots hold the k largest cosines, are those of
``triton/hardest_negatives.py``, which also forms the cosines of the chosen tiles again and takes the result from there.

**Rounding.** Here the maxima come from PyTorch's product and the result from Triton's: the same cosine may differ by an
error d of float32 between them (or of what ``backends.precision`` asks for). Cosines are right whatever d is; which of
several tiles, whose largest cosines lie within 2 d of the k-th, are looked at is not decided by exact arithmetic.

Per logit 4 PARTS bytes go through L2, and 4 / 128 are kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from protomem_kernels.backends import precision
from protomem_kernels.backends.chunked import products
from protomem_kernels.backends.chunked.products import cut, factor_of, logits_of, part_of, present_rows
from protomem_kernels.backends.chunked.weights import load_logits
from protomem_kernels.backends.triton import launch
from protomem_kernels.backends.triton.hardest_negatives import TILE, Memory, hardest_of, keep_largest
from protomem_kernels.backends.triton.hardest_negatives import (
    hardest_negatives_backward as hardest_negatives_backward,  # of the chosen rows alone
)
from protomem_kernels.backends.triton.tiles import load_present, load_slots, scalar

TILE_SLOTS = tl.constexpr(TILE)
NONE = tl.constexpr(float("-inf"))


@triton.jit
def maxima_kernel(
    maxima_ptr,  # (B, tiles) contiguous
    logits_ptr,  # (PARTS, batch, width) contiguous: times ``lift``
    targets_ptr,  # (batch,)
    occupied_ptr,  # (width,), or None: all
    inverse_ptr,  # (width,) contiguous: 1 / |w_j|, if rows are scaled to unit length; else None
    first,  # slot of the chunk, a multiple of a tile
    width,
    batch,
    capacity,
    tiles,
    lift: tl.float64,
    stride_target,
    stride_occupied,
    PARTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    """Write the largest cosine of each sample to the negatives of each tile of a chunk."""
    acc_dtype: tl.constexpr = maxima_ptr.dtype.element_ty
    GROUPS: tl.constexpr = BLOCK_SLOTS // TILE_SLOTS
    blocks = tl.cdiv(batch, BLOCK_ROWS)
    rows = tl.program_id(0) % blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    start = tl.program_id(0) // blocks * BLOCK_SLOTS
    lanes = start + tl.arange(0, BLOCK_SLOTS)
    keep = rows < batch
    targets = load_slots(targets_ptr, rows, stride_target, keep, capacity)
    values = load_logits(logits_ptr, rows, keep, lanes, width, batch, PARTS) / scalar(lift, acc_dtype)
    present = load_present(occupied_ptr, lanes, stride_occupied, width)
    if inverse_ptr is not None:
        values *= tl.load(inverse_ptr + lanes, mask=present, other=0.0)[None, :]
    slots = tl.cast(first, tl.int64) + lanes
    negative = present[None, :] & (slots[None, :] != targets[:, None])
    values = tl.where(negative & (values == values), values, NONE)
    largest = tl.max(values.reshape(BLOCK_ROWS, GROUPS, TILE_SLOTS), axis=2)
    tile = (tl.cast(first, tl.int64) + start) // TILE_SLOTS + tl.arange(0, GROUPS)
    offsets = rows.to(tl.int64)[:, None] * tiles + tile[None, :]
    inside = (tile * TILE_SLOTS < tl.cast(first, tl.int64) + width)[None, :]
    tl.store(maxima_ptr + offsets, largest, mask=keep[:, None] & inside)


def _best_tiles(x: Tensor, targets: Tensor, memory: Memory, chosen: int) -> Tensor:
    """Return the ``chosen`` best tiles of each row (B, chosen), ascending."""
    prototypes, occupied, inverse = memory
    (batch, dim), capacity = x.shape, len(prototypes)
    tiles = triton.cdiv(capacity, TILE)
    if chosen == tiles:
        return torch.arange(tiles, device=x.device).expand(batch, -1)
    dtype = launch.compute_dtype(x, prototypes)
    factor, lift = factor_of(x, prototypes, precision.parts(dtype))
    maxima = x.new_empty(batch, tiles)
    rows_at_once = min(batch, products.ROWS)
    per_slot = 2 * dim * dtype.itemsize
    step = products.slots_of_chunk(x.device, rows_at_once, capacity, len(factor) * x.element_size(), per_slot)
    logits = x.new_empty(len(factor) * rows_at_once * min(step, capacity))
    how = launch.choose("chunk", launch.architecture(x.device), dtype, dim)
    with precision.held_by_cublas():
        for here in cut(capacity, step):
            present = part_of(occupied, here)
            rows = present_rows(prototypes[here], present, dtype)
            for block in cut(batch, products.ROWS):
                size = block.stop - block.start
                maxima_kernel[(triton.cdiv(size, how.rows) * triton.cdiv(len(rows), how.slots),)](
                    maxima[block],
                    logits_of(factor[:, block], rows, logits),
                    targets[block],
                    present,
                    part_of(inverse, here),
                    here.start,
                    len(rows),
                    size,
                    capacity,
                    tiles,
                    lift,
                    targets.stride(0),
                    0 if occupied is None else occupied.stride(0),
                    PARTS=len(factor),
                    BLOCK_ROWS=how.rows,
                    BLOCK_SLOTS=how.slots,
                    **how.options(),
                )
    return keep_largest(maxima, chosen)


def hardest_negatives(
    x: Tensor, prototypes: Tensor, targets: Tensor, occupied: Tensor | None, k: int, normalize_prototypes: bool
) -> tuple[Tensor, Tensor]:
    """Return cosines (B, k), descending, ties to the lower slot, and slots (B, k); (-inf, -1) where there are fewer.

    Arguments and returns are those of ``reference.hardest_negatives``.
    """
    return hardest_of(_best_tiles, x, prototypes, targets, occupied, k, normalize_prototypes)
