"""margin_softmax_logits by chunks: forward GEMM and one kernel that writes logits; backward one kernel and two GEMMs.

The mathematics is that of ``triton/margin_softmax_logits.py``. Forward, the products of a chunk lie in L2 until they
are reshaped and written once; a cosine is the sum of as many products as ``backends.precision`` says. Backward, with
H_ij = s G_ij h'_ij (0 at targets and empty slots), dL/dx += H W and dL/dw = H^T x for each chunk; the cosines are
formed again only where slopes h' ask for them. Beside a bfloat16 memory H and x are rounded to bfloat16 in these
products, as in mixed precision training; a float16 memory is converted to float32, for the range of gradients.

Per logit 4 PARTS bytes go through L2 and 4 out forward, 4 in and 2 or 4 through L2 backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from protomem_kernels.backends import precision
from protomem_kernels.backends.chunked import products
from protomem_kernels.backends.chunked.products import add_product_, cut, factor_of, logits_of, part_of, present_rows
from protomem_kernels.backends.chunked.weights import load_logits
from protomem_kernels.backends.triton import launch
from protomem_kernels.backends.triton.cosines import inverse_lengths
from protomem_kernels.backends.triton.logsumexp_chosen import stride
from protomem_kernels.backends.triton.margin_softmax_logits import at_targets, through_normalisation
from protomem_kernels.backends.triton.tiles import (
    load_form,
    load_present,
    load_slots,
    load_vector,
    narrow,
    reshape_hard,
    scalar,
)
from protomem_kernels.rows import narrowed


@triton.jit
def scaled_cosines(
    logits_ptr,
    rows,
    keep,
    lanes,
    present,
    inverse_ptr,
    threshold_ptr,
    coefficients_ptr,
    width,
    batch,
    s,
    to_scaled,
    stride_threshold,
    stride_coefficient,
    PARTS: tl.constexpr,
):
    """Return s h and h' (R, C) of products (PARTS, batch, width)."""
    y = load_logits(logits_ptr, rows, keep, lanes, width, batch, PARTS) * to_scaled
    if inverse_ptr is not None:
        y *= tl.load(inverse_ptr + lanes, mask=present, other=0.0)[None, :]
    slope = tl.full(y.shape, 1.0, y.dtype)
    if threshold_ptr is not None:
        tau = s * load_vector(threshold_ptr, rows, stride_threshold, keep).to(y.dtype)
        a, b, g = load_form(coefficients_ptr, stride_coefficient, y.dtype)
        y, slope = reshape_hard(y, tau[:, None], a, b, g, s)
    return y, slope


@triton.jit
def finish_kernel(
    out_ptr,  # (B, M) contiguous, at the chunk's first logit
    logits_ptr,  # (PARTS, batch, width) contiguous: cosines times ``lift``
    targets_ptr,  # (batch,)
    target_logits_ptr,  # (batch,)
    occupied_ptr,  # (width,), or None: all
    inverse_ptr,  # (width,) contiguous: 1 / |w_j|, if rows are scaled to unit length; else None
    threshold_ptr,  # (batch,), or None: no hard-negative form
    coefficients_ptr,  # (3,)
    first,
    width,
    batch,
    capacity,
    scale: tl.float64,
    lift: tl.float64,
    stride_target,
    stride_target_logit,
    stride_occupied,
    stride_threshold,
    stride_coefficient,
    PARTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    """Write one tile of the logits."""
    acc_dtype: tl.constexpr = out_ptr.dtype.element_ty
    blocks = tl.cdiv(batch, BLOCK_ROWS)
    rows = tl.program_id(0) % blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    lanes = tl.program_id(0) // blocks * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
    keep = rows < batch
    targets = load_slots(targets_ptr, rows, stride_target, keep, capacity)
    present = load_present(occupied_ptr, lanes, stride_occupied, width)
    values, _ = scaled_cosines(
        logits_ptr,
        rows,
        keep,
        lanes,
        present,
        inverse_ptr,
        threshold_ptr,
        coefficients_ptr,
        width,
        batch,
        scalar(scale, acc_dtype),
        scalar(scale / lift, acc_dtype),
        stride_threshold,
        stride_coefficient,
        PARTS,
    )
    values = tl.where(present[None, :], values, float("-inf"))
    at_target = load_vector(target_logits_ptr, rows, stride_target_logit, keep).to(acc_dtype)
    slots = tl.cast(first, tl.int64) + lanes
    values = tl.where(slots[None, :] == targets[:, None], at_target[:, None], values)
    offsets = rows.to(tl.int64)[:, None] * capacity + lanes[None, :]
    tl.store(out_ptr + offsets, values, mask=keep[:, None] & (lanes < width)[None, :])


@triton.jit
def gradients_kernel(
    weights_ptr,  # (batch, width) contiguous: H
    grad_ptr,  # (batch, width)
    logits_ptr,  # (PARTS, batch, width) contiguous: cosines times ``lift``; None: there is no form, hence no slope
    targets_ptr,  # (batch,)
    occupied_ptr,  # (width,), or None: all
    inverse_ptr,  # (width,) contiguous: 1 / |w_j|, if rows are scaled to unit length; else None
    threshold_ptr,  # (batch,), or None like ``logits``
    coefficients_ptr,  # (3,)
    first,
    width,
    batch,
    capacity,
    scale: tl.float64,
    lift: tl.float64,
    stride_grad_row,
    stride_grad_column,
    stride_target,
    stride_occupied,
    stride_threshold,
    stride_coefficient,
    PARTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    """Turn gradients of logits into those of cosines; with lengths, nothing of 1 / |w_j| is in them."""
    acc_dtype: tl.constexpr = grad_ptr.dtype.element_ty
    blocks = tl.cdiv(batch, BLOCK_ROWS)
    rows = tl.program_id(0) % blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    lanes = tl.program_id(0) // blocks * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
    keep = rows < batch
    targets = load_slots(targets_ptr, rows, stride_target, keep, capacity)
    present = load_present(occupied_ptr, lanes, stride_occupied, width)
    s = scalar(scale, acc_dtype)
    slots = tl.cast(first, tl.int64) + lanes
    wanted = keep[:, None] & present[None, :] & (slots[None, :] != targets[:, None])
    offsets = rows.to(tl.int64)[:, None] * stride_grad_row + lanes.to(tl.int64)[None, :] * stride_grad_column
    h = tl.load(grad_ptr + offsets, mask=wanted, other=0.0) * s
    if logits_ptr is not None:
        _, slope = scaled_cosines(
            logits_ptr,
            rows,
            keep,
            lanes,
            present,
            inverse_ptr,
            threshold_ptr,
            coefficients_ptr,
            width,
            batch,
            s,
            scalar(scale / lift, acc_dtype),
            stride_threshold,
            stride_coefficient,
            PARTS,
        )
        h = tl.where(wanted, h * slope, 0.0)
    at = rows.to(tl.int64)[:, None] * width + lanes[None, :]
    tl.store(weights_ptr + at, narrow(h, weights_ptr.dtype.element_ty), mask=keep[:, None] & (lanes < width)[None, :])


def _launch(x: Tensor, prototypes: Tensor) -> launch.Launch:
    dtype = launch.compute_dtype(x, prototypes)
    return launch.choose("chunk", launch.architecture(x.device), dtype, x.shape[1])


def margin_softmax_logits(
    x: Tensor,
    prototypes: Tensor,
    targets: Tensor,
    target_logits: Tensor,
    occupied: Tensor | None,
    threshold: Tensor | None,
    coefficients: Tensor | None,
    scale: float,
    normalize_prototypes: bool,
) -> Tensor:
    """Return the logits (B, M) in the dtype of ``x``; ``target_logits`` (B,) go to the targets as they are.

    Arguments and returns are those of ``reference.margin_softmax_logits``.
    """
    (batch, dim), capacity = x.shape, len(prototypes)
    out = x.new_empty(batch, capacity)
    if out.numel() == 0:
        return out
    if threshold is None or coefficients is None:
        threshold = coefficients = None
    dtype = launch.compute_dtype(x, prototypes)
    factor, lift = factor_of(x, prototypes, precision.parts(dtype))
    inverse = inverse_lengths(prototypes, x.dtype) if normalize_prototypes else None
    most, size = min(batch, products.ROWS), x.element_size()
    step = products.slots_of_chunk(x.device, most, capacity, (len(factor) + 1) * size, 2 * dim * dtype.itemsize)
    logits = x.new_empty(len(factor) * most * min(step, capacity))
    how = _launch(x, prototypes)
    with precision.held_by_cublas():
        for here in cut(capacity, step):
            rows = prototypes[here].to(dtype)  # what stands in an empty slot touches its own column alone
            for block in cut(batch, products.ROWS):
                height = block.stop - block.start
                finish_kernel[(triton.cdiv(height, how.rows) * triton.cdiv(len(rows), how.slots),)](
                    out[block, here],
                    logits_of(factor[:, block], rows, logits),
                    targets[block],
                    target_logits[block],
                    part_of(occupied, here),
                    part_of(inverse, here),
                    part_of(threshold, block),
                    coefficients,
                    here.start,
                    len(rows),
                    height,
                    capacity,
                    scale,
                    lift,
                    targets.stride(0),
                    target_logits.stride(0),
                    stride(occupied),
                    stride(threshold),
                    stride(coefficients),
                    PARTS=len(factor),
                    BLOCK_ROWS=how.rows,
                    BLOCK_SLOTS=how.slots,
                    **how.options(),
                )
    return out


def margin_softmax_logits_backward(
    grad: Tensor,
    x: Tensor,
    prototypes: Tensor,
    targets: Tensor,
    occupied: Tensor | None,
    threshold: Tensor | None,
    coefficients: Tensor | None,
    scale: float,
    normalize_prototypes: bool,
    need_prototypes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``x`` (B, D), ``prototypes`` (M, D; empty unless needed) and ``target_logits`` (B,).

    Arguments and returns are those of ``reference.margin_softmax_logits_backward``.
    """
    (batch, dim), capacity = x.shape, len(prototypes)
    grad_x = torch.zeros_like(x, memory_format=torch.contiguous_format)
    grad_prototypes = (
        torch.empty_like(prototypes, memory_format=torch.contiguous_format) if need_prototypes else x.new_empty(0, 0)
    )
    if batch == 0 or capacity == 0:
        return grad_x, grad_prototypes.zero_(), x.new_zeros(batch)
    stored = launch.compute_dtype(x, prototypes)
    dtype = torch.bfloat16 if stored == torch.bfloat16 else x.dtype  # of the factors of gradients
    has_form = threshold is not None and coefficients is not None
    factor, lift = factor_of(x, prototypes, precision.parts(stored)) if has_form else (x[None], 1.0)
    inverse = inverse_lengths(prototypes, x.dtype) if normalize_prototypes else None
    # A broken embedding passes nothing on: the prototypes' gradient belongs to all samples.
    alive = torch.isfinite(x).all(dim=1, keepdim=True)
    samples = torch.where(alive, x, 0).to(dtype)
    most, size = min(batch, products.ROWS), x.element_size()
    per_slot = dim * (stored.itemsize + 2 * dtype.itemsize + size)
    step = products.slots_of_chunk(x.device, most, capacity, len(factor) * size + dtype.itemsize, per_slot)
    step = min(step, capacity)
    logits = x.new_empty(len(factor) * most * step if has_form else 0)
    weights = x.new_empty(most * step, dtype=dtype)
    grad_of_chunk = x.new_empty(step, dim) if need_prototypes else None
    how = _launch(x, prototypes)
    with precision.held_by_cublas():
        for here in cut(capacity, step):
            present, lengths = part_of(occupied, here), part_of(inverse, here)
            rows = present_rows(prototypes[here], present, stored)
            values = rows if lengths is None else rows * lengths.nan_to_num()[:, None]
            values = values.to(dtype)
            grad_w = None if grad_of_chunk is None else grad_of_chunk[: len(rows)].zero_()
            for block in cut(batch, products.ROWS):
                height = block.stop - block.start
                h = weights[: height * len(rows)].view(height, len(rows))
                gradients_kernel[(triton.cdiv(height, how.rows) * triton.cdiv(len(rows), how.slots),)](
                    h,
                    grad[block, here],
                    logits_of(factor[:, block], rows, logits) if has_form else None,
                    targets[block],
                    present,
                    lengths,
                    part_of(threshold, block) if has_form else None,
                    coefficients if has_form else None,
                    here.start,
                    len(rows),
                    height,
                    capacity,
                    scale,
                    lift,
                    *grad.stride(),
                    targets.stride(0),
                    stride(occupied),
                    stride(threshold),
                    stride(coefficients),
                    PARTS=len(factor),
                    BLOCK_ROWS=how.rows,
                    BLOCK_SLOTS=how.slots,
                    **how.options(),
                )
                add_product_(grad_x[block], h, values)
                if grad_w is not None:
                    sound = torch.where(alive[block], h, 0)
                    add_product_(grad_w, sound.T, samples[block])
            if grad_w is None:
                continue
            into = grad_prototypes[here]
            if lengths is None:
                into.copy_(narrowed(grad_w, into.dtype))
            else:
                through_normalisation(into, grad_w, prototypes[here], lengths, present)
    return grad_x, grad_prototypes, at_targets(grad, targets)
