"""The kernels that finish a chunk's logits and turn their gradients into those of cosines."""

from __future__ import annotations

import torch

from protomem_kernels.backends.chunked.margin_softmax_logits import finish_kernel, gradients_kernel
from protomem_kernels.backends.chunked.specimens import BARE, parts, specimen
from protomem_kernels.backends.triton.launch import triton_type
from protomem_kernels.backends.triton.specimens import Specimen
from protomem_kernels.rows import accumulation_dtype


def specimens(arch: int, dtype: torch.dtype, dim: int) -> list[Specimen]:
    """Describe the kernels for the compile tests and the static report, for a memory of ``dtype``."""
    kind = torch.bfloat16 if dtype == torch.bfloat16 else accumulation_dtype(dtype)  # of the weights of gradients
    found = [
        specimen("finish, every option", finish_kernel, arch, dtype, parts(dtype)),
        specimen("gradients", gradients_kernel, arch, dtype, 1, logits_ptr=None, **BARE),
        specimen("gradients, every option", gradients_kernel, arch, dtype, parts(dtype)),
    ]
    for each in found[1:]:
        each.signature["weights_ptr"] = f"*{triton_type(kind)}"
    return found
