"""Triton kernels: one file per operator. They run on NVIDIA GPUs, and on the CPU in Triton's interpreter.

Triton itself is imported at the first call, so that importing the package stays quick and works where there is no
Triton. ``TRITON_INTERPRET=1``, set before that first call, runs every kernel in the interpreter, on CPU tensors too:
that is how the tests execute them without a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from protomem_kernels.backends import precision
from protomem_kernels.backends.operators import file_of, is_backward
from protomem_kernels.backends.protocol import FolderBackend, Kernel
from protomem_kernels.backends.rates import FLOAT64, HALF, TF32, Products
from protomem_kernels.backends.triton.interpretation import interpreted as interpreted
from protomem_kernels.backends.triton.launch import choose, padded

NOT_INSTALLED = "triton is not installed (pip install triton; it exists for Linux and comes with CUDA builds of torch)"
OLDEST_ARCHITECTURE = 80


# It costs more than a small call of an operator.
_is_installed = functools.cache(lambda: importlib.util.find_spec("triton") is not None)


@functools.cache
def _unavailable() -> str | None:
    if not _is_installed():
        return NOT_INSTALLED
    if not interpreted() and not torch.cuda.is_available():
        return "torch sees no GPU, and TRITON_INTERPRET=1 is not set"
    return None


class TritonBackend(FolderBackend):
    """The kernels of this folder."""

    def find(self, operator: str) -> Kernel | None:
        """Return a function that imports the operator's file, and with it Triton, at its first call."""
        if not self.has_file(operator):
            return None
        load = functools.cache(self.load)

        def kernel(*args: Any) -> Any:
            with torch.cuda.device_of(args[0]):  # Triton launches on the current device; nothing for CPU tensors
                return load(operator)(*args)

        kernel.__name__ = operator
        return kernel

    def unavailable(self) -> str | None:
        """Return why no call can be served here, or None if some can."""
        return _unavailable()

    def refuses(self, operator: str, tensors: Sequence[Tensor]) -> str | None:
        """Return why these tensors cannot be served, or None if they can."""
        for tensor in tensors:
            if not tensor.is_cuda and not (tensor.is_cpu and interpreted()):
                return f"serves tensors on a GPU, got one on {tensor.device}"
        return None

    def needs_check(self, tensors: Sequence[Tensor]) -> bool:
        """Return True on a GPU."""
        return tensors[0].is_cuda

    def products(self, operator: str, dtype: torch.dtype, dim: int, architecture: int) -> Products | None:
        """Return the products that a call forms on a GPU.

        Where a result of D columns does not fit beside the rest, the first product is formed once per part of it.
        """
        each = 1 if dtype == torch.float64 or (dtype == torch.float32 and precision.tf32()) else 3
        wide = FLOAT64 if dtype == torch.float64 else TF32
        if file_of(operator) == "negative_logsumexp":
            backward = is_backward(operator)
            kind = "gradient of slots" if backward else "stream with moment"
            times = padded(dim) // choose(kind, architecture, dtype, dim).columns
            if dtype.itemsize > 2:
                return Products(each * (times + 1), wide)
            parts = precision.halves(dtype)
            return Products(parts * times + (parts if backward else 1), HALF)
        if is_backward(operator):  # of the logits: two products, of gradients that float16 cannot hold
            return Products(2, HALF) if dtype == torch.bfloat16 else Products(2 if wide == FLOAT64 else 6, wide)
        exact = {torch.bfloat16: 3, torch.float16: 2}  # numbers that stand for one of float32
        return Products(exact[dtype], HALF) if dtype in exact else Products(1 if wide == FLOAT64 else 3, wide)

    def on_gpu(self, operator: str, tensors: Sequence[Tensor], architecture: int) -> str | None:
        """Return why such tensors on a GPU of this compute capability, 90 for 9.0, could not be served, or None."""
        if not _is_installed():
            return NOT_INSTALLED
        if architecture < OLDEST_ARCHITECTURE:
            return f"serves sm_{OLDEST_ARCHITECTURE} and newer, and this is sm_{architecture}"
        return super().on_gpu(operator, tensors, architecture)


BACKEND = TritonBackend("triton", __name__)
