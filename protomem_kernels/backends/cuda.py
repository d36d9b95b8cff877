"""The compiled CUDA C++ kernels for NVIDIA GPUs.

The object is the plain library ``_C_cuda.so``, loaded only into a torch that has CUDA; beside it, in ``_C_cuda.json``,
stands how it was built.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from protomem_kernels.backends.native import FOLDER, NativeBackend, why_not_built
from protomem_kernels.backends.operators import BATCH, MEMORY, OPERATORS, file_of, is_backward
from protomem_kernels.backends.rates import HALF, TF32, Products

LIBRARY = FOLDER / "_C_cuda.so"
LITTLE_SHARED_MEMORY = (86, 89, 120, 121)  # 99 KiB for a block
MOST_COLUMNS = 1024  # a row is held in registers: csrc/cuda/base/rows.cuh, chosen_rows.cuh
BUILD_IT = "to build it, install again where nvcc and a CUDA build of torch are (see docs/cuda.md)"


class Build(NamedTuple):
    """How the library was built.

    Attributes:
        version: of this package.
        compiler: nvcc and the compiler behind it.
        torch_version: whose headers it saw.
        architectures: compute capabilities, ascending; the last one has PTX too.
        operators: the operators' files that are in it.
    """

    version: str
    compiler: str
    torch_version: str
    architectures: list[str]
    operators: list[str]


def read_build() -> Build | None:
    """Return how the library was built, or None if there is none, or none that its notes lie beside."""
    try:
        return Build(**json.loads(LIBRARY.with_suffix(".json").read_text())) if LIBRARY.exists() else None
    except (OSError, TypeError, ValueError):
        return None


BUILD = read_build()


def _load() -> str | None:
    """Load the library into torch; return why that cannot be, or None."""
    if BUILD is None:
        return f"{why_not_built('_C_cuda')}; {BUILD_IT}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    try:
        torch.ops.load_library(LIBRARY)
    except Exception as problem:  # whatever it is, other backends work
        return f"it does not load: {problem}; {BUILD_IT}"
    return None


class CudaBackend(NativeBackend):
    """The kernels of csrc/cuda."""

    def __init__(self) -> None:
        super().__init__("cuda", "protomem_cuda", "CUDA", _load)

    def unavailable(self) -> str | None:
        """Return why no call can be served here, or None if some can."""
        return self.missing or _no_gpu()

    def refuses(self, operator: str, tensors: Sequence[Tensor]) -> str | None:
        """Return why these tensors cannot be served, or None if they can."""
        for tensor in tensors:
            if not tensor.is_cuda:
                return f"serves tensors on a GPU, got one on {tensor.device}"
        if not tensors:
            return None
        device = tensors[0].device
        return (
            exceeds(operator, tensors) or _no_code_on(device) or too_wide_for(operator, tensors, _architecture(device))
        )

    def needs_check(self, tensors: Sequence[Tensor]) -> bool:
        """Return True on a GPU."""
        return tensors[0].is_cuda

    def built(self) -> str | None:
        """Return the architectures, the compilers and the torch of the library, if there is one."""
        if BUILD is None:
            return None
        names = ", ".join(f"sm_{name}" for name in BUILD.architectures)
        return f"for {names} and newer, by {BUILD.compiler}, against torch {BUILD.torch_version}"

    def products(self, operator: str, dtype: torch.dtype, dim: int, architecture: int) -> Products | None:
        """Return the products that a call forms on a GPU, whatever precision is in force."""
        if dtype == torch.float64:
            return None
        if dtype == torch.float32:
            return Products(6 if file_of(operator) == "negative_logsumexp" or is_backward(operator) else 3, TF32)
        cosines = 3 if dtype == torch.bfloat16 else 2  # exact to float32
        count = {"negative_logsumexp": 3, "negative_logsumexp_backward_": 3, "margin_softmax_logits_backward": 2}
        return Products(count.get(operator, cosines), HALF)

    def on_gpu(self, operator: str, tensors: Sequence[Tensor], architecture: int) -> str | None:
        """Return why such tensors on a GPU of this compute capability, 90 for 9.0, could not be served, or None."""
        if BUILD is not None and file_of(operator) not in BUILD.operators:
            return f"has no kernel for {operator}"
        return no_code_for(architecture) or exceeds(operator, tensors) or too_wide_for(operator, tensors, architecture)


@functools.cache
def _no_gpu() -> str | None:
    return None if torch.cuda.is_available() else "torch sees no GPU"


@functools.cache
def _architecture(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def _no_code_on(device: torch.device) -> str | None:
    return no_code_for(_architecture(device))


def no_code_for(architecture: int) -> str | None:
    """Return why the library has no code for GPUs of this compute capability, 90 for 9.0, or None if it has.

    Machine code for 8.0 runs on 8.6 too, but not on 9.0; PTX is compiled by the driver for whatever is newer.
    """
    if BUILD is None:
        return f"{why_not_built('_C_cuda')}; {BUILD_IT}"
    for name in BUILD.architectures:
        # A trailing "a" ties the code to that one architecture, "f" to its family.
        built = int(name.rstrip("af"))
        if built == architecture or (built < architecture and built // 10 == architecture // 10 and "a" not in name):
            return None
    newest = BUILD.architectures[-1]
    if newest.isdigit() and int(newest) <= architecture:
        return None
    names = ", ".join(f"sm_{name}" for name in BUILD.architectures)
    return f"it was built for {names} and newer (PROTOMEM_CUDA_ARCH_LIST), and this is sm_{architecture}"


def exceeds(operator: str, tensors: Sequence[Tensor]) -> str | None:
    """Return which limit of its kernels these tensors exceed, or None."""
    for tensor in _rows(tensors):
        if tensor.shape[1] > MOST_COLUMNS:
            return f"serves rows of at most {MOST_COLUMNS} columns, got {tuple(tensor.shape)}"
        if tensor.dtype == torch.float64 and OPERATORS[operator] != BATCH:
            return "its products are of float32, bfloat16 and float16, got float64"
    return None


def too_wide_for(operator: str, tensors: Sequence[Tensor], architecture: int) -> str | None:
    """Return why rows of these tensors do not fit into the shared memory of a block on such a GPU, or None."""
    if OPERATORS[operator] != MEMORY or architecture not in LITTLE_SHARED_MEMORY:
        return None
    wide = any(tensor.shape[1] > 512 for tensor in _rows(tensors))
    return f"more than 512 columns do not fit into the shared memory of sm_{architecture}" if wide else None


def _rows(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return those of the tensors that hold embeddings or prototypes: as wide as the last one, which does.

    Gradients of (B, k) cosines and of (B, M) logits come before it, and are no rows.
    """
    matrices = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.ndim == 2]
    return [tensor for tensor in matrices if tensor.shape[1] == matrices[-1].shape[1]]


BACKEND = CudaBackend()
