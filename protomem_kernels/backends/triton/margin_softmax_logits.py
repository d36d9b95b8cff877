"""margin_softmax_logits on a GPU: the (B, M) logits themselves.

Column j of sample i holds z_i at i's target (given), s h_ij at a negative, -inf at an empty slot. With y = s cos_ij:
s h = y where cos_ij <= tau_i, else the hard-negative form a y + s b + (g / s) y^2 with slope h' (``reshape_hard``).

Forward: one product per tile of R samples by C slots, reshaped in registers and written once. Per tile C D prototype
entries are read from memory, R D of x from the L2 cache, 2 R C D operations done, 4 R C bytes written. Cosines are
exact to float32 (``cosines.py``).

Backward, with G = dL/dlogits and H_ij = s G_ij h'_ij (0 at targets and empty slots):

    dL/dx_i = sum_j H_ij w_j        dL/dw_j = sum_i H_ij x_i        dL/dz_i = G at the target.

- Two plain products, 2 B M D operations each; H is made of G while it is loaded. For dL/dx a program owns R samples by
  some columns and one part of the memory, and the parts are added in order. For dL/dw it owns C slots by some columns
  and goes through all samples (class-stationary).
- Slopes h' need the cosines again, 2 B M D operations more. Only where there is a form, the memory is taken in chunks
  and H of a chunk is written out for both products: ``SCRATCH_BYTES`` at most.
- Gradient of normalisation, u = w / |w|: (g - (g . u) u) / |w| for the finished row g, which stays in float32 until
  then; one more pass over dL/dw.
- With a bfloat16 memory the factors of these products are rounded to bfloat16, as in mixed precision training, and
  accumulated in float32. A float16 memory is converted to float32: its range is too small for gradients. Cosines are
  never rounded, so that a slope belongs to the logit that was written.

Parts and chunks depend on shapes and the device alone, and nothing is added with atomics: deterministic. No value is
read back to the host. A broken (non-finite) embedding passes nothing to the prototypes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from protomem_kernels.backends.triton.cosines import cosines, inverse_lengths, weigh
from protomem_kernels.backends.triton.launch import architecture, choose, compute_dtype, padded, processors, split
from protomem_kernels.backends.triton.tiles import (
    at_least_one,
    dot,
    load_present,
    load_rows,
    load_slots,
    narrow,
    narrow_gradient,
    reshape_hard,
    scalar,
)

SCRATCH_BYTES = 64 << 20  # of H, and of unfinished gradients, at a time


@triton.jit
def _scaled_cosines(
    x_ptr,
    rows,
    rows_kept,
    prototypes_ptr,
    slots,
    present,
    inverse_ptr,
    dim,
    s,
    stride_x_row,
    stride_x_column,
    stride_w_row,
    stride_w_column,
    BLOCK_DEPTH: tl.constexpr,
):
    """Return y = s cos (R, C)."""
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
    return values * s


@triton.jit
def _reshape(values, threshold_ptr, coefficients_ptr, rows, rows_kept, stride_threshold, stride_coefficients, s):
    """Return s h and h' (R, C) for y = s cos ``values``."""
    tau = tl.load(threshold_ptr + rows.to(tl.int64) * stride_threshold, mask=rows_kept, other=0.0).to(values.dtype) * s
    a = tl.load(coefficients_ptr).to(values.dtype)
    b = tl.load(coefficients_ptr + stride_coefficients).to(values.dtype)
    g = tl.load(coefficients_ptr + stride_coefficients + stride_coefficients).to(values.dtype)
    return reshape_hard(values, tau[:, None], a, b, g, s)


@triton.jit
def _logits_kernel(
    logits_ptr,
    x_ptr,
    prototypes_ptr,
    targets_ptr,
    target_logits_ptr,
    occupied_ptr,
    inverse_ptr,
    threshold_ptr,
    coefficients_ptr,
    batch,
    capacity,
    dim,
    scale: tl.float64,
    stride_x_row,
    stride_x_column,
    stride_w_row,
    stride_w_column,
    stride_targets,
    stride_target_logits,
    stride_occupied,
    stride_threshold,
    stride_coefficients,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """Write one tile of the logits (batch, capacity), which are contiguous."""
    blocks = tl.cdiv(batch, BLOCK_ROWS)  # neighbours share prototypes, so that they come from the L2 cache
    slots = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
    rows = tl.program_id(0) % blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    rows_kept = rows < batch
    present = load_present(occupied_ptr, slots, stride_occupied, capacity)
    s = scalar(scale, x_ptr.dtype.element_ty)
    values = _scaled_cosines(
        x_ptr,
        rows,
        rows_kept,
        prototypes_ptr,
        slots,
        present,
        inverse_ptr,
        dim,
        s,
        stride_x_row,
        stride_x_column,
        stride_w_row,
        stride_w_column,
        BLOCK_DEPTH,
    )
    if threshold_ptr is not None:
        values, _ = _reshape(
            values, threshold_ptr, coefficients_ptr, rows, rows_kept, stride_threshold, stride_coefficients, s
        )
    values = tl.where(present[None, :], values, float("-inf"))
    targets = load_slots(targets_ptr, rows, stride_targets, rows_kept, capacity)
    at_target = tl.load(target_logits_ptr + rows.to(tl.int64) * stride_target_logits, mask=rows_kept, other=0.0)
    values = tl.where(slots[None, :] == targets[:, None], at_target.to(values.dtype)[:, None], values)
    offsets = rows.to(tl.int64)[:, None] * capacity + slots[None, :]
    tl.store(logits_ptr + offsets, values, mask=rows_kept[:, None] & (slots < capacity)[None, :])


@triton.jit
def _slopes_kernel(
    h_ptr,
    grad_ptr,
    x_ptr,
    prototypes_ptr,
    inverse_ptr,
    threshold_ptr,
    coefficients_ptr,
    batch,
    width,
    dim,
    scale: tl.float64,
    stride_grad_row,
    stride_grad_column,
    stride_x_row,
    stride_x_column,
    stride_w_row,
    stride_w_column,
    stride_threshold,
    stride_coefficients,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """Write one tile of G h' (batch, width), contiguous: targets and empty slots are left to whoever reads it."""
    blocks = tl.cdiv(batch, BLOCK_ROWS)
    slots = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
    rows = tl.program_id(0) % blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    rows_kept = rows < batch
    inside = slots < width
    s = scalar(scale, x_ptr.dtype.element_ty)
    values = _scaled_cosines(
        x_ptr,
        rows,
        rows_kept,
        prototypes_ptr,
        slots,
        inside,
        inverse_ptr,
        dim,
        s,
        stride_x_row,
        stride_x_column,
        stride_w_row,
        stride_w_column,
        BLOCK_DEPTH,
    )
    _, slope = _reshape(
        values, threshold_ptr, coefficients_ptr, rows, rows_kept, stride_threshold, stride_coefficients, s
    )
    mask = rows_kept[:, None] & inside[None, :]
    offsets = rows.to(tl.int64)[:, None] * stride_grad_row + slots[None, :] * stride_grad_column
    g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(slope.dtype)
    tl.store(h_ptr + rows.to(tl.int64)[:, None] * width + slots[None, :], g * slope, mask=mask)


@triton.jit
def _load_h(h_ptr, rows, rows_kept, stride_row, slots, present, stride_column, targets, first, s):
    """Return H (R, C): s times what is stored, 0 at ``targets`` (less ``first``, the first slot of the chunk)."""
    wanted = rows_kept[:, None] & present[None, :] & (slots[None, :] + first != targets[:, None])
    offsets = rows.to(tl.int64)[:, None] * stride_row + slots[None, :] * stride_column
    return tl.load(h_ptr + offsets, mask=wanted, other=0.0).to(s.dtype) * s


@triton.jit
def _embeddings_gradient_kernel(
    partial_ptr,
    h_ptr,
    prototypes_ptr,
    targets_ptr,
    occupied_ptr,
    inverse_ptr,
    batch,
    first,
    width,
    capacity,
    dim,
    part,
    scale: tl.float64,
    stride_h_row,
    stride_h_column,
    stride_w_row,
    stride_w_column,
    stride_targets,
    stride_occupied,
    CONTINUES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """Add H W over ``part`` slots of a chunk to ``partial`` (parts, batch, dim), or let it begin it."""
    acc_dtype: tl.constexpr = partial_ptr.dtype.element_ty
    across = tl.cdiv(dim, BLOCK_COLUMNS)  # neighbours share H
    blocks = tl.cdiv(batch, BLOCK_ROWS)
    columns = tl.program_id(0) % across * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    rows = tl.program_id(0) // across % blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    place = (tl.program_id(0) // across // blocks).to(tl.int64)
    rows_kept = rows < batch
    targets = load_slots(targets_ptr, rows, stride_targets, rows_kept, capacity)
    s = scalar(scale, acc_dtype)
    offsets = (place * batch + rows)[:, None] * dim + columns[None, :]
    inside = rows_kept[:, None] & (columns < dim)[None, :]
    acc = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], acc_dtype)
    if CONTINUES:
        acc = tl.load(partial_ptr + offsets, mask=inside, other=0.0)
        tl.debug_barrier()  # no thread stores before all have loaded, whichever of them hold a number
    start = place * part
    for slot in range(start, at_least_one(start, tl.minimum(start + part, width)), BLOCK_DEPTH):
        slots = slot + tl.arange(0, BLOCK_DEPTH)
        present = load_present(occupied_ptr, slots, stride_occupied, width)
        h = _load_h(h_ptr, rows, rows_kept, stride_h_row, slots, present, stride_h_column, targets, first, s)
        if inverse_ptr is not None:
            h *= tl.load(inverse_ptr + slots, mask=present, other=0.0)[None, :]
        w = load_rows(prototypes_ptr, slots, columns, stride_w_row, stride_w_column, present, dim)
        acc = weigh(h, w, acc)
    tl.store(partial_ptr + offsets, acc, mask=inside)


@triton.jit
def _prototypes_gradient_kernel(
    grad_w_ptr,
    h_ptr,
    x_ptr,
    alive_ptr,
    targets_ptr,
    occupied_ptr,
    batch,
    first,
    width,
    capacity,
    dim,
    scale: tl.float64,
    stride_h_row,
    stride_h_column,
    stride_x_row,
    stride_x_column,
    stride_targets,
    stride_occupied,
    NARROW: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """Write H^T X (width, dim), contiguous, of one chunk: the sum over all samples that are ``alive``."""
    acc_dtype: tl.constexpr = x_ptr.dtype.element_ty
    product_dtype: tl.constexpr = tl.bfloat16 if NARROW else acc_dtype
    across = tl.cdiv(dim, BLOCK_COLUMNS)
    columns = tl.program_id(0) % across * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    slots = (tl.program_id(0) // across).to(tl.int64) * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
    present = load_present(occupied_ptr, slots, stride_occupied, width)
    s = scalar(scale, acc_dtype)
    acc = tl.zeros([BLOCK_SLOTS, BLOCK_COLUMNS], acc_dtype)
    for row in range(0, batch, BLOCK_DEPTH):
        rows = row + tl.arange(0, BLOCK_DEPTH)
        alive = tl.load(alive_ptr + rows, mask=rows < batch, other=0) != 0
        targets = load_slots(targets_ptr, rows, stride_targets, alive, capacity)
        h = _load_h(h_ptr, rows, alive, stride_h_row, slots, present, stride_h_column, targets, first, s)
        x = load_rows(x_ptr, rows, columns, stride_x_row, stride_x_column, alive, dim)
        acc = dot(tl.trans(narrow(h, product_dtype)), narrow(x, product_dtype), acc)
    inside = (slots < width)[:, None] & (columns < dim)[None, :]
    acc = narrow_gradient(acc, grad_w_ptr.dtype.element_ty)
    tl.store(grad_w_ptr + slots[:, None] * dim + columns[None, :], acc, mask=inside)


@triton.jit
def _normalisation_kernel(
    grad_w_ptr,
    grad_unit_ptr,  # None: ``grad_w`` holds it
    prototypes_ptr,
    inverse_ptr,
    occupied_ptr,
    width,
    dim,
    stride_w_row,
    stride_w_column,
    stride_occupied,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Write (g - (g . u) u) / |w| (width, dim) for g in ``grad_unit``."""
    slots = tl.program_id(0).to(tl.int64) * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
    present = load_present(occupied_ptr, slots, stride_occupied, width)
    columns = tl.arange(0, BLOCK_COLUMNS)
    inverse = tl.load(inverse_ptr + slots, mask=present, other=0.0)[:, None]
    w = load_rows(prototypes_ptr, slots, columns, stride_w_row, stride_w_column, present, dim)
    if grad_unit_ptr is None:
        g = load_rows(grad_w_ptr, slots, columns, dim, 1, present, dim)
        tl.debug_barrier()  # no thread stores before all have loaded, whichever of them hold a number
    else:
        g = load_rows(grad_unit_ptr, slots, columns, dim, 1, present, dim)
    unit = w.to(g.dtype) * inverse
    g = (g - tl.sum(g * unit, axis=1)[:, None] * unit) * inverse
    inside = (slots < width)[:, None] & (columns < dim)[None, :]
    tl.store(
        grad_w_ptr + slots[:, None] * dim + columns[None, :],
        narrow_gradient(g, grad_w_ptr.dtype.element_ty),
        mask=inside,
    )


def through_normalisation(
    grad_w: Tensor, grad_unit: Tensor | None, prototypes: Tensor, inverse: Tensor, occupied: Tensor | None
) -> None:
    """Write the gradient of rows (C, D) to ``grad_w``, given that of their unit rows: there already, if None."""
    width, dim = prototypes.shape
    dtype = grad_w.dtype if grad_unit is None else grad_unit.dtype
    how = choose("normalisation", architecture(grad_w.device), dtype, dim)
    _normalisation_kernel[(triton.cdiv(width, how.slots),)](
        grad_w,
        grad_unit,
        prototypes,
        inverse,
        occupied,
        width,
        dim,
        *prototypes.stride(),
        _stride(occupied),
        BLOCK_SLOTS=how.slots,
        BLOCK_COLUMNS=padded(dim),
        **how.options(),
    )


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
    batch, (capacity, dim) = x.shape[0], prototypes.shape
    logits = x.new_empty(batch, capacity)
    if logits.numel() == 0:
        return logits
    has_form = threshold is not None and coefficients is not None
    launch = choose("cosines", architecture(x.device), compute_dtype(x, prototypes), dim)
    _logits_kernel[(triton.cdiv(batch, launch.rows) * triton.cdiv(capacity, launch.slots),)](
        logits,
        x,
        prototypes,
        targets,
        target_logits,
        occupied,
        inverse_lengths(prototypes, x.dtype) if normalize_prototypes else None,
        threshold if has_form else None,
        coefficients if has_form else None,
        batch,
        capacity,
        dim,
        scale,
        *x.stride(),
        *prototypes.stride(),
        targets.stride(0),
        target_logits.stride(0),
        _stride(occupied),
        _stride(threshold),
        _stride(coefficients),
        BLOCK_ROWS=launch.rows,
        BLOCK_SLOTS=launch.slots,
        BLOCK_DEPTH=launch.depth,
        **launch.options(),
    )
    return logits


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
    (batch, dim), capacity = x.shape, prototypes.shape[0]
    grad_prototypes = (
        torch.empty_like(prototypes, memory_format=torch.contiguous_format) if need_prototypes else x.new_empty(0, 0)
    )
    if batch == 0 or capacity == 0:
        return torch.zeros_like(x), grad_prototypes.zero_(), x.new_zeros(batch)
    narrow_products = compute_dtype(x, prototypes) == torch.bfloat16
    dtype = torch.bfloat16 if narrow_products else x.dtype
    launch = choose("products", architecture(x.device), dtype, dim)
    inverse = inverse_lengths(prototypes, x.dtype) if normalize_prototypes else None
    alive = torch.isfinite(x).all(dim=1)
    unfinished = normalize_prototypes and need_prototypes and prototypes.dtype != x.dtype
    has_form = threshold is not None and coefficients is not None
    entries = max(batch if has_form else 0, dim if unfinished else 0) * x.element_size()  # of scratch per slot
    chunk = capacity if entries == 0 else max(1, SCRATCH_BYTES // entries // launch.slots) * launch.slots
    chunk = min(chunk, capacity)
    across, down = triton.cdiv(dim, launch.columns), triton.cdiv(batch, launch.rows)
    parts, part = split(chunk, launch.slots, across * down, processors(x.device))
    partial = x.new_empty(parts, batch, dim)
    for first in range(0, capacity, chunk):
        here = slice(first, min(first + chunk, capacity))
        h, w = grad[:, here], prototypes[here]
        present = None if occupied is None else occupied[here]
        lengths = None if inverse is None else inverse[here]
        width = w.shape[0]
        if has_form:
            h = x.new_empty(batch, width)
            _slopes_kernel[(down * triton.cdiv(width, launch.slots),)](
                h,
                grad[:, here],
                x,
                w,
                lengths,
                threshold,
                coefficients,
                batch,
                width,
                dim,
                scale,
                *grad.stride(),
                *x.stride(),
                *w.stride(),
                _stride(threshold),
                _stride(coefficients),
                BLOCK_ROWS=launch.rows,
                BLOCK_SLOTS=launch.slots,
                BLOCK_DEPTH=launch.depth,
                **launch.options(),
            )
        _embeddings_gradient_kernel[(parts * down * across,)](
            partial,
            h,
            w,
            targets,
            present,
            lengths,
            batch,
            first,
            width,
            capacity,
            dim,
            part,
            scale,
            *h.stride(),
            *w.stride(),
            targets.stride(0),
            _stride(occupied),
            CONTINUES=first > 0,
            BLOCK_ROWS=launch.rows,
            BLOCK_COLUMNS=launch.columns,
            BLOCK_DEPTH=launch.depth,
            **launch.options(),
        )
        if not need_prototypes:
            continue
        grad_w = grad_prototypes[here]
        grad_unit = x.new_empty(width, dim) if unfinished else grad_w
        _prototypes_gradient_kernel[(triton.cdiv(width, launch.slots) * across,)](
            grad_unit,
            h,
            x,
            alive,
            targets,
            present,
            batch,
            first,
            width,
            capacity,
            dim,
            scale,
            *h.stride(),
            *x.stride(),
            targets.stride(0),
            _stride(occupied),
            NARROW=narrow_products,
            BLOCK_SLOTS=launch.slots,
            BLOCK_COLUMNS=launch.columns,
            BLOCK_DEPTH=launch.depth,
            **launch.options(),
        )
        if lengths is not None:
            through_normalisation(grad_w, grad_unit if unfinished else None, w, lengths, present)
    return partial[0] if parts == 1 else partial.sum(dim=0), grad_prototypes, at_targets(grad, targets)


def at_targets(grad: Tensor, targets: Tensor) -> Tensor:
    """Return the entries (B,) of ``grad`` (B, M) at the targets, 0 where there is none."""
    inside = (targets >= 0) & (targets < grad.shape[1])
    return torch.where(inside, grad.gather(1, torch.where(inside, targets, 0).long()[:, None])[:, 0], 0)


def _stride(vector: Tensor | None) -> int:
    return 0 if vector is None else vector.stride(0)
