"""What the chunked operators share: how the work is cut, and the products of a chunk.

A chunk is some slots of the memory by some samples, 4,096 at most: as many slots as twice the device's L2 cache, but no
more than 96 MiB, holds the logits, weights and rows of. So most of it is found in the cache by the next kernel, and a
chunk takes a GPU about as long as Python needs to launch the next one: smaller chunks would wait for it, larger ones
gain nothing (``benchmarks.predicted``). Where that leaves fewer than 256 slots there are 256. This is all the scratch
of a call, however large the batch and the memory are: 96 MiB, since 256 slots of 4,096 samples take 18 MiB at D = 512.

Products of 16-bit numbers are formed by the tensor cores and kept in float32 (``out_dtype``), which PyTorch has on GPUs
alone; a CPU multiplies the same numbers in float32. Products of float32 follow ``backends.precision``. Nothing is read
back, and shapes alone decide what is launched: a call can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from protomem_kernels.backends.triton import launch
from protomem_kernels.backends.triton.logsumexp_samples import LIFT, split_into

ROWS = 4096  # samples of a chunk, at most
LEAST_SLOTS = 256
ROUND = 128  # slots of a chunk are a multiple of this: the tile of ``hardest_negatives``, and whole tiles of a GEMM
MOST_SCRATCH = 96 << 20  # bytes
L2_OF_STAND_IN = 1 << 20  # bytes, where no GPU tells


@functools.cache
def scratch_bytes(device: torch.device) -> int:
    """Return the bytes that a chunk may fill: twice the device's L2 cache, within ``MOST_SCRATCH``."""
    if device.type != "cuda":
        return 2 * L2_OF_STAND_IN
    return min(MOST_SCRATCH, 2 * int(torch.cuda.get_device_properties(device).L2_cache_size))


def slots_of_chunk(device: torch.device, rows: int, capacity: int, per_logit: int, per_slot: int) -> int:
    """Return how many slots a chunk spans: all chunks but the last, which is hardly smaller.

    Args:
        device: whose cache sets the size.
        rows: samples of a chunk.
        capacity: M.
        per_logit: bytes of scratch per sample and slot.
        per_slot: bytes per slot besides: of its row, and of scratch as wide as it.
    """
    most = max(LEAST_SLOTS, scratch_bytes(device) // (max(rows, 1) * per_logit + per_slot) // ROUND * ROUND)
    chunks = max(1, -(-capacity // most))
    return -(-capacity // chunks // ROUND) * ROUND


def cut(size: int, step: int) -> Iterator[slice]:
    """Yield slices of at most ``step`` that make up ``size``."""
    for start in range(0, size, max(step, 1)):
        yield slice(start, min(start + step, size))


def part_of(vector: Tensor | None, here: slice) -> Tensor | None:
    """Return the part of a vector that may not be there."""
    return None if vector is None else vector[here]


def factor_of(x: Tensor, prototypes: Tensor, count: int) -> tuple[Tensor, float]:
    """Return what stands for ``x`` in products, (PARTS, B, D), and how much larger it is.

    As many numbers of a 16-bit memory's dtype as ``count`` says, or ``x`` itself.
    """
    dtype = launch.compute_dtype(x, prototypes)
    if dtype.itemsize > 2:
        return x[None], 1.0
    return split_into(x.new_empty(count, *x.shape, dtype=dtype), x), float(LIFT.value)


def present_rows(prototypes: Tensor, occupied: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the rows of a chunk in ``dtype``, zero where empty, whatever stands there: 0 times NaN is NaN."""
    rows = prototypes.to(dtype)
    return rows if occupied is None else torch.where(occupied[:, None], rows, 0)


def multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Write ``a b`` to ``out``, which is of the accumulation dtype, and return it."""
    if a.dtype == out.dtype or not a.is_cuda:
        return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
    return torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)  # type: ignore[no-any-return]


def add_product_(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a b`` to ``out``, which is of the accumulation dtype."""
    if a.dtype == out.dtype or not a.is_cuda:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))
    else:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)


def logits_of(factor: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    """Write the products of a factor (PARTS, b, D) and a chunk's rows (C, D) to ``out``, (PARTS, b, C) of it."""
    parts, batch, dim = factor.shape
    products = out[: parts * batch * len(rows)].view(parts * batch, len(rows))
    multiply(factor.reshape(parts * batch, dim), rows.T, products)
    return products.view(parts, batch, len(rows))
