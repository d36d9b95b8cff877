"""hardest_negatives on a GPU: the exact k largest cosines of each sample to the memory, no B x M logits.

With cos_ij = x_i . w_j over the negatives j of row i (occupied, not the target; a NaN counts as -inf) and the memory
cut into T = ceil(M / 128) tiles of 128 slots:

1. ``_tile_maxima_kernel`` streams the memory once and stores one maximum per (row, tile): 4 B M / 128 bytes.
2. ``keep_largest`` picks each row's k best tiles, equal maxima in favour of the lower tile.
3. ``_candidates_kernel`` forms the cosines of the chosen (row, tile) pairs again. Pairs are sorted by tile, so that
   rows that chose the same tile share its prototypes and the product runs on the tensor cores.
4. ``keep_largest`` picks the k best of each row's 128 k candidates, equal cosines in favour of the lower slot.

**Why k tiles are enough, ties included.** Order the negatives of a row by (cosine descending, slot ascending), and its
tiles by (maximum descending, tile ascending). A tile's first negative has the tile's maximum as its cosine. If tile s
stands before tile t, the first negative of s stands before the first negative of t: its cosine is larger, or equal and
its slot lower, as slots ascend with tiles. Were a tile t with k tiles before it to hold one of the k first negatives,
its first negative would be one of them too, with k others before it: a contradiction.

**Rounding.** Steps 1 and 3 call the same ``cosines`` with the same depth, hence add the same products in the same
order: a cosine is a function of the two rows alone, and equal prototypes tie in both steps. The result is read from
step 3 only. Were a compiler to order the additions of the two kernels differently, by an error d per cosine, cosines
would still be right to d, and only negatives within 2 d of the k-th could change places at the edge of the list.

Per tile of step 1, with R = BLOCK_ROWS samples: 128 D prototype entries are read from memory, R D of x from the L2
cache, 256 R D operations done and 4 R bytes written. Step 3 forms at most T + B k / R products of that size. Extra
memory: the maxima and the candidates, both cut by rows to ``SCRATCH_BYTES``, and sorting space of the same order. No
value is read back to the host, shapes alone decide the launches, no atomics: deterministic.

Backward touches the B k chosen rows only: dL/dx_i = sum of dL/dcos w_j over i's slots, one program per row; dL/dw is
``chosen_rows.py``. Deterministic, no atomics.

Idea of the two levels: maxima per block as in approximate top-k for TPUs (Chern et al., arXiv 2206.14286), exact here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from protomem_kernels.backends.triton.chosen_rows import chosen_rows_backward_
from protomem_kernels.backends.triton.cosines import cosines, inverse_lengths
from protomem_kernels.backends.triton.launch import Launch, architecture, choose, compute_dtype, padded
from protomem_kernels.backends.triton.tiles import inverse_length, load_present, load_rows, load_slots, squares

TILE = 128  # slots that share one maximum
TILE_SLOTS = tl.constexpr(TILE)
SCRATCH_BYTES = 32 << 20  # of maxima, and of candidates, at a time
NONE = tl.constexpr(float("-inf"))


@triton.jit
def _negatives(
    x_ptr,
    rows,
    rows_kept,
    prototypes_ptr,
    first,
    targets,
    occupied_ptr,
    inverse_ptr,
    capacity,
    dim,
    stride_x_row,
    stride_x_column,
    stride_w_row,
    stride_w_column,
    stride_occupied,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """Return the cosines (R, C) of ``rows`` to the slots from ``first`` on, -inf at all that is no negative."""
    lanes = tl.arange(0, BLOCK_SLOTS)
    slots = first + lanes
    present = load_present(occupied_ptr, slots, stride_occupied, capacity)
    values = cosines(
        x_ptr,
        rows,
        stride_x_row,
        stride_x_column,
        rows_kept,
        prototypes_ptr,
        slots,
        stride_w_row,
        stride_w_column,
        present,
        dim,
        BLOCK_DEPTH,
    )
    if inverse_ptr is not None:
        values *= tl.load(inverse_ptr + slots, mask=present, other=0.0)[None, :]
    at_target = tl.where((targets >= first) & (targets < first + BLOCK_SLOTS), targets - first, -1).to(tl.int32)
    negative = present[None, :] & (lanes[None, :] != at_target[:, None])
    return tl.where(negative & (values == values), values, NONE)


@triton.jit
def _tile_maxima_kernel(
    maxima_ptr,
    x_ptr,
    prototypes_ptr,
    targets_ptr,
    occupied_ptr,
    inverse_ptr,
    batch,
    capacity,
    dim,
    tiles,
    stride_x_row,
    stride_x_column,
    stride_w_row,
    stride_w_column,
    stride_targets,
    stride_occupied,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """Write the largest cosine of each row to the negatives of each tile: ``maxima`` (batch, tiles)."""
    blocks = tl.cdiv(batch, BLOCK_ROWS)
    tile = tl.program_id(0) // blocks  # neighbours share a tile, so that it comes from the L2 cache
    rows = tl.program_id(0) % blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    rows_kept = rows < batch
    targets = load_slots(targets_ptr, rows, stride_targets, rows_kept, capacity)
    values = _negatives(
        x_ptr,
        rows,
        rows_kept,
        prototypes_ptr,
        tile.to(tl.int64) * TILE_SLOTS,
        targets,
        occupied_ptr,
        inverse_ptr,
        capacity,
        dim,
        stride_x_row,
        stride_x_column,
        stride_w_row,
        stride_w_column,
        stride_occupied,
        TILE_SLOTS,
        BLOCK_DEPTH,
    )
    tl.store(maxima_ptr + rows.to(tl.int64) * tiles + tile, tl.max(values, axis=1), mask=rows_kept)


@triton.jit
def _candidates_kernel(
    candidates_ptr,
    pairs_ptr,
    pair_tiles_ptr,
    x_ptr,
    prototypes_ptr,
    targets_ptr,
    occupied_ptr,
    inverse_ptr,
    count,
    chosen,
    capacity,
    dim,
    stride_x_row,
    stride_x_column,
    stride_w_row,
    stride_w_column,
    stride_targets,
    stride_occupied,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """Write the cosines of (row, tile) pairs, sorted by tile, to ``candidates`` (rows, chosen, 128).

    Pair p stands for row p // chosen. A program takes BLOCK_ROWS pairs and goes through the tiles they name.
    """
    at = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    kept = at < count
    pairs = tl.load(pairs_ptr + at, mask=kept, other=0).to(tl.int32)
    rows = pairs // chosen
    targets = load_slots(targets_ptr, rows, stride_targets, kept, capacity)
    tiles = tl.load(pair_tiles_ptr + at, mask=kept, other=0x7FFFFFFF)
    offsets = pairs.to(tl.int64)[:, None] * TILE_SLOTS + tl.arange(0, BLOCK_SLOTS)[None, :]
    tile = tl.min(tiles, axis=0)
    while tile < 0x7FFFFFFF:
        here = tiles == tile
        for part in range(0, TILE_SLOTS, BLOCK_SLOTS):
            values = _negatives(
                x_ptr,
                rows,
                here,
                prototypes_ptr,
                tile.to(tl.int64) * TILE_SLOTS + part,
                targets,
                occupied_ptr,
                inverse_ptr,
                capacity,
                dim,
                stride_x_row,
                stride_x_column,
                stride_w_row,
                stride_w_column,
                stride_occupied,
                BLOCK_SLOTS,
                BLOCK_DEPTH,
            )
            tl.store(candidates_ptr + offsets + part, values, mask=here[:, None])
        tile = tl.min(tl.where(tiles > tile, tiles, 0x7FFFFFFF), axis=0)


@triton.jit
def _keep_largest_kernel(columns_ptr, values_ptr, bar_ptr, room_ptr, width, k, BLOCK: tl.constexpr):
    """Write the columns of each row's k largest of ``width`` values, ascending.

    ``bar`` is the k-th largest value: all above it are kept, and of those that equal it the first ``room``.
    """
    row = tl.program_id(0).to(tl.int64)
    bar = tl.load(bar_ptr + row)
    room = tl.load(room_ptr + row).to(tl.int32)
    tied_before = room * 0
    kept_before = room * 0
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        values = tl.load(values_ptr + row * width + columns, mask=columns < width, other=NONE)
        tied = (values == bar).to(tl.int32)  # past the end too if the bar is -inf, but by then there is no room left
        fits = (tied != 0) & (tied_before + tl.cumsum(tied, axis=0) <= room)
        kept = ((values > bar) | fits).to(tl.int32)
        place = kept_before + tl.cumsum(kept, axis=0) - 1
        tl.store(columns_ptr + row * k + place, columns.to(tl.int64), mask=kept != 0)
        tied_before += tl.sum(tied, axis=0)
        kept_before += tl.sum(kept, axis=0)


@triton.jit
def _embeddings_gradient_kernel(
    grad_x_ptr,
    grad_ptr,
    prototypes_ptr,
    slots_ptr,
    k,
    capacity,
    dim,
    stride_grad_row,
    stride_grad_column,
    stride_slots_row,
    stride_slots_column,
    stride_w_row,
    stride_w_column,
    NORMALIZE: tl.constexpr,
    BLOCK_CHOSEN: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Write dL/dx_i = sum over i's slots of dL/dcos w_slot: one row a program, BLOCK_CHOSEN slots at a time."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_COLUMNS)
    acc = tl.zeros([BLOCK_COLUMNS], grad_x_ptr.dtype.element_ty)
    for first in range(0, k, BLOCK_CHOSEN):
        at = first + tl.arange(0, BLOCK_CHOSEN)
        slots = load_slots(slots_ptr + row * stride_slots_row, at, stride_slots_column, at < k, capacity)
        kept = slots >= 0
        grad = tl.load(grad_ptr + row * stride_grad_row + at.to(tl.int64) * stride_grad_column, mask=kept, other=0.0)
        w = load_rows(prototypes_ptr, slots, columns, stride_w_row, stride_w_column, kept, dim)
        w = w.to(acc.dtype)
        if NORMALIZE:
            largest, total = squares(w, tl.zeros([BLOCK_CHOSEN], acc.dtype), tl.zeros([BLOCK_CHOSEN], acc.dtype))
            w *= inverse_length(largest, total)[:, None]
        acc += tl.sum(grad.to(acc.dtype)[:, None] * w, axis=0)
    tl.store(grad_x_ptr + row * dim + columns, acc, mask=columns < dim)


def keep_largest(values: Tensor, k: int) -> Tensor:
    """Return the columns (B, k) of each row's k largest values, ascending; ties to the earlier column.

    Args:
        values: (B, N) contiguous, without NaN; N below 2^31.
        k: 1 <= k <= N.
    """
    top = values.topk(k, dim=1, sorted=False).values  # which columns it takes among equal ones is not defined
    bar = top.amin(dim=1, keepdim=True)
    room = (top == bar).sum(dim=1, dtype=torch.int32)
    columns = torch.empty(top.shape, dtype=torch.int64, device=values.device)
    how = choose("largest", architecture(values.device), values.dtype, values.shape[1])
    _keep_largest_kernel[(values.shape[0],)](
        columns, values, bar, room, values.shape[1], k, BLOCK=how.slots, **how.options()
    )
    return columns


class Memory(NamedTuple):
    """What both passes over the memory have in common."""

    prototypes: Tensor
    occupied: Tensor | None
    inverse: Tensor | None

    def launch(self, kind: str, x: Tensor) -> Launch:
        """Return the launch parameters."""
        return choose(kind, architecture(x.device), compute_dtype(x, self.prototypes), x.shape[1])

    def strides(self, x: Tensor, targets: Tensor) -> tuple[int, ...]:
        """Return the strides in the order of the kernels' arguments."""
        occupied = 0 if self.occupied is None else self.occupied.stride(0)
        return (*x.stride(), *self.prototypes.stride(), targets.stride(0), occupied)


def _best_tiles(x: Tensor, targets: Tensor, memory: Memory, chosen: int) -> Tensor:
    """Return the ``chosen`` best tiles of each row (B, chosen), ascending."""
    prototypes, occupied, inverse = memory
    launch = memory.launch("cosines", x)
    batch, (capacity, dim) = x.shape[0], prototypes.shape
    tiles = triton.cdiv(capacity, TILE)
    if chosen == tiles:
        return torch.arange(tiles, device=x.device).expand(batch, -1)
    maxima = x.new_empty(batch, tiles)
    _tile_maxima_kernel[(tiles * triton.cdiv(batch, launch.rows),)](
        maxima,
        x,
        prototypes,
        targets,
        occupied,
        inverse,
        batch,
        capacity,
        dim,
        tiles,
        *memory.strides(x, targets),
        BLOCK_ROWS=launch.rows,
        BLOCK_DEPTH=launch.depth,
        **launch.options(),
    )
    return keep_largest(maxima, chosen)


def _candidates(x: Tensor, targets: Tensor, memory: Memory, best: Tensor) -> Tensor:
    """Return the cosines of each row to all slots of its ``best`` tiles: (B, 128 chosen), in the order of the slots."""
    prototypes, occupied, inverse = memory
    launch = memory.launch("gathered cosines", x)
    chosen = best.shape[1]
    pair_tiles, pairs = best.flatten().to(torch.int32).sort(stable=True)
    candidates = x.new_empty(x.shape[0], chosen * TILE)
    _candidates_kernel[(triton.cdiv(pairs.shape[0], launch.rows),)](
        candidates,
        pairs,
        pair_tiles,
        x,
        prototypes,
        targets,
        occupied,
        inverse,
        pairs.shape[0],
        chosen,
        *prototypes.shape,
        *memory.strides(x, targets),
        BLOCK_ROWS=launch.rows,
        BLOCK_SLOTS=launch.slots,
        BLOCK_DEPTH=launch.depth,
        **launch.options(),
    )
    return candidates


def hardest_negatives(
    x: Tensor, prototypes: Tensor, targets: Tensor, occupied: Tensor | None, k: int, normalize_prototypes: bool
) -> tuple[Tensor, Tensor]:
    """Return cosines (B, k), descending, ties to the lower slot, and slots (B, k); (-inf, -1) where there are fewer.

    Arguments and returns are those of ``reference.hardest_negatives``.
    """
    return hardest_of(_best_tiles, x, prototypes, targets, occupied, k, normalize_prototypes)


def hardest_of(
    best_tiles: Callable[[Tensor, Tensor, Memory, int], Tensor],
    x: Tensor,
    prototypes: Tensor,
    targets: Tensor,
    occupied: Tensor | None,
    k: int,
    normalize_prototypes: bool,
) -> tuple[Tensor, Tensor]:
    """Return what ``hardest_negatives`` does, the best tiles of each row (B, chosen) found by a function of its own.

    ``best_tiles`` is given x, targets, the memory and how many to choose, and returns them ascending.
    """
    batch, capacity = x.shape[0], prototypes.shape[0]
    cosines = x.new_full((batch, k), float("-inf"))
    slots = torch.full((batch, k), -1, dtype=torch.int64, device=x.device)
    found = min(k, capacity)
    if batch == 0 or found == 0:
        return _without_broken(x, cosines, slots)
    tiles = triton.cdiv(capacity, TILE)
    chosen = min(k, tiles)
    inverse = inverse_lengths(prototypes, x.dtype) if normalize_prototypes else None
    memory = Memory(prototypes, occupied, inverse)
    for rows in _cut(batch, tiles):
        best = best_tiles(x[rows], targets[rows], memory, chosen)
        for part in _cut(best.shape[0], chosen * TILE):
            here = slice(rows.start + part.start, rows.start + part.stop)
            values = _candidates(x[here], targets[here], memory, best[part])
            columns = keep_largest(values, found)
            values, order = values.gather(1, columns).sort(dim=1, descending=True, stable=True)
            columns = columns.gather(1, order)
            cosines[here, :found] = values
            slots[here, :found] = best[part].gather(1, columns // TILE) * TILE + columns % TILE
    return _without_broken(x, cosines, torch.where(cosines == float("-inf"), -1, slots))


def _without_broken(x: Tensor, cosines: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    broken = ~torch.isfinite(x).all(dim=1, keepdim=True)
    return torch.where(broken, float("nan"), cosines), torch.where(broken, -1, slots)


def _cut(rows: int, width: int) -> list[slice]:
    """Cut ``rows`` rows of ``width`` float32 so that each piece stays within ``SCRATCH_BYTES``; at least 64 a piece."""
    step = max(64, SCRATCH_BYTES // (4 * width))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def hardest_negatives_backward(
    grad: Tensor, x: Tensor, prototypes: Tensor, slots: Tensor, normalize_prototypes: bool, need_prototypes: bool
) -> tuple[Tensor, Tensor]:
    """Return dL/dx (B, D) and dL/dw (M, D; empty unless needed): only the B k rows that were chosen take part.

    Arguments and returns are those of ``reference.hardest_negatives_backward``.
    """
    (batch, dim), k = x.shape, slots.shape[1]
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if batch > 0:
        how = choose("gradient of embeddings", architecture(x.device), prototypes.dtype, dim)
        _embeddings_gradient_kernel[(batch,)](
            grad_x,
            grad,
            prototypes,
            slots,
            k,
            prototypes.shape[0],
            dim,
            *grad.stride(),
            *slots.stride(),
            *prototypes.stride(),
            NORMALIZE=normalize_prototypes,
            BLOCK_CHOSEN=how.slots,
            BLOCK_COLUMNS=padded(dim),
            **how.options(),
        )
    if not need_prototypes:
        return grad_x, prototypes.new_empty(0, 0)
    grad_prototypes = torch.empty_like(prototypes, memory_format=torch.contiguous_format)
    inside = torch.where(slots < prototypes.shape[0], slots, -1)
    chosen_rows_backward_(grad_prototypes, grad, inside, x, prototypes, normalize_prototypes)
    return grad_x, grad_prototypes
