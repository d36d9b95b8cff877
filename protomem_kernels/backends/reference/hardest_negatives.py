"""Reference of ``hardest_negatives``: the exact k largest cosines of each sample to the memory, no B x M logits.

The memory is streamed in tiles. The best k so far stand in front of each tile's cosines; among these k + T candidates
the k-th largest value is found, everything above it is kept, and ties at it are filled from the lowest slots.
Candidates stand in ascending order of their slots throughout, so the tie rule holds across tiles too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from protomem_kernels.backends.reference._rows import (
    add_rows_,
    chosen_rows_backward,
    gather_rows,
    memory_tiles,
    minus_infinity_unless,
    put_in_tile_,
    row_blocks,
    tile_width,
    valid_slots,
)
from protomem_kernels.rows import narrowed

NONE = float("-inf")


def keep_largest(values: Tensor, slots: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of each row (B, N) in place order, ties to the earlier column; no row holds a NaN."""
    kth = values.topk(k, dim=1).values[:, -1:]
    above = values > kth
    tied = values == kth
    room = k - above.sum(dim=1, keepdim=True, dtype=torch.int32)
    kept = above | (tied & (tied.cumsum(dim=1, dtype=torch.int32) <= room))
    columns = torch.nonzero_static(kept, size=kept.shape[0] * k)[:, 1].view(-1, k)
    return values.gather(1, columns), slots.gather(1, columns)


def hardest_negatives(
    x: Tensor, prototypes: Tensor, targets: Tensor, occupied: Tensor | None, k: int, normalize_prototypes: bool
) -> tuple[Tensor, Tensor]:
    """Return cosines (B, k), descending, ties to the lower slot, and slots (B, k); (-inf, -1) where there are fewer."""
    batch, capacity = x.shape[0], prototypes.shape[0]
    targets = valid_slots(targets, capacity)
    best = x.new_full((batch, k), NONE)
    best_slots = targets.new_full((batch, k), -1)
    width = tile_width(batch)
    for start, tile in memory_tiles(prototypes, occupied, x.dtype, normalize_prototypes, width):
        cosines = x @ tile.T
        if occupied is not None:
            cosines += minus_infinity_unless(occupied[start : start + width], cosines.dtype)
        put_in_tile_(cosines, targets - start, NONE)
        slots = torch.arange(start, start + tile.shape[0], device=x.device).expand(batch, -1)
        candidates = torch.cat([best, torch.where(cosines.isnan(), NONE, cosines)], dim=1)
        best, best_slots = keep_largest(candidates, torch.cat([best_slots, slots], dim=1), k)
    best, order = best.sort(dim=1, descending=True, stable=True)
    slots = torch.where(best == NONE, -1, best_slots.gather(1, order))
    broken = ~torch.isfinite(x).all(dim=1, keepdim=True)
    return torch.where(broken, float("nan"), best), torch.where(broken, -1, slots)


def hardest_negatives_backward(
    grad: Tensor, x: Tensor, prototypes: Tensor, slots: Tensor, normalize_prototypes: bool, need_prototypes: bool
) -> tuple[Tensor, Tensor]:
    """Return dL/dx (B, D) and dL/dw (M, D; empty unless needed): only the B k rows that were chosen take part."""
    grad = torch.where(slots >= 0, grad, 0)
    grad_x = torch.zeros_like(x)
    grad_w = x.new_zeros(prototypes.shape if need_prototypes else (0, 0))
    for rows in row_blocks(slots, x.shape[1]):
        w = gather_rows(prototypes, slots[rows], x.dtype, normalize_prototypes)
        grad_x[rows] = torch.bmm(grad[rows, None], w)[:, 0]
        if need_prototypes:
            raw = gather_rows(prototypes, slots[rows], x.dtype, False)
            row_grad = chosen_rows_backward(grad[rows], x[rows], raw, w, normalize_prototypes)
            add_rows_(grad_w, slots[rows].flatten(), row_grad.flatten(0, 1))
    return grad_x, narrowed(grad_w, prototypes.dtype)
