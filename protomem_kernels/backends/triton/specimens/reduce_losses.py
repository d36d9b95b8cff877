"""The kernel of ``reduce_losses``."""

from __future__ import annotations

import torch

from protomem_kernels.backends.triton.launch import choose, triton_type
from protomem_kernels.backends.triton.reduce_losses import KINDS, losses_kernel
from protomem_kernels.backends.triton.specimens import Specimen, arguments
from protomem_kernels.rows import accumulation_dtype


def specimens(arch: int, dtype: torch.dtype, dim: int) -> list[Specimen]:
    """Describe the kernel for the compile tests and the static report: of an angle, which has all that others have."""
    wide = accumulation_dtype(dtype)
    how = choose("losses", arch, wide, 16)
    types = {name: f"*{triton_type(wide)}" for name in losses_kernel.arg_names if name.endswith("_ptr")}
    types |= {"targets_ptr": "*i64", "batch": "i32", "capacity": "i32"}
    types |= dict.fromkeys(["margin", "cos_margin", "sin_margin", "floor", "scale"], "fp64")
    return [
        Specimen(
            name="losses",
            **arguments(losses_kernel, types, {"KIND": KINDS["angle"], "MEAN": True, "BLOCK": how.slots}),
            warps=how.warps,
            stages=how.stages,
            bytes_per_tile=how.slots * (4 * wide.itemsize + 8),
        )
    ]
