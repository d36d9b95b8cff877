"""How the kernels between two products describe themselves to the compiler: like those of ``triton.specimens``.

They form no products, and their logits lie in the L2 cache: no bound on time is stated for them one by one.
"""

from __future__ import annotations

from typing import Any

import torch

from protomem_kernels.backends.precision import HIGHEST, PARTS
from protomem_kernels.backends.triton import launch
from protomem_kernels.backends.triton.specimens import Specimen, arguments
from protomem_kernels.rows import accumulation_dtype

BARE = dict.fromkeys(["occupied_ptr", "inverse_ptr", "threshold_ptr", "coefficients_ptr"])  # None, each of them


def parts(dtype: torch.dtype) -> int:
    """Return the numbers that stand for one of an embedding in cosines that are results."""
    return PARTS[dtype][HIGHEST] if dtype in PARTS else 1


def halves(dtype: torch.dtype) -> int:
    """Return the same in ``negative_logsumexp``."""
    return 2 if dtype in PARTS else 1


def specimen(name: str, kernel: Any, arch: int, dtype: torch.dtype, count: int, **fixed: Any) -> Specimen:
    """Describe a kernel on the logits of a chunk, the sums of ``count`` products, beside a memory of ``dtype``."""
    how, wide = launch.choose("chunk", arch, dtype, 512), accumulation_dtype(dtype)
    pointers = [argument for argument in kernel.arg_names if argument.endswith("_ptr")]
    types = dict.fromkeys(pointers, f"*{launch.triton_type(wide)}")
    types |= {"targets_ptr": "*i64", "occupied_ptr": "*i1", "weights_ptr": f"*{launch.triton_type(dtype)}"}
    types |= dict.fromkeys(["first", "width", "batch", "capacity", "tiles", "stride_grad_row"], "i32")
    types |= dict.fromkeys(["scale", "lift", "offset"], "fp64")
    constants = {"PARTS": count, "BLOCK_ROWS": how.rows, "BLOCK_SLOTS": how.slots, **fixed}
    return Specimen(
        name=f"chunk: {name}",
        **arguments(kernel, types, constants),
        warps=how.warps,
        stages=how.stages,
        aligned=tuple(name for name in pointers if name not in fixed),
        bytes_per_tile=how.rows * how.slots * (count * wide.itemsize + dtype.itemsize),
    )
