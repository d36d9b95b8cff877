"""What kernels on batch x memory share: products, rounding, the hard-negative form, loading of rows.

Every matrix product of the package goes through ``dot``: Triton's interpreter multiplies bfloat16 as if its bits were
integers, so there they are converted first; and the precision of float32 products is one decision.

float32 products run on the tensor cores as three tf32 products (``tf32x3``): each factor is split into a tf32 number
and the tf32 rest, only rest x rest is left out. Relative error per term about 2^-21, against 2^-24 of float32 and 2^-11
of plain tf32, which is what a ``matmul_precision`` below "highest" asks for. float64 uses the double-precision tensor
cores.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(a, b, acc, TF32: tl.constexpr = False):
    """Return acc + a b; the one place where ``tl.dot`` is called. ``acc`` is float32, float64 for float64 factors.

    ``TF32``: one product of tf32 numbers stands for one of float32, not three.
    """
    if a.dtype == tl.float64:
        return tl.dot(a, b, acc, input_precision="ieee", out_dtype=tl.float64)
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32" if TF32 else "tf32x3")


@triton.jit
def at_least_one(first, last):
    """Return the end of a loop from ``first`` to ``last`` that is run once even if it is empty: its tile is masked.

    The compiler is told so. A loop that may be skipped has accumulators that no wgmma has written, and ptxas, which
    then cannot tell where the asynchronous ones end, has each wait for the one before it ("serialized").
    """
    last = tl.maximum(last, first + 1)
    tl.assume(first < last)
    return last


@triton.jit
def scalar(value, dtype: tl.constexpr):
    """Return a number in ``dtype``; arguments that are floats are declared float64, so that no digit is lost before."""
    return tl.full((), value, dtype)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Return ``x`` in ``dtype``, rounded to nearest even (the interpreter's own cast to bfloat16 cuts off)."""
    if INTERPRETED and dtype == tl.bfloat16 and (x.dtype == tl.float32 or x.dtype == tl.float64):
        x = x.to(tl.float32)
        bits = x.to(tl.uint32, bitcast=True)
        # Nothing is left below what bfloat16 keeps: the interpreter's cast makes 1e-38 of what is left of a 0.
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x.to(dtype)


@triton.jit
def narrow_gradient(x, dtype: tl.constexpr):
    """Return ``narrow(x, dtype)``; a finite number beyond float16's range becomes the largest of that range."""
    if dtype == tl.float16:
        x = tl.where(tl.abs(x) < float("inf"), tl.minimum(tl.maximum(x, -65504.0), 65504.0), x)
    return narrow(x, dtype)


@triton.jit
def load_rows(ptr, rows, columns, stride_row, stride_column, keep, dim):
    """Return the entries (rows, columns) of a matrix, 0 in rows that are not to ``keep`` and in columns past ``dim``.

    What lies in a row that is not kept is not read at all, so that no NaN of it can leak. Offsets are 64-bit.
    """
    offsets = rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column
    return tl.load(ptr + offsets, mask=keep[:, None] & (columns < dim)[None, :], other=0.0)


@triton.jit
def load_vector(ptr, index, stride, keep):
    """Return the entries ``index`` of a vector, 0 where not to ``keep``. Offsets are 64-bit."""
    return tl.load(ptr + index.to(tl.int64) * stride, mask=keep, other=0.0)


@triton.jit
def load_slots(ptr, index, stride, keep, capacity):
    """Return slots as int64, with -1 where not to ``keep`` and for every one outside [0, capacity)."""
    slots = tl.load(ptr + index.to(tl.int64) * stride, mask=keep, other=-1).to(tl.int64)
    return tl.where((slots >= 0) & (slots < capacity), slots, -1)


@triton.jit
def load_present(occupied_ptr, slots, stride, capacity):
    """Return which ``slots`` are inside the memory and, unless ``occupied_ptr`` is None, occupied."""
    present = slots < capacity
    if occupied_ptr is not None:
        present = present & (tl.load(occupied_ptr + slots.to(tl.int64) * stride, mask=present, other=0) != 0)
    return present


@triton.jit
def power_of_two(x):
    """Return the largest power of two that is at most ``x`` >= 0, or 0 if that is below the smallest normal number."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True) & 0x7FF0000000000000
    else:
        bits = x.to(tl.int32, bitcast=True) & 0x7F800000
    return bits.to(x.dtype, bitcast=True)


@triton.jit
def squares(tile, unit, total):
    """Add the columns of ``tile`` (N, K) to its rows' sums of squares, total unit^2; start with (0, 0).

    ``unit`` is a power of two near the largest entry, so that squares neither overflow nor underflow and that to divide
    by it costs no digit. A NaN stays in the sum.
    """
    new = tl.maximum(unit, power_of_two(tl.max(tl.abs(tile), axis=1)))
    safe = tl.where(new > 0, new, 1.0)
    ratio = tile / safe[:, None]
    old = unit / safe
    return new, total * old * old + tl.sum(ratio * ratio, axis=1)


@triton.jit
def inverse_length(unit, total):
    """Return 1 / |row| from ``squares``; 0 for a zero row."""
    root = tl.sqrt(total) if total.dtype == tl.float64 else tl.sqrt_rn(total)  # tl.sqrt approximates in float32
    length = tl.where(unit > 0, unit, 1.0) * root
    return tl.where(length == 0, 0.0, 1.0 / tl.where(length == 0, 1.0, length))


@triton.jit
def load_form(ptr, stride, dtype: tl.constexpr):
    """Return the coefficients a, b, g of the hard-negative form."""
    a, b, g = tl.load(ptr), tl.load(ptr + stride), tl.load(ptr + stride + stride)
    return a.to(dtype), b.to(dtype), g.to(dtype)


@triton.jit
def reshape_hard(scaled, tau, a, b, g, scale):
    """Return s h and h' for scaled cosines y = s cos (R, C); tau, s times the threshold, broadcasts against them.

    s h = a y + s b + (g / s) y^2 and h' = a + 2 (g / s) y where y > tau, else y and 1. ``scale`` is s, or
    s log2(e) where exponents are of 2.
    """
    hard = scaled > tau
    bend = g / scale
    form = (scaled * bend + a) * scaled + scale * b
    return tl.where(hard, form, scaled), tl.where(hard, 2.0 * bend * scaled + a, 1.0)
