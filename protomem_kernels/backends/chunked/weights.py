"""The kernels between the two products of a chunk: logits become weights.

With the logits x_i . w_j of a chunk (b samples by C slots, the sum of PARTS products each), the exponents s h_ij and
the slopes h'_ij of ``backends/reference/negative_logsumexp.py``:

- forward, the weights e^{s h_ij - shift} h'_ij of the memory's rows, and the row sums of e^{s h_ij - shift}. A program
  takes a few samples through all of the chunk, so that a sample's sum (and maximum, where no constant shift keeps
  exponents in range: its logits are then read twice) is complete when it ends. The sums so far come from one vector
  and go to another: nothing that a launch stores is loaded in it.
- backward, the weights dL/dn_i s q_ij h'_ij, and dL/dc_i at the target, of the samples.

Read are 4 PARTS bytes per logit, written as many as a weight has: 2 beside a 16-bit memory. Most of it lies in the L2
cache, where the products before put it and the product after finds it. Every sum has a fixed order: deterministic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from protomem_kernels.backends.triton.tiles import (
    LOG2_E,
    load_form,
    load_present,
    load_slots,
    load_vector,
    narrow,
    reshape_hard,
    scalar,
)


@triton.jit
def load_logits(logits_ptr, rows, keep, lanes, width, batch, PARTS: tl.constexpr):
    """Return the sum (R, C) of the parts of logits (PARTS, batch, width), the smallest added first."""
    offsets = rows.to(tl.int64)[:, None] * width + lanes[None, :]
    mask = keep[:, None] & (lanes < width)[None, :]
    part_size = tl.cast(batch, tl.int64) * width
    total = tl.load(logits_ptr + part_size * (PARTS - 1) + offsets, mask=mask, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(logits_ptr + part_size * (PARTS - 1 - part) + offsets, mask=mask, other=0.0)
    return total


@triton.jit
def exponents(
    logits_ptr,
    targets,
    rows,
    keep,
    lanes,
    occupied_ptr,
    inverse_ptr,
    threshold_ptr,
    coefficients_ptr,
    first,
    width,
    batch,
    unit,
    to_unit,
    stride_occupied,
    stride_threshold,
    stride_coefficient,
    PARTS: tl.constexpr,
):
    """Return s h in the unit (R, C), -inf at all that is no negative, h', 1 / |w_j| (C,) and s cos in the unit.

    ``unit`` is s, or s log2(e) where exponents are of 2; ``to_unit`` what a logit is multiplied by.
    """
    y = load_logits(logits_ptr, rows, keep, lanes, width, batch, PARTS) * to_unit
    present = load_present(occupied_ptr, lanes, stride_occupied, width)
    inverse = tl.full(lanes.shape, 1.0, y.dtype)
    if inverse_ptr is not None:
        inverse = tl.load(inverse_ptr + lanes, mask=present, other=0.0)
        y = y * inverse[None, :]
    slope = tl.full(y.shape, 1.0, y.dtype)
    if threshold_ptr is not None:
        tau = unit * load_vector(threshold_ptr, rows, stride_threshold, keep).to(y.dtype)
        a, b, g = load_form(coefficients_ptr, stride_coefficient, y.dtype)
        y, slope = reshape_hard(y, tau[:, None], a, b, g, unit)
    slots = tl.cast(first, tl.int64) + lanes
    y = tl.where(present[None, :] & (slots[None, :] != targets[:, None]), y, float("-inf"))
    return y, slope, inverse


@triton.jit
def weights_kernel(
    weights_ptr,  # (b, C) contiguous: e h' / |w_j|; None: the sums alone are wanted
    logits_ptr,  # (PARTS, b, C) contiguous
    targets_ptr,  # (b,)
    occupied_ptr,  # (C,), or None: all
    inverse_ptr,  # (C,) contiguous: 1 / |w_j|, if rows are scaled to unit length; else None
    threshold_ptr,  # (b,), or None: no hard-negative form
    coefficients_ptr,  # (3,)
    totals_ptr,  # (b,) contiguous: each sample's sum of exponentials over the chunks before
    new_totals_ptr,  # (b,): with this one
    maxima_ptr,  # (b,) contiguous: the exponent of 2 taken out of it; None: ``offset`` is
    new_maxima_ptr,  # (b,)
    rescale_ptr,  # (b,): what sums over the chunks before are multiplied by; None likewise
    first,  # slot of the chunk
    width,  # C
    batch,  # b
    capacity,
    scale: tl.float64,
    lift: tl.float64,  # how much larger than cosines the logits are
    offset: tl.float64,
    stride_target,
    stride_occupied,
    stride_threshold,
    stride_coefficient,
    PARTS: tl.constexpr,
    HEADROOM: tl.constexpr,  # powers of 2 that exponentials may reach under a running maximum
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    """Turn the logits of a few samples into weights, and add up their exponentials."""
    acc_dtype: tl.constexpr = totals_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    keep = rows < batch
    targets = load_slots(targets_ptr, rows, stride_target, keep, capacity)
    unit = scalar(scale * LOG2_E, acc_dtype)
    to_unit = scalar(scale * LOG2_E / lift, acc_dtype)
    taken = tl.full((BLOCK_ROWS,), 0.0, acc_dtype) + scalar(offset * LOG2_E, acc_dtype)
    total = tl.load(totals_ptr + rows, mask=keep, other=0.0)
    if maxima_ptr is not None:
        before = tl.load(maxima_ptr + rows, mask=keep, other=float("-inf"))
        top = before + HEADROOM
        for start in range(0, width, BLOCK_SLOTS):
            lanes = start + tl.arange(0, BLOCK_SLOTS)
            y, _, inverse = exponents(
                logits_ptr,
                targets,
                rows,
                keep,
                lanes,
                occupied_ptr,
                inverse_ptr,
                threshold_ptr,
                coefficients_ptr,
                first,
                width,
                batch,
                unit,
                to_unit,
                stride_occupied,
                stride_threshold,
                stride_coefficient,
                PARTS,
            )
            if inverse_ptr is not None:  # among the weights stands e / |w|, which must not overflow either
                y += tl.maximum(tl.log2(tl.where(inverse > 0, inverse, 1.0)), 0.0)[None, :]
            top = tl.maximum(top, tl.max(y, axis=1))
        taken = tl.where(top == float("-inf"), 0.0, top) - HEADROOM
        rescale = tl.exp2(before - taken)
        total = total * rescale
        tl.store(rescale_ptr + rows, rescale, mask=keep)
        tl.store(new_maxima_ptr + rows, tl.where(top == float("-inf"), top, taken), mask=keep)
    for start in range(0, width, BLOCK_SLOTS):
        lanes = start + tl.arange(0, BLOCK_SLOTS)
        y, slope, inverse = exponents(
            logits_ptr,
            targets,
            rows,
            keep,
            lanes,
            occupied_ptr,
            inverse_ptr,
            threshold_ptr,
            coefficients_ptr,
            first,
            width,
            batch,
            unit,
            to_unit,
            stride_occupied,
            stride_threshold,
            stride_coefficient,
            PARTS,
        )
        e = tl.exp2(y - taken[:, None])
        total += tl.sum(e, axis=1)
        if weights_ptr is not None:
            offsets = rows.to(tl.int64)[:, None] * width + lanes[None, :]
            mask = keep[:, None] & (lanes < width)[None, :]
            weight = narrow(e * slope * inverse[None, :], weights_ptr.dtype.element_ty)
            tl.store(weights_ptr + offsets, weight, mask=mask)
    tl.store(new_totals_ptr + rows, total, mask=keep)


@triton.jit
def probabilities_kernel(
    weights_ptr,  # (b, C) contiguous: dL/dcos times ``size``
    logits_ptr,  # (PARTS, b, C) contiguous
    targets_ptr,  # (b,)
    occupied_ptr,  # (C,), or None: all
    inverse_ptr,  # (C,) contiguous: 1 / |w_j|, if rows are scaled to unit length; else None
    threshold_ptr,  # (b,), or None: no hard-negative form
    coefficients_ptr,  # (3,)
    n_ptr,  # (b,) contiguous
    grad_n_ptr,  # (b,) contiguous
    grad_cosine_ptr,  # (b,) contiguous
    unit_ptr,  # (1,): with float16 weights, the largest of these gradients; else None
    first,
    width,
    batch,
    capacity,
    scale: tl.float64,
    lift: tl.float64,
    stride_target,
    stride_occupied,
    stride_threshold,
    stride_coefficient,
    PARTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    """Turn the logits of a tile into the weights of the samples in the gradient of the prototypes."""
    acc_dtype: tl.constexpr = n_ptr.dtype.element_ty
    blocks = tl.cdiv(batch, BLOCK_ROWS)
    rows = tl.program_id(0) % blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    lanes = tl.program_id(0) // blocks * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
    keep = rows < batch
    targets = load_slots(targets_ptr, rows, stride_target, keep, capacity)
    unit = scalar(scale, acc_dtype)
    # float16 ends at 2^-24: what it has to hold is scaled to 2^10 at most, which leaves room for h' up to 64.
    size = scalar(1.0, acc_dtype)
    if unit_ptr is not None:
        size = 1024.0 / tl.load(unit_ptr)
    y, slope, _ = exponents(
        logits_ptr,
        targets,
        rows,
        keep,
        lanes,
        occupied_ptr,
        inverse_ptr,
        threshold_ptr,
        coefficients_ptr,
        first,
        width,
        batch,
        unit,
        scalar(scale / lift, acc_dtype),
        stride_occupied,
        stride_threshold,
        stride_coefficient,
        PARTS,
    )
    n = tl.load(n_ptr + rows, mask=keep, other=float("inf"))
    n = tl.where(n == float("-inf"), float("inf"), n)  # no negatives: no probability
    factor = unit * size * tl.load(grad_n_ptr + rows, mask=keep, other=0.0)
    # The difference first: it is exact where p is large, while s h log2(e), near 92, would be off by 4e-6.
    p = tl.exp2((y - n[:, None]) * LOG2_E) * factor[:, None] * slope
    share = size * tl.load(grad_cosine_ptr + rows, mask=keep, other=0.0)
    slots = tl.cast(first, tl.int64) + lanes
    p = tl.where(slots[None, :] == targets[:, None], share[:, None], p)
    offsets = rows.to(tl.int64)[:, None] * width + lanes[None, :]
    mask = keep[:, None] & (lanes < width)[None, :]
    tl.store(weights_ptr + offsets, narrow(p, weights_ptr.dtype.element_ty), mask=mask)
