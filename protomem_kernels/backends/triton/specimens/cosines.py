"""The kernel that finds the lengths of all prototypes."""

from __future__ import annotations

import torch

from protomem_kernels.backends.triton.cosines import inverse_lengths_kernel
from protomem_kernels.backends.triton.launch import choose, triton_type
from protomem_kernels.backends.triton.specimens import Specimen, arguments
from protomem_kernels.rows import accumulation_dtype


def specimens(arch: int, dtype: torch.dtype, dim: int) -> list[Specimen]:
    """Describe the kernel for the compile tests and the static report."""
    types = {"prototypes_ptr": f"*{triton_type(dtype)}", "inverse_ptr": f"*{triton_type(accumulation_dtype(dtype))}"}
    types |= dict.fromkeys(["capacity", "dim", "stride_w_row"], "i32")
    how = choose("inverse lengths", arch, dtype, dim)
    return [
        Specimen(
            name="inverse lengths",
            **arguments(inverse_lengths_kernel, types, how.blocks()),
            warps=how.warps,
            stages=how.stages,
            aligned=("dim", "stride_w_row"),
            bytes_per_tile=how.slots * dim * dtype.itemsize,
        )
    ]
