"""The kernel that takes the maxima of tiles from a chunk's logits."""

from __future__ import annotations

import torch

from protomem_kernels.backends.chunked.hardest_negatives import maxima_kernel
from protomem_kernels.backends.chunked.specimens import parts, specimen
from protomem_kernels.backends.triton.specimens import Specimen


def specimens(arch: int, dtype: torch.dtype, dim: int) -> list[Specimen]:
    """Describe the kernel for the compile tests and the static report, for a memory of ``dtype``."""
    return [specimen("maxima, every option", maxima_kernel, arch, dtype, parts(dtype))]
