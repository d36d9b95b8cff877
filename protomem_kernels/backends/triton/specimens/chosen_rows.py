"""The kernel that takes gradients of a few cosines to the prototypes."""

from __future__ import annotations

import torch

from protomem_kernels.backends.triton import launch
from protomem_kernels.backends.triton.chosen_rows import chosen_rows_kernel
from protomem_kernels.backends.triton.specimens import Specimen
from protomem_kernels.rows import accumulation_dtype


def specimens(arch: int, dtype: torch.dtype, dim: int) -> list[Specimen]:
    """Describe the kernel for the compile tests and the static report."""
    kind, acc = launch.triton_type(dtype), launch.triton_type(accumulation_dtype(dtype))
    how = launch.choose("chosen rows", arch, dtype, dim)
    pointers = {
        "grad_prototypes_ptr": f"*{kind}",
        "sorted_ptr": "*i64",
        "order_ptr": "*i64",
        "coefficients_ptr": f"*{acc}",
        "x_ptr": f"*{acc}",
        "prototypes_ptr": f"*{kind}",
    }
    numbers = dict.fromkeys(["entries", "chosen", "dim", "stride_x_row", "stride_w_row"], "i32")
    compile_time = {"stride_x_column": 1, "stride_w_column": 1, "BLOCK_DIM": launch.padded(dim)}
    return [
        Specimen(
            name=f"chosen_rows_backward{' normalized' if normalize else ''}",
            kernel=chosen_rows_kernel,
            signature=pointers | numbers | dict.fromkeys([*compile_time, "NORMALIZE"], "constexpr"),
            constexprs=compile_time | {"NORMALIZE": normalize},
            warps=how.warps,
            stages=how.stages,
            aligned=(*pointers, "dim", "stride_x_row", "stride_w_row"),
            bytes_per_tile=dim * accumulation_dtype(dtype).itemsize,
        )
        for normalize in (False, True)
    ]
