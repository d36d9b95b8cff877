"""Products by PyTorch's own GEMM, chunk by chunk of the memory, and between them one small Triton kernel.

The logits of a chunk stay, for the most part, in the L2 cache of the device. The products run at the speed of the
vendor's library, which no kernel written in Triton reaches on the newest GPUs; what a chunk costs besides is its
logits' way through that cache.

This backend is built on ``triton``: it serves where that does, on NVIDIA GPUs, and on CPU tensors while
``TRITON_INTERPRET=1``; and whatever works on chosen rows, or on a batch alone, is done by the same kernels.
"""

from __future__ import annotations

import torch

from protomem_kernels.backends import precision
from protomem_kernels.backends.operators import file_of, is_backward
from protomem_kernels.backends.protocol import Kernel
from protomem_kernels.backends.rates import FLOAT32, FLOAT64, HALF, TF32, Products
from protomem_kernels.backends.triton import BACKEND as TRITON
from protomem_kernels.backends.triton import TritonBackend


class ChunkedBackend(TritonBackend):
    """The kernels of this folder, and those of ``triton`` for the operators that it has no file of."""

    def find(self, operator: str) -> Kernel | None:
        """Return this folder's kernel, else Triton's."""
        return super().find(operator) or TRITON.kernel(operator)

    def products(self, operator: str, dtype: torch.dtype, dim: int, architecture: int) -> Products | None:
        """Return the products that a call forms on a GPU: whatever D is, each once."""
        wide = FLOAT64 if dtype == torch.float64 else TF32 if precision.tf32() else FLOAT32
        if file_of(operator) == "negative_logsumexp":
            parts = precision.halves(dtype)
            count = 2 * parts if is_backward(operator) else parts + 1
        else:
            count = 2 if is_backward(operator) else precision.parts(dtype)
        in_halves = dtype == torch.bfloat16 or (dtype == torch.float16 and operator != "margin_softmax_logits_backward")
        return Products(count, HALF if in_halves else wide)


BACKEND = ChunkedBackend("chunked", __name__)
