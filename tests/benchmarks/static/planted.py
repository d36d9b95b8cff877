"""Kernels with known faults, described as ours are, for the compile harness to find."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from protomem_kernels.backends.triton.specimens import Specimen


@triton.jit
def scale_by_sum(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """Holds every element until the sum is known: one warp has 512 of them per thread, and 255 registers."""
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    tl.store(y_ptr + offsets, x * tl.sum(x))


@triton.jit
def multiply(x_ptr, w_ptr, out_ptr, BLOCK: tl.constexpr):
    lines = tl.arange(0, BLOCK)
    offsets = lines[:, None] * BLOCK + lines[None, :]
    product = tl.dot(tl.load(x_ptr + offsets), tl.load(w_ptr + offsets).T)
    tl.store(out_ptr + offsets, product)


@triton.jit
def copy_rows_narrow(x_ptr, out_ptr, stride_row, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    tl.store(out_ptr + row.to(tl.int64) * stride_row + columns, tl.load(x_ptr + row * stride_row + columns))


@triton.jit
def copy_rows_wide(x_ptr, out_ptr, stride_row, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    tl.store(out_ptr + row * stride_row + columns, tl.load(x_ptr + row * stride_row + columns))


@triton.jit
def copy_columns(x_ptr, out_ptr, stride_row, stride_column, BLOCK: tl.constexpr):
    """Wide in its rows, narrow in its columns: right until somebody hands in a transposed matrix."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride_row + columns * stride_column)
    tl.store(out_ptr + row * stride_row + columns, x)


@triton.jit
def gather_narrow(x_ptr, out_ptr, stride_row, BLOCK: tl.constexpr):
    """The 32-bit product lies in a tile, behind a splat of the stride."""
    lines = tl.arange(0, BLOCK)
    offsets = lines[:, None].to(tl.int64) * BLOCK + lines[None, :]
    tl.store(out_ptr + offsets, tl.load(x_ptr + (lines[:, None] * stride_row + lines[None, :])))


@triton.jit
def copy_rows_by_size(x_ptr, out_ptr, dim, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    tl.store(out_ptr + row.to(tl.int64) * dim + columns, tl.load(x_ptr + row * dim + columns))


@triton.jit
def turn_in_place(x_ptr, BLOCK: tl.constexpr):
    """Moves every number to another thread: which may store it where a third one has not loaded yet."""
    places = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + places)
    tl.store(x_ptr + (places + 32) % BLOCK, x)


@triton.jit
def turn_in_place_ordered(x_ptr, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + places)
    tl.debug_barrier()
    tl.store(x_ptr + (places + 32) % BLOCK, x)


@triton.jit
def read_what_was_stored(x_ptr, y_ptr, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    if tl.program_id(0) == 0:
        tl.store(x_ptr + places, tl.load(y_ptr + places))
    tl.store(y_ptr + BLOCK + places, tl.load(x_ptr + (places + 32) % BLOCK))


@triton.jit
def ordered_on_one_way_only(x_ptr, size, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + places)
    if size > 5:
        tl.debug_barrier()
    tl.store(x_ptr + (places + 32) % BLOCK, x)


def specimens(arch: int, dtype: torch.dtype, dim: int) -> list[Specimen]:
    floats: dict[str, Any] = {"x_ptr": "*fp32", "y_ptr": "*fp32"}
    halves = {"x_ptr": "*bf16", "w_ptr": "*bf16", "out_ptr": "*fp32"}
    rows = {"x_ptr": "*fp32", "out_ptr": "*fp32", "stride_row": "i32"}
    sizes = {"x_ptr": "*fp32", "out_ptr": "*fp32", "dim": "i32"}
    columns = rows | {"stride_column": "constexpr"}
    small, large = {"BLOCK": 64}, {"BLOCK": 16384}
    one, two = {"x_ptr": "*fp32"}, {"x_ptr": "*fp32", "y_ptr": "*fp32"}
    block = {"BLOCK": 128}
    return [
        Specimen("spills", scale_by_sum, floats, large, warps=1, stages=1),
        Specimen("does not spill", scale_by_sum, floats, large, warps=8, stages=1),
        Specimen("stores among loads", turn_in_place, one, block, warps=4, stages=1),
        Specimen("barrier between", turn_in_place_ordered, one, block, warps=4, stages=1),
        Specimen("loads among stores", read_what_was_stored, two, block, warps=4, stages=1),
        Specimen("a way around", ordered_on_one_way_only, one | {"size": "i32"}, block, warps=4, stages=1),
        Specimen("multiplies", multiply, halves, small, warps=4, stages=1, matrix_bound=True),
        Specimen("narrow", copy_rows_narrow, rows, small, warps=1, stages=1),
        Specimen("narrow size", copy_rows_by_size, sizes, small, warps=1, stages=1),
        Specimen("narrow tile", gather_narrow, rows, small, warps=4, stages=1),
        Specimen("narrow columns", copy_columns, columns, small | {"stride_column": 1}, warps=1, stages=1),
        Specimen("wide", copy_rows_wide, rows, small, warps=1, stages=1),
    ]
