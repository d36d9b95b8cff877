"""The kernels of ``margin_softmax_logits``."""

from __future__ import annotations

from typing import Any

import torch
import triton

from protomem_kernels.backends.triton.cosines import PRODUCTS
from protomem_kernels.backends.triton.launch import Launch, choose, padded, triton_type
from protomem_kernels.backends.triton.margin_softmax_logits import (
    _embeddings_gradient_kernel,
    _logits_kernel,
    _normalisation_kernel,
    _prototypes_gradient_kernel,
    _slopes_kernel,
)
from protomem_kernels.backends.triton.specimens import CENTRE, Specimen, arguments
from protomem_kernels.rows import accumulation_dtype


def specimens(arch: int, dtype: torch.dtype, dim: int) -> list[Specimen]:
    """Describe the kernels for the compile tests and the static report: bare, and with every option."""
    (batch, capacity), size, wide = CENTRE, dtype.itemsize, accumulation_dtype(dtype).itemsize
    narrow_products = dtype == torch.bfloat16
    stream = choose("cosines", arch, dtype, dim)
    other = choose("products", arch, dtype if narrow_products else accumulation_dtype(dtype), dim)
    types = {"prototypes_ptr": f"*{triton_type(dtype)}", "targets_ptr": "*i64", "occupied_ptr": "*i1"}
    types |= {"grad_w_ptr": f"*{triton_type(dtype)}", "alive_ptr": "*i1", "scale": "fp64"}
    aligned = ("capacity", "width", "dim", "part", "stride_grad_row", "stride_h_row", "stride_x_row", "stride_w_row")
    types |= dict.fromkeys(["batch", "first", *aligned], "i32")
    bare = dict.fromkeys(["occupied_ptr", "inverse_ptr", "threshold_ptr", "coefficients_ptr"])

    def specimen(name: str, kernel: Any, launch: Launch, work: tuple[int, ...] = (0,) * 4, **fixed: Any) -> Specimen:
        pointers = [argument for argument in kernel.arg_names if argument.endswith("_ptr")]
        moved, multiplied, tiles, least = work
        return Specimen(
            name=name,
            **arguments(
                kernel,
                dict.fromkeys(pointers, f"*{triton_type(accumulation_dtype(dtype))}") | types,
                launch.blocks() | {"CONTINUES": True, "NARROW": narrow_products} | fixed,
            ),
            warps=launch.warps,
            stages=launch.stages,
            aligned=aligned,
            matrix_bound=multiplied > 0,
            bytes_per_tile=moved,
            operations_per_tile=2 * multiplied,
            tiles=tiles,
            least_bytes=least,
        )

    rows, slots, *_ = stream
    forward = (
        dim * (rows * wide + slots * size) + rows * slots * wide,
        rows * slots * dim * PRODUCTS[dtype],
        triton.cdiv(batch, rows) * triton.cdiv(capacity, slots),
        dim * (batch * wide + capacity * size) + batch * capacity * wide,
    )
    rows, slots, depth, columns, *_ = other
    across = triton.cdiv(dim, columns)
    gradients = 1 if narrow_products or accumulation_dtype(dtype) == torch.float64 else 3
    slopes = (dim * (rows * wide + slots * size) + 2 * rows * slots * wide, rows * slots * dim * PRODUCTS[dtype], 0, 0)
    embeddings = (
        depth * (rows * wide + columns * size),
        rows * depth * columns * gradients,
        triton.cdiv(batch, rows) * triton.cdiv(capacity, depth) * across,
        dim * (batch * wide + capacity * size) + batch * capacity * wide,
    )
    prototypes = (
        depth * (slots + columns) * wide,
        slots * depth * columns * gradients,
        triton.cdiv(batch, depth) * triton.cdiv(capacity, slots) * across,
        dim * (batch * wide + capacity * size) + batch * capacity * wide,
    )
    whole = choose("normalisation", arch, dtype, dim)
    turned = (whole.slots * dim * (2 * size + wide), 0, 0, 0)
    unfinished = {} if dtype != accumulation_dtype(dtype) else {"grad_unit_ptr": None}
    return [
        specimen("logits", _logits_kernel, stream, forward, **bare),
        specimen("logits, every option", _logits_kernel, stream, (*forward[:2], 0, 0)),
        specimen("slopes", _slopes_kernel, other, slopes),
        specimen("gradient of embeddings", _embeddings_gradient_kernel, other, embeddings, **bare, CONTINUES=False),
        specimen("gradient of embeddings, every option", _embeddings_gradient_kernel, other, (*embeddings[:2], 0, 0)),
        specimen("gradient of prototypes", _prototypes_gradient_kernel, other, prototypes, **bare),
        specimen("gradient of prototypes, every option", _prototypes_gradient_kernel, other, (*prototypes[:2], 0, 0)),
        specimen("normalisation", _normalisation_kernel, whole, turned, BLOCK_COLUMNS=padded(dim), **unfinished),
    ]
