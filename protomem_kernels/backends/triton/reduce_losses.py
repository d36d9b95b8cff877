"""reduce_losses in Triton: one program walks the batch, twice: how many samples count, then their losses and slopes.

The mathematics stands in ``backends/reference/reduce_losses.py``. Read are 16 bytes a sample, or 24, and the targets
once more; written 8 or 16. At B = 4,096 that is some microseconds of one multiprocessor, less than one more launch. The
sum has one order: deterministic.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from protomem_kernels.backends.triton.launch import architecture, choose
from protomem_kernels.backends.triton.tiles import load_slots, load_vector, scalar
from protomem_kernels.rows import sine_floor

KINDS = {"cosine": 0, "angle": 1, "unguarded angle": 2}


@triton.jit
def log_1_plus(e):
    """Return log(1 + e) for e >= 0 to the last bits: what 1 + e rounds away is put right by the ratio."""
    u = 1.0 + e
    rest = u - 1.0
    return tl.where(rest == 0, e, tl.log(u) * (e / tl.where(rest == 0, 1.0, rest)))


@triton.jit
def losses_kernel(
    loss_ptr,  # ()
    slope_cosine_ptr,  # (B,) contiguous
    slope_n_ptr,  # (B,) contiguous
    cosine_ptr,  # (B,)
    n_ptr,  # (B,)
    targets_ptr,  # (B,)
    batch,
    capacity,
    margin: tl.float64,
    cos_margin: tl.float64,
    sin_margin: tl.float64,
    floor: tl.float64,
    scale: tl.float64,
    stride_cosine,
    stride_n,
    stride_target,
    KIND: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the loss, and its derivatives by each sample's cosine and n."""
    dtype: tl.constexpr = cosine_ptr.dtype.element_ty
    share = scalar(1.0, dtype)
    if MEAN:
        counted = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, batch, BLOCK):
            rows = start + tl.arange(0, BLOCK)
            counted += (load_slots(targets_ptr, rows, stride_target, rows < batch, capacity) >= 0).to(tl.int32)
        share = share / tl.maximum(tl.sum(counted, axis=0), 1).to(dtype)
    s = scalar(scale, dtype)
    m = scalar(margin, dtype)
    cos_m = scalar(cos_margin, dtype)
    sin_m = scalar(sin_margin, dtype)
    total = tl.zeros((BLOCK,), dtype)
    for start in range(0, batch, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        keep = rows < batch
        counts = load_slots(targets_ptr, rows, stride_target, keep, capacity) >= 0
        c = load_vector(cosine_ptr, rows, stride_cosine, keep)
        n = load_vector(n_ptr, rows, stride_n, keep)
        slope = tl.full((BLOCK,), 1.0, dtype)
        if KIND == 0:
            value = c - m
        else:
            squared = 1.0 - c * c
            value = c * cos_m - tl.sqrt(tl.where(squared < 0, 0.0, squared)) * sin_m
            if KIND == 1:
                least = scalar(floor, dtype)
                bent = tl.where(squared >= least, c / tl.sqrt(tl.maximum(squared, least)), 0.0)
                guarded = c >= -cos_m
                slope = tl.where(guarded, cos_m + sin_m * bent, 1.0)
                value = tl.where(guarded | (c != c), value, c - m * sin_m)
        u = n - s * value
        e = tl.exp(-tl.abs(u))
        total += tl.where(counts, tl.where(u > 0, u, tl.where(u == u, 0.0, u)) + log_1_plus(e), 0.0)
        weight = tl.where(u > 0, 1.0 / (1.0 + e), e / (1.0 + e)) * share
        tl.store(slope_n_ptr + rows, tl.where(counts, weight, 0.0), mask=keep)
        tl.store(slope_cosine_ptr + rows, tl.where(counts, -s * slope * weight, 0.0), mask=keep)
    tl.store(loss_ptr, tl.sum(total, axis=0) * share)


def reduce_losses(
    cosine: Tensor, n: Tensor, targets: Tensor, capacity: int, kind: str, margin: float, scale: float, mean: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss (), dL/dc (B,) and dL/dn (B,)."""
    loss = cosine.new_empty(())
    slope_cosine, slope_n = (torch.empty(cosine.shape, dtype=cosine.dtype, device=cosine.device) for _ in range(2))
    how = choose("losses", architecture(cosine.device), cosine.dtype, 16)
    losses_kernel[(1,)](
        loss,
        slope_cosine,
        slope_n,
        cosine,
        n,
        targets,
        len(cosine),
        capacity,
        margin,
        math.cos(margin),
        math.sin(margin),
        sine_floor(cosine.dtype),
        scale,
        cosine.stride(0),
        n.stride(0),
        targets.stride(0),
        KIND=KINDS[kind],
        MEAN=mean,
        BLOCK=how.slots,
        **how.options(),
    )
    return loss, slope_cosine, slope_n
