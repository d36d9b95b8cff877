"""The cosines of a tile, exact to float32 whatever the dtype of the memory.

``x`` is float32, the memory often bfloat16 or float16. Rounding ``x`` to the memory's dtype would cost 2^-9 (2^-11)
per term: enough to swap neighbours in a ranking and to show in a logit. So ``x`` is split into as many narrow numbers
as hold its bits, x = high + middle + low for bfloat16 (3 x 8 bits), high + low for float16 (2 x 11), and each is
multiplied with the memory as it is stored on the tensor cores; products of two narrow numbers are exact in float32.
Three bfloat16 products take half the time of the three tf32 products that a float32 memory takes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from protomem_kernels.backends.triton.launch import architecture, choose
from protomem_kernels.backends.triton.tiles import dot, inverse_length, load_rows, narrow, squares

# Products on the tensor cores that stand for one product of cosines: three tf32 ones, or x split into narrow numbers.
PRODUCTS = {torch.float64: 1, torch.float32: 3, torch.bfloat16: 3, torch.float16: 2}


@triton.jit
def multiply(x, w, acc):
    """Return acc + x w^T for rows ``x`` (R, K) in the dtype of accumulation and prototypes ``w`` (C, K) as stored."""
    if w.dtype == tl.bfloat16 and x.dtype == tl.float32:
        high = narrow(x, tl.bfloat16)
        rest = x - high.to(tl.float32)
        middle = narrow(rest, tl.bfloat16)
        low = narrow(rest - middle.to(tl.float32), tl.bfloat16)
        acc = dot(high, tl.trans(w), dot(middle, tl.trans(w), dot(low, tl.trans(w), acc)))
    elif w.dtype == tl.float16 and x.dtype == tl.float32:
        high = narrow(x, tl.float16)
        low = narrow(x - high.to(tl.float32), tl.float16)
        acc = dot(high, tl.trans(w), dot(low, tl.trans(w), acc))
    else:
        acc = dot(x, tl.trans(w.to(x.dtype)), acc)
    return acc


@triton.jit
def weigh(h, w, acc):
    """Return acc + h w for gradients of cosines ``h`` (R, C) in the dtype of accumulation and ``w`` (C, K) as stored.

    Against a bfloat16 memory ``h`` is rounded to bfloat16 as well. It is never rounded to float16, whose range a loss
    scale would leave: such a memory is converted to float32.
    """
    if w.dtype == tl.bfloat16 and acc.dtype == tl.float32:
        acc = dot(narrow(h, tl.bfloat16), w, acc)
    else:
        acc = dot(h, w.to(acc.dtype), acc)
    return acc


@triton.jit
def cosines(
    x_ptr,
    rows,
    stride_x_row,
    stride_x_column,
    rows_kept,
    prototypes_ptr,
    slots,
    stride_w_row,
    stride_w_column,
    slots_kept,
    dim,
    BLOCK_DEPTH: tl.constexpr,
):
    """Return x_i . w_j (R, C) for ``rows`` (R,) and ``slots`` (C,); zero in rows and slots that are not kept."""
    acc = tl.zeros([rows.shape[0], slots.shape[0]], x_ptr.dtype.element_ty)
    for first in range(0, dim, BLOCK_DEPTH):
        columns = first + tl.arange(0, BLOCK_DEPTH)
        x = load_rows(x_ptr, rows, columns, stride_x_row, stride_x_column, rows_kept, dim)
        w = load_rows(prototypes_ptr, slots, columns, stride_w_row, stride_w_column, slots_kept, dim)
        acc = multiply(x, w, acc)
    return acc


@triton.jit
def inverse_lengths_kernel(
    inverse_ptr,
    prototypes_ptr,
    capacity,
    dim,
    stride_w_row,
    stride_w_column,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """Write 1 / |w_j| for every slot, 0 for a zero row, NaN for a non-finite one."""
    slots = tl.program_id(0).to(tl.int64) * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
    inside = slots < capacity
    largest = tl.zeros([BLOCK_SLOTS], inverse_ptr.dtype.element_ty)
    total = tl.zeros([BLOCK_SLOTS], inverse_ptr.dtype.element_ty)
    for first in range(0, dim, BLOCK_DEPTH):
        columns = first + tl.arange(0, BLOCK_DEPTH)
        w = load_rows(prototypes_ptr, slots, columns, stride_w_row, stride_w_column, inside, dim)
        largest, total = squares(w.to(inverse_ptr.dtype.element_ty), largest, total)
    tl.store(inverse_ptr + slots, inverse_length(largest, total), mask=inside)


def inverse_lengths(prototypes: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 1 / |w_j| (M,) in ``dtype``; 0 for a zero row, NaN for a non-finite one. Reads the memory once."""
    capacity, dim = prototypes.shape
    inverse = torch.empty(capacity, dtype=dtype, device=prototypes.device)
    how = choose("inverse lengths", architecture(prototypes.device), prototypes.dtype, dim)
    if capacity > 0:
        inverse_lengths_kernel[(triton.cdiv(capacity, how.slots),)](
            inverse,
            prototypes,
            capacity,
            dim,
            *prototypes.stride(),
            BLOCK_SLOTS=how.slots,
            BLOCK_DEPTH=how.depth,
            **how.options(),
        )
    return inverse
