"""negative_logsumexp in Triton.

With x_i a unit embedding (i < B), w_j a prototype (j < M), cos_ij = x_i . w_j and s the scale,

    h_ij = cos_ij where cos_ij <= tau_i, else a cos_ij + b + g cos_ij^2       (the hard-negative form, if there is one)
    n_i  = log sum over the negatives j of exp(s h_ij)                         (-inf if there are none)
    o_i  = dn_i/dx_i = s sum_j q_ij h'_ij w_j,   q_ij = exp(s h_ij - n_i)
    dL/dw_j = sum_i (dL/dn_i s q_ij h'_ij + [j is i's target] dL/dc_i) x_i,    c_i = cos at the target.

Forward, three launches. *Target*: each sample's target row is gathered and multiplied. *Stream*: a program holds R rows
of x and walks one split of the memory in tiles of C slots; per tile the logits are formed, turned into exponentials and
multiplied with the tile again: o is attention with keys = values = memory. *Reduction*: the splits are added in order.
Per tile C D entries of the memory are read and 4 R C D operations done (float32: three times as many of tf32; 16-bit:
6 R C D, see below). A call reads the memory once per row block, M D ceil(B / R) entries, of which all but the first
M D come from the L2 cache where the row blocks that share a split run side by side (they are neighbours in the grid);
the splits' sums are written and read, 8 S B D bytes. With one row block of 64, float32 sums and S = 128 splits that is
a tenth of the memory's bytes or less from M = 164,000 at 4 bytes, 328,000 at 2; below that it is a larger share, but no
more than 64 D KiB, which L2 holds on an H100 (32 MiB at D = 512).

Backward for the prototypes, one launch (two with 16-bit factors): class-stationary. A program holds C slots and walks
the batch in tiles of R; it forms the probabilities again from n, and its (C, D) sum is complete when it is written.
With ``negatives`` given, a program per sample gathers rows instead; their gradient goes through ``chosen_rows``.

Every sum has a fixed order, nothing is added by atomics, nothing is read back: the result is the same bits on the same
device. Exponents need no running maximum where a constant ``offset`` keeps them in range; otherwise rows keep their
maximum, and the splits are rescaled when they are added. Rows that are scaled to unit length first have their 1 / |w|
from a pass of its own (one more launch), which multiplies logits and exponentials instead of the rows.

16-bit memories are multiplied as they are stored. x, which is float32, is split into two 16-bit halves: the target's
kernel writes them, and the stream multiplies both at once, stacked as one factor of 2 R rows (M = 128 of wgmma and
tcgen05). What is left, up to 2^-18 of x in bfloat16, would make n wrong by s 2^-18, 2e-4 at s = 64; but as dn/dx = o
is there, its first-order share (x - halves) . o is added to n, and what remains is the square of that. So n keeps the
accuracy of float32, c is float32 throughout. Exponentials are rounded to 16 bits for the second product, as in flash
attention: o and dL/dw have a relative error near 2^-9 (2^-11). float16 would lose small exponentials: there a running
maximum brings them to 2^10 at most, and gradients of cosines are divided by their largest. That is why the sums are
never formed without o for 16-bit memories.

float64 is served everywhere, for checks. D is padded to a power of two; beyond 1024 it is only slow.

Source of the idea: online softmax and flash attention (Dao et al., arXiv 2205.14135, 2307.08691), with one key per
class; two-term splitting: Ozaki's scheme. The order of the work is this package's own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from protomem_kernels.backends.triton import autotune, interpreted, launch
from protomem_kernels.backends.triton.chosen_rows import chosen_rows_backward_
from protomem_kernels.backends.triton.cosines import inverse_lengths
from protomem_kernels.backends.triton.launch import Launch
from protomem_kernels.backends.triton.specimens import CENTRE, Specimen
from protomem_kernels.backends.triton.tiles import (
    LN_2,
    LOG2_E,
    dot,
    inverse_length,
    load_form,
    load_present,
    load_rows,
    load_slots,
    load_vector,
    narrow,
    reshape_hard,
    scalar,
    squares,
)

# 16-bit factors are x times this, so that the rest of x after rounding is no subnormal number of float16.
LIFT = tl.constexpr(256.0)


@triton.jit
def split_rows(x, halves_ptr, batch, rows, columns, keep, dim):
    """Write LIFT x as the sum of two 16-bit numbers, ``halves`` (2, B, D) contiguous."""
    dtype: tl.constexpr = halves_ptr.dtype.element_ty
    lifted = x * LIFT
    high = narrow(lifted, dtype)
    low = narrow(lifted - high.to(x.dtype), dtype)
    offsets = rows.to(tl.int64)[:, None] * dim + columns[None, :]
    mask = keep[:, None] & (columns < dim)[None, :]
    tl.store(halves_ptr + offsets, high, mask=mask)
    tl.store(halves_ptr + batch.to(tl.int64) * dim + offsets, low, mask=mask)


@triton.jit
def target_kernel(
    x_ptr,  # (B, D)
    prototypes_ptr,  # (M, D)
    targets_ptr,  # (B,)
    cosine_ptr,  # (B,)
    target_rows_ptr,  # (B, D) contiguous
    halves_ptr,  # (2, B, D) contiguous, or None: no 16-bit factors are wanted
    batch,
    capacity,
    dim,
    stride_x_row,
    stride_x_column,
    stride_w_row,
    stride_w_column,
    stride_target,
    NORMALIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Gather each sample's target row, and multiply: c and dc/dx; split x where the products want 16-bit factors."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_DIM)
    keep = rows < batch
    x = load_rows(x_ptr, rows, columns, stride_x_row, stride_x_column, keep, dim)
    targets = load_slots(targets_ptr, rows, stride_target, keep, capacity)
    w = load_rows(prototypes_ptr, targets, columns, stride_w_row, stride_w_column, targets >= 0, dim).to(x.dtype)
    if NORMALIZE:
        zero = tl.zeros((BLOCK_ROWS,), dtype=x.dtype)
        length_unit, squared = squares(w, zero, zero)
        w = w * inverse_length(length_unit, squared)[:, None]
    tl.store(cosine_ptr + rows, tl.sum(x * w, axis=1), mask=keep)
    offsets = rows.to(tl.int64)[:, None] * dim + columns[None, :]
    tl.store(target_rows_ptr + offsets, w, mask=keep[:, None] & (columns < dim)[None, :])
    if halves_ptr is not None:
        split_rows(x, halves_ptr, batch, rows, columns, keep, dim)


@triton.jit
def split_kernel(
    x_ptr,  # (B, D)
    halves_ptr,  # (2, B, D) contiguous
    batch,
    dim,
    stride_x_row,
    stride_x_column,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Split x into 16-bit factors."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_DIM)
    x = load_rows(x_ptr, rows, columns, stride_x_row, stride_x_column, rows < batch, dim)
    split_rows(x, halves_ptr, batch, rows, columns, rows < batch, dim)


@triton.jit
def stream_kernel(
    x_ptr,  # (B, D): the embeddings; with 16-bit factors (2, B, D): their halves, times LIFT
    prototypes_ptr,  # (M, D)
    targets_ptr,  # (B,)
    occupied_ptr,  # (M,), or None: all
    inverse_ptr,  # (M,) contiguous: 1 / |w_j|, if rows are scaled to unit length; else None
    threshold_ptr,  # (B,), or None: no hard-negative form
    coefficients_ptr,  # (3,)
    totals_ptr,  # (S, B) contiguous: each split's sum of exponentials
    maxima_ptr,  # (S, B) contiguous: the exponent of 2 taken out of it; None: ``offset`` is
    moments_ptr,  # (S, B, D) contiguous: the sum of exponentials times h' w; None: not wanted
    batch,
    capacity,
    dim,
    slots_per_split,
    scale: tl.float64,
    offset: tl.float64,
    stride_x_row,
    stride_x_column,
    stride_w_row,
    stride_w_column,
    stride_target,
    stride_occupied,
    stride_threshold,
    stride_coefficient,
    HALVES: tl.constexpr,  # whether x_ptr holds halves: 2, else 1
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Stream one split of the memory past one block of rows."""
    acc_dtype: tl.constexpr = totals_ptr.dtype.element_ty
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    RUNNING: tl.constexpr = maxima_ptr is not None
    WHOLE: tl.constexpr = BLOCK_DEPTH == BLOCK_DIM
    CHUNKS: tl.constexpr = 1 if moments_ptr is None else BLOCK_DIM // BLOCK_COLUMNS
    # float16 ends at 2^-24: exponentials are 2^10 at most instead of 1, which leaves room for h' up to 64.
    HEADROOM: tl.constexpr = 10.0 if dtype == tl.float16 else 0.0

    block = tl.program_id(0) // CHUNKS
    chunk = tl.program_id(0) % CHUNKS
    split = tl.program_id(1)
    rows = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    keep = rows < batch
    targets = load_slots(targets_ptr, rows, stride_target, keep, capacity)
    # Both halves of x in one factor: with the tile's rows doubled, one product of full height gives both.
    line = tl.arange(0, HALVES * BLOCK_ROWS)
    stacked = block * BLOCK_ROWS + line % BLOCK_ROWS
    stacked_keep = stacked < batch
    stacked += line // BLOCK_ROWS * batch
    depth = tl.arange(0, BLOCK_DEPTH)
    columns = chunk * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_twos = scalar(scale * LOG2_E, acc_dtype)
    to_scaled = in_twos / LIFT if HALVES == 2 else in_twos
    if threshold_ptr is not None:
        tau = in_twos * load_vector(threshold_ptr, rows, stride_threshold, keep).to(acc_dtype)
        a, b, g = load_form(coefficients_ptr, stride_coefficient, acc_dtype)

    total = tl.zeros((BLOCK_ROWS,), dtype=acc_dtype)
    maximum = tl.full((BLOCK_ROWS,), float("-inf"), dtype=acc_dtype)
    shift = scalar(offset * LOG2_E, acc_dtype)
    if moments_ptr is not None:
        moment = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=acc_dtype)
    if WHOLE:
        x = load_rows(x_ptr, stacked, depth, stride_x_row, stride_x_column, stacked_keep, dim)

    first = split * slots_per_split
    last = tl.minimum(first + slots_per_split, capacity)
    for start in range(first, last, BLOCK_SLOTS):
        slots = start + tl.arange(0, BLOCK_SLOTS)
        present = load_present(occupied_ptr, slots, stride_occupied, capacity)
        logits = tl.zeros((HALVES * BLOCK_ROWS, BLOCK_SLOTS), dtype=acc_dtype)
        if WHOLE:
            w = load_rows(prototypes_ptr, slots, depth, stride_w_row, stride_w_column, present, dim).to(dtype)
            logits = dot(x, tl.trans(w), logits)
        else:
            for k in range(0, BLOCK_DIM, BLOCK_DEPTH):
                part = k + depth
                x = load_rows(x_ptr, stacked, part, stride_x_row, stride_x_column, stacked_keep, dim)
                w = load_rows(prototypes_ptr, slots, part, stride_w_row, stride_w_column, present, dim).to(dtype)
                logits = dot(x, tl.trans(w), logits)
        if HALVES == 2:
            logits = tl.sum(logits.reshape(2, BLOCK_ROWS, BLOCK_SLOTS), axis=0)
        if inverse_ptr is not None:
            inverse = tl.load(inverse_ptr + slots, mask=present, other=0.0)
            y = logits * (inverse * to_scaled)[None, :]
        else:
            y = logits * to_scaled
        if threshold_ptr is not None:
            y, slope = reshape_hard(y, tau[:, None], a, b, g, in_twos)
        y = tl.where(present[None, :] & (slots[None, :] != targets[:, None]), y, float("-inf"))
        if RUNNING:
            if inverse_ptr is not None:  # in the moment stands e / |w|, which must not overflow either
                top = tl.max(y + tl.maximum(tl.log2(tl.where(inverse > 0, inverse, 1.0)), 0.0)[None, :], axis=1)
            else:
                top = tl.max(y, axis=1)
            top = tl.maximum(maximum, top)
            taken = tl.where(top == float("-inf"), 0.0, top)
            rescale = tl.exp2(maximum - taken)
            total = total * rescale
            if moments_ptr is not None:
                moment = moment * rescale[:, None]
            maximum = top
            e = tl.exp2(y - (taken - HEADROOM)[:, None])
        else:
            e = tl.exp2(y - shift)
        total += tl.sum(e, axis=1)
        if moments_ptr is not None:
            if threshold_ptr is not None:
                e = e * slope
            if inverse_ptr is not None:
                e = e * inverse[None, :]
            if WHOLE and CHUNKS == 1:
                values = w
            else:
                values = load_rows(prototypes_ptr, slots, columns, stride_w_row, stride_w_column, present, dim)
            moment = dot(narrow(e, dtype), values.to(dtype), moment)

    line = split.to(tl.int64) * batch + rows
    if chunk == 0:
        tl.store(totals_ptr + line, total, mask=keep)
        if RUNNING:
            tl.store(maxima_ptr + line, maximum - HEADROOM, mask=keep)
    if moments_ptr is not None:
        mask = keep[:, None] & (columns < dim)[None, :]
        tl.store(moments_ptr + line[:, None] * dim + columns[None, :], moment, mask=mask)


@triton.jit
def reduction_kernel(
    totals_ptr,  # (S, B) contiguous
    maxima_ptr,  # (S, B) contiguous, or None
    moments_ptr,  # (S, B, D) contiguous, or None
    n_ptr,  # (B,)
    o_ptr,  # (B, D) contiguous
    x_ptr,  # (B, D)
    halves_ptr,  # (2, B, D) contiguous, or None: no 16-bit factors
    batch,
    dim,
    splits,
    scale: tl.float64,
    offset: tl.float64,
    stride_x_row,
    stride_x_column,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Add the splits in order: n = log(sum) and o = s moment / sum."""
    acc_dtype: tl.constexpr = totals_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_DIM)
    keep = rows < batch
    mask = keep[:, None] & (columns < dim)[None, :]
    shift = tl.zeros((BLOCK_ROWS,), dtype=acc_dtype)
    if maxima_ptr is not None:
        maximum = tl.full((BLOCK_ROWS,), float("-inf"), dtype=acc_dtype)
        for split in range(splits):
            line = tl.cast(split, tl.int64) * batch + rows
            maximum = tl.maximum(maximum, tl.load(maxima_ptr + line, mask=keep, other=float("-inf")))
        shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.zeros((BLOCK_ROWS,), dtype=acc_dtype)
    moment = tl.zeros((BLOCK_ROWS, BLOCK_DIM), dtype=acc_dtype)
    for split in range(splits):
        line = tl.cast(split, tl.int64) * batch + rows
        weight = tl.full((BLOCK_ROWS,), 1.0, dtype=acc_dtype)
        if maxima_ptr is not None:
            weight = tl.exp2(tl.load(maxima_ptr + line, mask=keep, other=float("-inf")) - shift)
        total += weight * tl.load(totals_ptr + line, mask=keep, other=0.0)
        if moments_ptr is not None:
            part = tl.load(moments_ptr + line[:, None] * dim + columns[None, :], mask=mask, other=0.0)
            moment += weight[:, None] * part
    some = total != 0
    n = tl.where(some, tl.log(tl.where(some, total, 1.0)) + (shift * LN_2 + scalar(offset, acc_dtype)), float("-inf"))
    if moments_ptr is not None:
        o = moment * tl.where(some, scalar(scale, acc_dtype) / tl.where(some, total, 1.0), 0.0)[:, None]
        offsets = rows.to(tl.int64)[:, None] * dim + columns[None, :]
        tl.store(o_ptr + offsets, o, mask=mask)
        if halves_ptr is not None:  # what the halves leave of x, up to 2^-18 of it, counts to first order: dn/dx = o
            x = load_rows(x_ptr, rows, columns, stride_x_row, stride_x_column, keep, dim)
            high = tl.load(halves_ptr + offsets, mask=mask, other=0.0).to(acc_dtype)
            low = tl.load(halves_ptr + tl.cast(batch, tl.int64) * dim + offsets, mask=mask, other=0.0).to(acc_dtype)
            n += tl.sum((x - high / LIFT - low / LIFT) * o, axis=1)
    tl.store(n_ptr + rows, n, mask=keep)


@triton.jit
def gradient_kernel(
    grad_prototypes_ptr,  # (M, D) contiguous
    grad_cosine_ptr,  # (B,)
    grad_n_ptr,  # (B,)
    unit_ptr,  # (1,): with float16 factors, the largest of these gradients; else None
    x_ptr,  # (B, D): the embeddings; with 16-bit factors (2, B, D): their halves, times LIFT
    prototypes_ptr,  # (M, D)
    targets_ptr,  # (B,)
    occupied_ptr,  # (M,), or None: all
    present_ptr,  # (M,): occupied, or somebody's target; or None: all
    inverse_ptr,  # (M,) contiguous: 1 / |w_j|, if rows are scaled to unit length; else None
    threshold_ptr,  # (B,), or None: no hard-negative form
    coefficients_ptr,  # (3,)
    n_ptr,  # (B,)
    batch,
    capacity,
    dim,
    scale: tl.float64,
    stride_x_row,
    stride_x_column,
    stride_w_row,
    stride_w_column,
    stride_target,
    stride_occupied,
    stride_present,
    stride_threshold,
    stride_coefficient,
    HALVES: tl.constexpr,  # whether x_ptr holds halves: 2, else 1
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Stream the batch past one tile of slots, and write the gradient of these."""
    acc_dtype: tl.constexpr = n_ptr.dtype.element_ty
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    WHOLE: tl.constexpr = BLOCK_DEPTH == BLOCK_DIM
    CHUNKS: tl.constexpr = BLOCK_DIM // BLOCK_COLUMNS
    slots = tl.program_id(0) // CHUNKS * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
    inside = slots < capacity
    line = tl.arange(0, HALVES * BLOCK_ROWS)  # both halves of x in one factor
    depth = tl.arange(0, BLOCK_DEPTH)
    columns = tl.program_id(0) % CHUNKS * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    present = load_present(present_ptr, slots, stride_present, capacity)
    negative = load_present(occupied_ptr, slots, stride_occupied, capacity)
    scale = scalar(scale, acc_dtype)
    to_scaled = scale / LIFT if HALVES == 2 else scale
    if threshold_ptr is not None:
        a, b, g = load_form(coefficients_ptr, stride_coefficient, acc_dtype)
    # float16 ends at 2^-24: what it has to hold is scaled to 2^10 at most, which leaves room for h' up to 64.
    unit = scalar(1.0, acc_dtype)
    if unit_ptr is not None:
        unit = 1024.0 / tl.load(unit_ptr)

    if inverse_ptr is not None:
        inverse = tl.load(inverse_ptr + slots, mask=present, other=0.0)
        along = tl.zeros((BLOCK_SLOTS,), dtype=acc_dtype)
    if WHOLE:
        w = load_rows(prototypes_ptr, slots, depth, stride_w_row, stride_w_column, present, dim).to(dtype)
    grad = tl.zeros((BLOCK_SLOTS, BLOCK_COLUMNS), dtype=acc_dtype)
    for start in range(0, batch, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        keep = rows < batch
        stacked = start + line % BLOCK_ROWS
        stacked_keep = stacked < batch
        stacked += line // BLOCK_ROWS * batch
        logits = tl.zeros((BLOCK_SLOTS, HALVES * BLOCK_ROWS), dtype=acc_dtype)
        if WHOLE:
            x = load_rows(x_ptr, stacked, depth, stride_x_row, stride_x_column, stacked_keep, dim)
            logits = dot(w, tl.trans(x), logits)
        else:
            for k in range(0, BLOCK_DIM, BLOCK_DEPTH):
                part = k + depth
                x = load_rows(x_ptr, stacked, part, stride_x_row, stride_x_column, stacked_keep, dim)
                w = load_rows(prototypes_ptr, slots, part, stride_w_row, stride_w_column, present, dim).to(dtype)
                logits = dot(w, tl.trans(x), logits)
        if HALVES == 2:
            logits = tl.sum(logits.reshape(BLOCK_SLOTS, 2, BLOCK_ROWS), axis=1)
        if inverse_ptr is not None:
            y = logits * (inverse * to_scaled)[:, None]
            cosine = y
        else:
            y = logits * to_scaled
        if threshold_ptr is not None:
            tau = scale * load_vector(threshold_ptr, rows, stride_threshold, keep).to(acc_dtype)
            y, slope = reshape_hard(y, tau[None, :], a, b, g, scale)
        n = tl.load(n_ptr + rows, mask=keep, other=float("inf"))
        n = tl.where(n == float("-inf"), float("inf"), n)  # no negatives: no probability
        factor = scale * unit * tl.load(grad_n_ptr + rows, mask=keep, other=0.0)
        y = tl.where(negative[:, None], y, float("-inf"))  # before exp, which may overflow at a slot outside n
        # The difference first: it is exact where p is large, while s h log2(e), near 92, would be off by 4e-6.
        p = tl.exp2((y - n[None, :]) * LOG2_E) * factor[None, :]
        if threshold_ptr is not None:
            p = p * slope
        targets = load_slots(targets_ptr, rows, stride_target, keep, capacity)
        share = unit * tl.load(grad_cosine_ptr + rows, mask=keep, other=0.0)
        p = tl.where(slots[:, None] == targets[None, :], share[None, :], p)
        p = narrow(p, dtype)
        if inverse_ptr is not None:  # the gradient's part along the row is sum_i p_ij cos_ij
            along += tl.sum(p.to(acc_dtype) * cosine, axis=1)
        if WHOLE and CHUNKS == 1:
            values = x
        else:
            values = load_rows(x_ptr, stacked, columns, stride_x_row, stride_x_column, stacked_keep, dim)
        if HALVES == 2:
            p = tl.broadcast_to(p[:, None, :], (BLOCK_SLOTS, 2, BLOCK_ROWS)).reshape(BLOCK_SLOTS, 2 * BLOCK_ROWS)
        grad = dot(p, values, grad)
    if HALVES == 2:
        grad = grad / LIFT
    if inverse_ptr is not None:
        # (grad - c w) / |w|, c w the part along w. As grad / c - w, one more product of the tile, w need not
        # come into registers beside grad, and its factor, minus one, is exact in every dtype.
        c = along * inverse / scale
        c = tl.where(tl.abs(c) > 1e-30, c, 0.0)
        size = tl.where(c == 0, 1.0, c)
        if WHOLE and CHUNKS == 1:
            own = w
        else:
            own = load_rows(prototypes_ptr, slots, columns, stride_w_row, stride_w_column, present, dim).to(dtype)
        place = tl.arange(0, BLOCK_SLOTS)
        minus = tl.where((place[:, None] == place[None, :]) & (c != 0)[:, None], -1.0, 0.0).to(dtype)
        grad = dot(minus, own, grad / size[:, None]) * (size * inverse)[:, None]
    if unit_ptr is not None:
        grad = grad / unit
    out = narrow(grad, grad_prototypes_ptr.dtype.element_ty)
    offsets = slots.to(tl.int64)[:, None] * dim + columns[None, :]
    tl.store(grad_prototypes_ptr + offsets, out, mask=inside[:, None] & (columns < dim)[None, :])


@triton.jit
def load_chosen(negatives_ptr, row, index, stride_row, stride_column, count, target, capacity):
    """Return the slots of a sample that count as negatives; -1: none."""
    inside = index < count
    slots = load_slots(negatives_ptr + row.to(tl.int64) * stride_row, index, stride_column, inside, capacity)
    return tl.where(slots == target, -1, slots)


@triton.jit
def chosen_kernel(
    x_ptr,  # (B, D)
    prototypes_ptr,  # (M, D)
    targets_ptr,  # (B,)
    negatives_ptr,  # (B, K)
    threshold_ptr,  # (B,), or None: no hard-negative form
    coefficients_ptr,  # (3,)
    n_ptr,  # (B,): written in the forward pass, read in the backward pass
    o_ptr,  # (B, D) contiguous, or None: not wanted
    grad_cosine_ptr,  # (B,), or None: this is the forward pass
    grad_n_ptr,  # (B,)
    slots_ptr,  # (B, K + 1) contiguous int64: written in the backward pass, the sample's negatives and its target
    grads_ptr,  # (B, K + 1) contiguous: written in the backward pass, the gradients of their cosines
    capacity,
    dim,
    count,
    scale: tl.float64,
    stride_x_row,
    stride_x_column,
    stride_w_row,
    stride_w_column,
    stride_target,
    stride_negative_row,
    stride_negative_column,
    stride_threshold,
    stride_coefficient,
    NORMALIZE: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Meet one sample with its chosen negatives, gathered; sums with a running maximum, or gradients from n."""
    acc_dtype: tl.constexpr = n_ptr.dtype.element_ty
    FORWARD: tl.constexpr = grad_cosine_ptr is None
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK_DIM)
    x = load_rows(
        x_ptr, row + tl.arange(0, 1), columns, stride_x_row, stride_x_column, tl.full((1,), True, tl.int1), dim
    )
    target = tl.load(targets_ptr + row.to(tl.int64) * stride_target).to(tl.int64)
    target = tl.where((target >= 0) & (target < capacity), target, -1)
    scale = scalar(scale, acc_dtype)
    if threshold_ptr is not None:
        tau = scale * tl.load(threshold_ptr + row.to(tl.int64) * stride_threshold).to(acc_dtype)
        a, b, g = load_form(coefficients_ptr, stride_coefficient, acc_dtype)
    if FORWARD:
        total = scalar(0.0, acc_dtype)
        maximum = scalar(float("-inf"), acc_dtype)
        moment = tl.zeros((BLOCK_DIM,), dtype=acc_dtype)
    else:
        line = row.to(tl.int64) * (count + 1)
        n = tl.load(n_ptr + row)
        n = tl.where(n == float("-inf"), float("inf"), n)  # no negatives: no probability
        factor = scale * tl.load(grad_n_ptr + row)
        tl.store(slots_ptr + line + count, target)
        tl.store(grads_ptr + line + count, tl.load(grad_cosine_ptr + row))
    for start in range(0, count, BLOCK_SLOTS):
        index = start + tl.arange(0, BLOCK_SLOTS)
        slots = load_chosen(
            negatives_ptr, row, index, stride_negative_row, stride_negative_column, count, target, capacity
        )
        w = load_rows(prototypes_ptr, slots, columns, stride_w_row, stride_w_column, slots >= 0, dim).to(acc_dtype)
        if NORMALIZE:
            zero = tl.zeros((BLOCK_SLOTS,), dtype=acc_dtype)
            length_unit, squared = squares(w, zero, zero)
            w = w * inverse_length(length_unit, squared)[:, None]
        y = tl.sum(w * x, axis=1) * scale
        if threshold_ptr is not None:
            y, slope = reshape_hard(y, tau, a, b, g, scale)
        y = tl.where(slots >= 0, y, float("-inf"))
        if FORWARD:
            top = tl.maximum(maximum, tl.max(y, axis=0))
            shift = tl.where(top == float("-inf"), 0.0, top)
            rescale = tl.exp2((maximum - shift) * LOG2_E)
            e = tl.exp2((y - shift) * LOG2_E)
            total = total * rescale + tl.sum(e, axis=0)
            maximum = top
            if o_ptr is not None:
                if threshold_ptr is not None:
                    e = e * slope
                moment = moment * rescale + tl.sum(e[:, None] * w, axis=0)
        else:
            p = tl.exp2((y - n) * LOG2_E) * factor
            if threshold_ptr is not None:
                p = p * slope
            tl.store(slots_ptr + line + index, slots, mask=index < count)
            tl.store(grads_ptr + line + index, p, mask=index < count)
    if FORWARD:
        some = total != 0
        tl.store(n_ptr + row, tl.where(some, tl.log(tl.where(some, total, 1.0)) + maximum, float("-inf")))
        if o_ptr is not None:
            factor = tl.where(some, scale / tl.where(some, total, 1.0), 0.0)
            tl.store(o_ptr + row.to(tl.int64) * dim + columns, moment * factor, mask=columns < dim)


def _stride(tensor: Tensor | None) -> int:
    """Return the stride of a vector; without one, any number will do."""
    return 1 if tensor is None else tensor.stride(0)


def _halves(x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return memory for 16-bit halves (2, B, D) of ``x``, or None where products take ``x`` as it is."""
    return None if dtype in (torch.float32, torch.float64) else x.new_empty(2, *x.shape, dtype=dtype)


def _rows_per_program(dim: int) -> int:
    """Return how many rows of ``dim`` columns one program of the small kernels takes."""
    return 64 if interpreted() else max(1, 2048 // launch.padded(dim))


def negative_logsumexp(
    x: Tensor,
    prototypes: Tensor,
    targets: Tensor,
    occupied: Tensor | None,
    negatives: Tensor | None,
    threshold: Tensor | None,
    coefficients: Tensor | None,
    scale: float,
    offset: float | None,
    normalize_prototypes: bool,
    with_gradient: bool,
    kept_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return c (B,), n (B,), the target rows dc/dx (B, D), o = dn/dx (B, D; empty without ``with_gradient``), nothing.

    Nothing is kept for backward, whatever ``kept_rows`` allows.
    """
    (batch, dim), capacity = x.shape, prototypes.shape[0]
    cosine, n = x.new_empty(batch), x.new_empty(batch)
    target_rows = x.new_empty(batch, dim)
    dtype = launch.compute_dtype(x, prototypes)
    halves = _halves(x, dtype) if negatives is None else None
    with_moment = with_gradient or halves is not None  # n is corrected by it
    o = x.new_empty(batch, dim) if with_moment else x.new_empty(0, 0)
    kept = prototypes.new_empty(0, 0)
    if batch == 0:
        return cosine, n, target_rows, o if with_gradient else x.new_empty(0, 0), kept
    rows = _rows_per_program(dim)
    target_kernel[(triton.cdiv(batch, rows),)](
        x,
        prototypes,
        targets,
        cosine,
        target_rows,
        halves,
        batch,
        capacity,
        dim,
        *x.stride(),
        *prototypes.stride(),
        targets.stride(0),
        NORMALIZE=normalize_prototypes,
        BLOCK_ROWS=rows,
        BLOCK_DIM=launch.padded(dim),
        enable_fp_fusion=True,
    )
    if negatives is not None:
        _launch_chosen(
            x,
            prototypes,
            targets,
            negatives,
            threshold,
            coefficients,
            scale,
            normalize_prototypes,
            n=n,
            o=o if with_gradient else None,
        )
        return cosine, n, target_rows, o, kept

    running = offset is None or normalize_prototypes or dtype == torch.float16
    inverse = inverse_lengths(prototypes, x.dtype) if normalize_prototypes else None
    factor = x if halves is None else halves

    def stream(how: Launch) -> tuple[int, Tensor, Tensor | None, Tensor | None]:
        """Launch the stream; return the number of splits and what they wrote."""
        chunks = launch.padded(dim) // how.columns if with_moment else 1
        blocks = triton.cdiv(batch, how.rows)
        splits, per_split = launch.split(capacity, how.slots, blocks * chunks, launch.processors(x.device))
        totals = x.new_empty(splits, batch)
        maxima = x.new_empty(splits, batch) if running else None
        moments = x.new_empty(splits, batch, dim) if with_moment else None
        stream_kernel[(blocks * chunks, splits)](
            factor,
            prototypes,
            targets,
            occupied,
            inverse,
            threshold,
            coefficients,
            totals,
            maxima,
            moments,
            batch,
            capacity,
            dim,
            per_split,
            scale,
            0.0 if running or offset is None else offset,
            *factor.stride()[-2:],
            *prototypes.stride(),
            targets.stride(0),
            _stride(occupied),
            _stride(threshold),
            _stride(coefficients),
            HALVES=1 if halves is None else 2,
            **how.blocks(),
            BLOCK_DIM=launch.padded(dim),
            **how.options(),
        )
        return splits, totals, maxima, moments

    kind = "stream with moment" if with_moment else "stream"
    splits, totals, maxima, moments = stream(autotune.best(kind, x.device, dtype, dim, stream))
    rows = launch.reduced_rows(dim)
    reduction_kernel[(triton.cdiv(batch, rows),)](
        totals,
        maxima,
        moments,
        n,
        o,
        x,
        halves,
        batch,
        dim,
        splits,
        scale,
        0.0 if running or offset is None else offset,
        *x.stride(),
        BLOCK_ROWS=rows,
        BLOCK_DIM=launch.padded(dim) if with_moment else 1,
        enable_fp_fusion=True,
    )
    return cosine, n, target_rows, o if with_gradient else x.new_empty(0, 0), kept


def _launch_chosen(
    x: Tensor,
    prototypes: Tensor,
    targets: Tensor,
    negatives: Tensor,
    threshold: Tensor | None,
    coefficients: Tensor | None,
    scale: float,
    normalize: bool,
    *,
    n: Tensor,
    o: Tensor | None = None,
    grad_cosine: Tensor | None = None,
    grad_n: Tensor | None = None,
    slots: Tensor | None = None,
    grads: Tensor | None = None,
) -> None:
    """Launch ``chosen_kernel``: forward (n, o) or, given gradients, backward (slots, grads)."""
    dim = x.shape[1]
    chosen_kernel[(x.shape[0],)](
        x,
        prototypes,
        targets,
        negatives,
        threshold,
        coefficients,
        n,
        o,
        grad_cosine,
        grad_n,
        slots,
        grads,
        prototypes.shape[0],
        dim,
        negatives.shape[1],
        scale,
        *x.stride(),
        *prototypes.stride(),
        targets.stride(0),
        *negatives.stride(),
        _stride(threshold),
        _stride(coefficients),
        NORMALIZE=normalize,
        BLOCK_SLOTS=launch.gathered_slots(dim),
        BLOCK_DIM=launch.padded(dim),
        enable_fp_fusion=True,
    )


def negative_logsumexp_backward_(
    grad_prototypes: Tensor,
    grad_cosine: Tensor,
    grad_n: Tensor,
    x: Tensor,
    prototypes: Tensor,
    targets: Tensor,
    occupied: Tensor | None,
    negatives: Tensor | None,
    threshold: Tensor | None,
    coefficients: Tensor | None,
    n: Tensor,
    scale: float,
    offset: float | None,
    normalize_prototypes: bool,
    kept_rows: int,
) -> None:
    """Write dL/dw into all of ``grad_prototypes`` (M, D); probabilities are formed again from n."""
    (batch, dim), capacity = x.shape, prototypes.shape[0]
    if grad_prototypes.numel() == 0:
        return
    grad_cosine, grad_n, n = grad_cosine.contiguous(), grad_n.contiguous(), n.contiguous()
    if negatives is not None:
        slots = torch.empty(batch, negatives.shape[1] + 1, dtype=torch.int64, device=x.device)
        grads = x.new_empty(slots.shape)
        if batch:
            _launch_chosen(
                x,
                prototypes,
                targets,
                negatives,
                threshold,
                coefficients,
                scale,
                normalize_prototypes,
                n=n,
                grad_cosine=grad_cosine,
                grad_n=grad_n,
                slots=slots,
                grads=grads,
            )
        chosen_rows_backward_(grad_prototypes, grads, slots, x, prototypes, normalize_prototypes)
        return

    dtype = launch.compute_dtype(x, prototypes)
    halves = _halves(x, dtype)
    if halves is not None and batch:
        rows = _rows_per_program(dim)
        split_kernel[(triton.cdiv(batch, rows),)](
            x,
            halves,
            batch,
            dim,
            *x.stride(),
            BLOCK_ROWS=rows,
            BLOCK_DIM=launch.padded(dim),
            enable_fp_fusion=True,
        )
    unit = None
    if dtype == torch.float16 and batch:
        unit = torch.maximum(scale * grad_n.abs().amax(), grad_cosine.abs().amax()).clamp(min=1e-30)
    present = occupied
    if occupied is not None and normalize_prototypes:  # a target is present whatever `occupied` says
        inside = (targets >= 0) & (targets < capacity)
        padded = torch.cat([occupied, occupied.new_zeros(1)])
        present = padded.index_fill(0, torch.where(inside, targets, capacity).long(), True)
    inverse = inverse_lengths(prototypes, x.dtype) if normalize_prototypes else None
    factor = x if halves is None else halves

    def write(how: Launch) -> None:
        """Launch the kernel that writes the gradient."""
        chunks = launch.padded(dim) // how.columns
        gradient_kernel[(triton.cdiv(capacity, how.slots) * chunks,)](
            grad_prototypes,
            grad_cosine,
            grad_n,
            unit,
            factor,
            prototypes,
            targets,
            occupied,
            present,
            inverse,
            threshold,
            coefficients,
            n,
            batch,
            capacity,
            dim,
            scale,
            *factor.stride()[-2:],
            *prototypes.stride(),
            _stride(targets),
            _stride(occupied),
            _stride(present),
            _stride(threshold),
            _stride(coefficients),
            HALVES=1 if halves is None else 2,
            **how.blocks(),
            BLOCK_DIM=launch.padded(dim),
            **how.options(),
        )

    write(autotune.best("gradient of slots", x.device, dtype, dim, write))


_OPTIONS = {"plain": (), "occupied": ("occupied",), "every option": ("occupied", "hard", "normalize", "running")}


def specimens(arch: int, dtype: torch.dtype, dim: int) -> list[Specimen]:
    """Describe the kernels for the compile tests and the static report, for a memory of ``dtype``."""
    found = _small_specimens(dtype, dim)
    for name, options in _OPTIONS.items():
        for kind in ("stream", "stream with moment", "gradient of slots"):
            if kind != "stream" or _is_wide(dtype):
                how = launch.choose(kind, arch, dtype, dim)
                found.append(large_specimen(kind, dtype, dim, how, f"{kind}, {name}", options))
    return found


def _is_wide(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.float64)


def _fill(kernel: object, types: dict[str, str], constants: dict[str, object]) -> dict[str, object]:
    """Return the fields of a specimen that say what is compiled; whatever is not named is None, or a stride of 1."""
    names: list[str] = kernel.arg_names  # type: ignore[attr-defined]
    signature = {name: types.get(name, "constexpr") for name in names}
    fixed = {name: constants.get(name, 1 if "stride" in name else None) for name in names if name not in types}
    aligned = [n for n, t in types.items() if t.startswith("*") or n in ("dim", "stride_x_row", "stride_w_row")]
    return {"kernel": kernel, "signature": signature, "constexprs": fixed, "aligned": tuple(aligned)}


def large_specimen(
    kind: str, dtype: torch.dtype, dim: int, how: Launch, name: str, options: tuple[str, ...]
) -> Specimen:
    """Describe one of the two matrix-bound kernels as launched with ``how``."""
    stored, acc = launch.triton_type(dtype), launch.triton_type(launch.accumulation(dtype))
    halves, block_dim = 1 if _is_wide(dtype) else 2, launch.padded(dim)
    types = {"x_ptr": f"*{stored}", "prototypes_ptr": f"*{stored}", "targets_ptr": "*i64"}
    if "occupied" in options:
        types["occupied_ptr"] = "*i1"
    if "hard" in options:
        types |= {"threshold_ptr": f"*{acc}", "coefficients_ptr": f"*{acc}"}
    types |= dict.fromkeys(["batch", "capacity", "dim", "stride_x_row", "stride_w_row"], "i32") | {"scale": "fp64"}
    products, moment = halves, kind != "stream"
    if kind == "gradient of slots":
        kernel = gradient_kernel
        types |= {"grad_prototypes_ptr": f"*{stored}"}
        types |= dict.fromkeys(["grad_cosine_ptr", "grad_n_ptr", "n_ptr"], f"*{acc}")
        if dtype == torch.float16:
            types["unit_ptr"] = f"*{acc}"
        if "occupied" in options:
            types["present_ptr"] = "*i1"
    else:
        kernel = stream_kernel
        types |= {"totals_ptr": f"*{acc}", "slots_per_split": "i32", "offset": "fp64"}
        if "running" in options or dtype == torch.float16:
            types["maxima_ptr"] = f"*{acc}"
        if moment:
            types["moments_ptr"] = f"*{acc}"
    if "normalize" in options:
        types["inverse_ptr"] = f"*{acc}"
    constants = {"HALVES": halves, "BLOCK_DIM": block_dim, **how.blocks()}
    chunks = block_dim // how.columns if moment else 1
    batch, capacity = CENTRE
    streamed = how.slots if kernel is stream_kernel else how.rows * halves
    emulated = 3 if dtype == torch.float32 else 1  # products of tf32 that stand for one of float32
    per_tile = 2 * how.rows * how.slots * emulated * (products * block_dim + moment * how.columns)
    vectors = 4 * batch * launch.accumulation(dtype).itemsize
    least = (capacity * dim * (2 if kernel is gradient_kernel else 1) + 2 * batch * dim) * dtype.itemsize + vectors
    return Specimen(
        name=name,
        **_fill(kernel, types, constants),  # type: ignore[arg-type]
        warps=how.warps,
        stages=how.stages,
        matrix_bound=True,
        bytes_per_tile=streamed * dim * dtype.itemsize,
        operations_per_tile=per_tile,
        tiles=triton.cdiv(batch, how.rows) * triton.cdiv(capacity, how.slots) * chunks,
        least_bytes=least,
    )


def _small_specimens(dtype: torch.dtype, dim: int) -> list[Specimen]:
    """Describe the kernels around the matrix-bound ones."""
    stored, acc = launch.triton_type(dtype), launch.triton_type(launch.accumulation(dtype))
    rows, block_dim = _rows_per_program(dim), launch.padded(dim)
    x = {"x_ptr": f"*{acc}", "batch": "i32", "dim": "i32", "stride_x_row": "i32"}
    memory = {"prototypes_ptr": f"*{stored}", "targets_ptr": "*i64", "capacity": "i32", "stride_w_row": "i32"}
    halves = {} if _is_wide(dtype) else {"halves_ptr": f"*{stored}"}
    block = {"NORMALIZE": True, "BLOCK_ROWS": rows, "BLOCK_DIM": block_dim}
    described = {
        "target": (
            target_kernel,
            x | memory | halves | {"cosine_ptr": f"*{acc}", "target_rows_ptr": f"*{acc}"},
            block,
        ),
        "reduction": (
            reduction_kernel,
            x
            | halves
            | dict.fromkeys(["totals_ptr", "maxima_ptr", "moments_ptr", "n_ptr", "o_ptr"], f"*{acc}")
            | {"splits": "i32", "scale": "fp64", "offset": "fp64"},
            block | {"BLOCK_ROWS": launch.reduced_rows(dim)},
        ),
    }
    if halves:
        described["split"] = split_kernel, x | halves, block
    chosen = {name: kind for name, kind in (x | memory).items() if name != "batch"}
    chosen |= {"negatives_ptr": "*i64", "count": "i32", "scale": "fp64", "stride_negative_row": "i32"}
    chosen |= dict.fromkeys(["threshold_ptr", "coefficients_ptr", "n_ptr"], f"*{acc}")
    block = {"NORMALIZE": True, "BLOCK_SLOTS": launch.gathered_slots(dim), "BLOCK_DIM": block_dim}
    described["chosen"] = chosen_kernel, chosen | {"o_ptr": f"*{acc}"}, block
    backward = {"slots_ptr": "*i64"} | dict.fromkeys(["grad_cosine_ptr", "grad_n_ptr", "grads_ptr"], f"*{acc}")
    described["chosen, backward"] = chosen_kernel, chosen | backward, block
    return [
        Specimen(name=name, **_fill(kernel, types, constants), warps=4, stages=3)  # type: ignore[arg-type]
        for name, (kernel, types, constants) in described.items()
    ]
