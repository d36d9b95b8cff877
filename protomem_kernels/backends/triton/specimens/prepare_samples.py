"""The kernels of ``prepare_samples``."""

from __future__ import annotations

import torch

from protomem_kernels.backends.triton.launch import choose, padded, triton_type
from protomem_kernels.backends.triton.prepare_samples import samples_backward_kernel, samples_kernel
from protomem_kernels.backends.triton.specimens import Specimen, arguments
from protomem_kernels.rows import accumulation_dtype


def specimens(arch: int, dtype: torch.dtype, dim: int) -> list[Specimen]:
    """Describe the kernels for the compile tests and the static report, for embeddings of ``dtype``."""
    given, wide = f"*{triton_type(dtype)}", accumulation_dtype(dtype)
    how = choose("targets", arch, wide, dim)
    types = dict.fromkeys(["embeddings_ptr", "grad_embeddings_ptr"], given)
    types |= dict.fromkeys(["x_ptr", "norm_ptr", "grad_x_ptr"], f"*{triton_type(wide)}")
    types |= dict.fromkeys(["sample_targets_ptr", "labels_ptr", "index_ptr", "slots_ptr"], "*i64")
    types |= dict.fromkeys(["batch", "dim", "identities", "capacity", "stride_x_row", "stride_grad_row"], "i32")
    fixed = {"BLOCK_ROWS": how.rows, "BLOCK_DIM": padded(dim)}
    return [
        Specimen(
            name=name,
            **arguments(kernel, types, fixed),
            warps=how.warps,
            stages=how.stages,
            aligned=("dim", "stride_x_row", "stride_grad_row"),
            bytes_per_tile=how.rows * dim * (dtype.itemsize + size),
        )
        for name, kernel, size in (
            ("samples", samples_kernel, wide.itemsize),
            ("samples, backward", samples_backward_kernel, 2 * wide.itemsize),
        )
    ]
