"""Kernels that are right in Triton's interpreter and do not compile for some arguments; and one that does."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def right(x_ptr, bias_ptr, out_ptr, size, stride, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index * stride, mask=index < size, other=0.0)
    if bias_ptr is not None:
        x += tl.load(bias_ptr)
    tl.store(out_ptr + tl.cast(size, tl.int64) + index, x)


@triton.jit
def asks_a_constant(x_ptr, size, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(x_ptr + size.to(tl.int64) + index, 0.0, mask=index < size)


@triton.jit
def grows_in_a_loop(x_ptr, size, stride, BLOCK: tl.constexpr):
    last = tl.cast(0, tl.int32)
    for _ in range(0, size):
        last += stride
    tl.store(x_ptr + last + tl.arange(0, BLOCK), 0.0)


@triton.jit
def needs_an_option(x_ptr, bias_ptr, BLOCK: tl.constexpr):
    if bias_ptr is not None:
        bias = tl.load(bias_ptr)
    tl.store(x_ptr + tl.arange(0, BLOCK), bias)
