"""The kernels that turn a chunk's logits into weights."""

from __future__ import annotations

import torch

from protomem_kernels.backends.chunked.specimens import BARE, halves, specimen
from protomem_kernels.backends.chunked.weights import probabilities_kernel, weights_kernel
from protomem_kernels.backends.triton.specimens import Specimen


def specimens(arch: int, dtype: torch.dtype, dim: int) -> list[Specimen]:
    """Describe the kernels for the compile tests and the static report, for a memory of ``dtype``."""
    fixed = dict.fromkeys(["maxima_ptr", "new_maxima_ptr", "rescale_ptr"])
    half = dtype == torch.float16
    headroom = {"HEADROOM": 10.0 if half else 0.0}
    unit = {} if half else {"unit_ptr": None}
    count = halves(dtype)

    def forward(name: str, **options: object) -> Specimen:
        return specimen(name, weights_kernel, arch, dtype, count, **headroom, **options)

    return [
        forward("weights", **BARE, **fixed),
        forward("weights, every option"),
        specimen("probabilities, every option", probabilities_kernel, arch, dtype, count, **unit),
    ]
