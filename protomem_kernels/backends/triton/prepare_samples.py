"""prepare_samples in Triton: one launch forward, one backward, a program for a few whole rows.

The mathematics stands in ``backends/reference/prepare_samples.py``. A row's largest entry is divided out before squares
are added, so that these neither overflow nor underflow. Read and written are the rows once: B D (size + 4) bytes
forward, B D (2 size + 8) backward. No atomics, nothing read back: deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from protomem_kernels.backends.triton.launch import architecture, choose, padded
from protomem_kernels.backends.triton.rows import unit_rows
from protomem_kernels.backends.triton.tiles import load_rows, load_slots, narrow_gradient
from protomem_kernels.rows import accumulation_dtype


@triton.jit
def samples_kernel(
    x_ptr,  # (B, D) contiguous
    norm_ptr,  # (B,) contiguous
    sample_targets_ptr,  # (B,) contiguous int64
    embeddings_ptr,  # (B, D)
    labels_ptr,  # (B,)
    index_ptr,  # (B,)
    slots_ptr,  # (P,)
    batch,
    dim,
    identities,
    capacity,
    stride_x_row,
    stride_x_column,
    stride_label,
    stride_index,
    stride_slot,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Find the targets of a few samples, and scale their rows to unit length."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_DIM)
    keep = rows < batch
    index = load_slots(index_ptr, rows, stride_index, keep, identities)
    slots = tl.load(slots_ptr + index * stride_slot, mask=index >= 0, other=-1).to(tl.int64)
    labels = tl.load(labels_ptr + rows.to(tl.int64) * stride_label, mask=keep, other=-1).to(tl.int64)
    raw = load_rows(embeddings_ptr, rows, columns, stride_x_row, stride_x_column, keep, dim).to(x_ptr.dtype.element_ty)
    finite = tl.min((tl.abs(raw) < float("inf")).to(tl.int32), axis=1) != 0
    targets = tl.where((labels >= 0) & (slots < 0) & (finite == 0), 0, slots)
    counts = (targets >= 0) & (targets < capacity)
    x, norm = unit_rows(tl.where(counts[:, None], raw, 0.0))
    tl.store(norm_ptr + rows, norm, mask=keep)
    tl.store(sample_targets_ptr + rows, targets, mask=keep)
    offsets = rows.to(tl.int64)[:, None] * dim + columns[None, :]
    tl.store(x_ptr + offsets, x, mask=keep[:, None] & (columns < dim)[None, :])


@triton.jit
def samples_backward_kernel(
    grad_embeddings_ptr,  # (B, D) contiguous
    grad_x_ptr,  # (B, D)
    x_ptr,  # (B, D)
    norm_ptr,  # (B,)
    batch,
    dim,
    stride_grad_row,
    stride_grad_column,
    stride_x_row,
    stride_x_column,
    stride_norm,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Write the gradient of a few raw rows, given that of their unit rows."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_DIM)
    keep = rows < batch
    x = load_rows(x_ptr, rows, columns, stride_x_row, stride_x_column, keep, dim)
    g = load_rows(grad_x_ptr, rows, columns, stride_grad_row, stride_grad_column, keep, dim).to(x.dtype)
    norm = tl.load(norm_ptr + rows.to(tl.int64) * stride_norm, mask=keep, other=0.0)[:, None]
    along = tl.sum(g * x, axis=1)[:, None]
    alive = tl.max((x != 0).to(tl.int32), axis=1)[:, None] != 0
    grad = tl.where(alive, (g - along * x) / tl.where(norm > 0, norm, 1.0), 0.0)
    offsets = rows.to(tl.int64)[:, None] * dim + columns[None, :]
    out = narrow_gradient(grad, grad_embeddings_ptr.dtype.element_ty)
    tl.store(grad_embeddings_ptr + offsets, out, mask=keep[:, None] & (columns < dim)[None, :])


def prepare_samples(
    embeddings: Tensor, labels: Tensor, index: Tensor, slots: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x (B, D), norm (B,) and targets (B,): ``ops.prepare_samples``."""
    (batch, dim), dtype = embeddings.shape, accumulation_dtype(embeddings.dtype)
    x = torch.empty(embeddings.shape, dtype=dtype, device=embeddings.device)
    norm, targets = x.new_empty(batch), torch.empty(batch, dtype=torch.int64, device=x.device)
    how = choose("targets", architecture(x.device), dtype, dim)
    if batch:
        samples_kernel[(triton.cdiv(batch, how.rows),)](
            x,
            norm,
            targets,
            embeddings,
            labels,
            index,
            slots,
            batch,
            dim,
            len(slots),
            capacity,
            *embeddings.stride(),
            labels.stride(0),
            index.stride(0),
            slots.stride(0),
            BLOCK_ROWS=how.rows,
            BLOCK_DIM=padded(dim),
            **how.options(),
        )
    return x, norm, targets


def prepare_samples_backward(grad_x: Tensor, embeddings: Tensor, x: Tensor, norm: Tensor) -> Tensor:
    """Return dL/d embedding (B, D) in the dtype of ``embeddings``."""
    (batch, dim), grad = embeddings.shape, torch.empty(embeddings.shape, dtype=embeddings.dtype, device=x.device)
    how = choose("targets", architecture(x.device), x.dtype, dim)
    if batch:
        samples_backward_kernel[(triton.cdiv(batch, how.rows),)](
            grad,
            grad_x,
            x,
            norm,
            batch,
            dim,
            *grad_x.stride(),
            *x.stride(),
            norm.stride(0),
            BLOCK_ROWS=how.rows,
            BLOCK_DIM=padded(dim),
            **how.options(),
        )
    return grad
