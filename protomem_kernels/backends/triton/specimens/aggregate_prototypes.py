"""The kernels of ``aggregate_prototypes``."""

from __future__ import annotations

import torch
import triton

from protomem_kernels.backends.triton.aggregate_prototypes import backward_kernel, order_kernel, sum_kernel
from protomem_kernels.backends.triton.launch import choose, triton_type
from protomem_kernels.backends.triton.specimens import Specimen
from protomem_kernels.rows import accumulation_dtype


def specimens(arch: int, dtype: torch.dtype, dim: int) -> list[Specimen]:
    """Describe the kernels for the compile tests and the static report: weighted, normalising, int64 labels."""
    given, sums = f"*{triton_type(dtype)}", f"*{triton_type(accumulation_dtype(dtype))}"
    bits, wide = dtype.itemsize, accumulation_dtype(dtype).itemsize
    pairs = choose("order of labels", arch, dtype, dim)
    few, kept = choose("samples", arch, accumulation_dtype(dtype), dim), triton.next_power_of_2(dim)
    numbers = {"size": "i32", "dim": "i32", "rows": "i32", "stride_embedding": "i32"}
    columns = {"stride_column": 1, "stride_weight": 1}
    tile = {"NORMALIZE": True, "BLOCK_SAMPLES": few.rows, "BLOCK_D": kept}
    notes = {"order_ptr": "*i32", "length_ptr": "*i32", "head_ptr": "*i8", "index_ptr": "*i64", "labels_ptr": "*i64"}
    order = Specimen(
        name="order",
        kernel=order_kernel,
        signature=notes | {"size": "i32"},
        constexprs={"stride_label": 1, "BLOCK_ROWS": pairs.rows, "BLOCK_KEYS": pairs.slots},
        warps=pairs.warps,
        stages=pairs.stages,
        bytes_per_tile=pairs.rows * (8 + 4 + 4 + 1 + 8),
    )
    forward = Specimen(
        name="sum",
        kernel=sum_kernel,
        signature=notes
        | dict.fromkeys(["prototypes_ptr", "mass_ptr", "norm_ptr"], sums)
        | {"embeddings_ptr": given, "weights_ptr": sums, "identities_ptr": "*i64"}
        | numbers,
        constexprs=columns | tile | {"stride_label": 1, "BLOCK_FLAGS": few.slots},
        warps=few.warps,
        stages=few.stages,
        aligned=("dim", "stride_embedding"),
        bytes_per_tile=few.rows * (dim * bits + wide + 8),
    )
    strides = ["stride_grad_mass", "stride_index", "stride_mass", "stride_norm"]
    backward = Specimen(
        name="backward",
        kernel=backward_kernel,
        signature={name: sums for name in backward_kernel.arg_names if name.endswith("_ptr")}
        | {"embeddings_ptr": given, "grad_embeddings_ptr": given, "index_ptr": "*i64"}
        | numbers
        | {"stride_grad": "i32", "stride_prototype": "i32"},
        constexprs=columns | tile | dict.fromkeys([*strides, "stride_grad_column", "stride_prototype_column"], 1),
        warps=few.warps,
        stages=few.stages,
        aligned=("dim", "stride_embedding", "stride_grad", "stride_prototype"),
        bytes_per_tile=few.rows * 2 * dim * (bits + wide),
    )
    return [order, forward, backward]
