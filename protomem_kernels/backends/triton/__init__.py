"""Triton kernels: one file per operator. They run on NVIDIA GPUs, and on the CPU in Triton's interpreter.

Triton itself is imported at the first call, so that importing the package stays quick and works where there is no
Triton. ``TRITON_INTERPRET=1``, set before that first call, runs every kernel in the interpreter, on CPU tensors too:
that is how the tests execute them without a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from protomem_kernels.backends.protocol import FolderBackend, Kernel

NOT_INSTALLED = "triton is not installed (pip install triton; it exists for Linux and comes with CUDA builds of torch)"
OLDEST_ARCHITECTURE = 80


@functools.cache
def interpreted() -> bool:
    """Say whether kernels run in Triton's interpreter instead of on a GPU; settled at the first call."""
    return os.environ.get("TRITON_INTERPRET") == "1"


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

    def on_gpu(self, operator: str, tensors: Sequence[Tensor], architecture: int) -> str | None:
        """Return why such tensors on a GPU of this compute capability, 90 for 9.0, could not be served, or None."""
        if not _is_installed():
            return NOT_INSTALLED
        if architecture < OLDEST_ARCHITECTURE:
            return f"serves sm_{OLDEST_ARCHITECTURE} and newer, and this is sm_{architecture}"
        return super().on_gpu(operator, tensors, architecture)


BACKEND = TritonBackend("triton", __name__)
