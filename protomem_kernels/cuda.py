"""Loads the compiled CUDA part, or says why it cannot be used here.

The library ``_C_cuda`` registers its operators with PyTorch as ``protomem_cuda::<name>``, with the schemas of
``protomem::<name>``; ``KERNELS`` is what the dispatch sees of them. It is loaded only into a torch that has CUDA.
PROTOMEM_DISABLE_COMPILED=1, read at import, does without it.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from protomem_kernels.compiled import OLDEST_TORCH, SWITCHED_OFF, torch_is_too_old

FOLDER = Path(__file__).parent
LIBRARY = FOLDER / "_C_cuda.so"
# That it has kernels for: the small ones, and those on batch x memory.
PRODUCTS = (
    "negative_logsumexp",
    "negative_logsumexp_backward_",
    "hardest_negatives",
    "hardest_negatives_backward",
    "margin_softmax_logits",
    "margin_softmax_logits_backward",
)
OPERATORS = ("aggregate_prototypes", "aggregate_prototypes_backward", "enqueue_", *PRODUCTS)
LITTLE_SHARED_MEMORY = (86, 89, 120, 121)  # 99 KiB for a block
MOST_COLUMNS = 1024  # a row is held in registers: csrc/common/cuda/rows.cuh, csrc/cuda/chosen_rows.cuh
BUILD_IT = "to build it, install again where nvcc is: PROTOMEM_BUILD_CUDA=1 pip install ... (see docs/cuda.md)"


class Build(NamedTuple):
    """How the library was built: ``architectures`` are compute capabilities, ascending; the last one has PTX too."""

    version: str
    compiler: str
    torch_version: str
    architectures: list[str]


def read_build() -> Build | None:
    """Return how the library was built, or None if there is none."""
    if not LIBRARY.exists():
        return None
    return Build(**json.loads((FOLDER / "_C_cuda.json").read_text()))


def _why_not_built() -> str:
    note = FOLDER / "_C_cuda.missing.txt"  # setup.py leaves it
    return f"it was not built{f': {note.read_text()}' if note.exists() else ''}; {BUILD_IT}"


def _load() -> str | None:
    """Load the library into torch; return why that cannot be, or None."""
    if os.environ.get("PROTOMEM_DISABLE_COMPILED") == "1":
        return SWITCHED_OFF
    if torch_is_too_old():
        return f"it needs torch {'.'.join(map(str, OLDEST_TORCH))} or newer, and this is torch {torch.__version__}"
    if BUILD is None:
        return _why_not_built()
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    try:
        torch.ops.load_library(LIBRARY)
    except Exception as problem:  # whatever it is, other backends work
        return f"it does not load: {problem}; {BUILD_IT}"
    return None


BUILD = read_build()
_REASON = _load()
KERNELS: dict[str, Callable[..., Any]] = (
    {} if _REASON is not None else {name: getattr(torch.ops.protomem_cuda, name).default for name in OPERATORS}
)


@functools.cache
def _no_code_for(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    return no_code_for(10 * major + minor)


def no_code_for(architecture: int) -> str | None:
    """Return why the library has no code for GPUs of this compute capability, 90 for 9.0, or None if it has.

    Machine code for 8.0 runs on 8.6 too, but not on 9.0; PTX is compiled by the driver for whatever is newer.
    """
    if BUILD is None:
        return _why_not_built()
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


@functools.cache
def unavailable() -> str | None:
    """Return why no call can be served here, or None if some can."""
    return _REASON or (None if torch.cuda.is_available() else "torch sees no GPU")


def too_wide_for(operator: str, tensors: Sequence[Tensor], architecture: int) -> str | None:
    """Return why rows of these tensors do not fit into the shared memory of a block on such a GPU, or None."""
    streams = operator in PRODUCTS and operator != "hardest_negatives_backward"
    if not streams or architecture not in LITTLE_SHARED_MEMORY:
        return None
    wide = any(tensor.shape[1] > 512 for tensor in _rows(operator, tensors))
    return f"more than 512 columns do not fit into the shared memory of sm_{architecture}" if wide else None


def _rows(operator: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return those of the tensors that hold embeddings or prototypes."""
    rows = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.ndim == 2]
    # The first one is the gradient of (B, k) cosines, of (B, M) logits.
    return rows[1:] if operator in ("hardest_negatives_backward", "margin_softmax_logits_backward") else rows


@functools.cache
def _architecture(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def refuses(operator: str, tensors: Sequence[Tensor]) -> str | None:
    """Return why these tensors cannot be served, or None if they can."""
    for tensor in tensors:
        if not tensor.is_cuda:
            return f"serves tensors on a GPU, got one on {tensor.device}"
    if not tensors:
        return None
    return (
        exceeds(operator, tensors)
        or _no_code_for(tensors[0].device)
        or too_wide_for(operator, tensors, _architecture(tensors[0].device))
    )


def exceeds(operator: str, tensors: Sequence[Tensor]) -> str | None:
    """Return which limit of its kernels these tensors exceed, or None."""
    if operator not in OPERATORS:
        return None
    for tensor in _rows(operator, tensors):
        if tensor.shape[1] > MOST_COLUMNS:
            return f"serves rows of at most {MOST_COLUMNS} columns, got {tuple(tensor.shape)}"
        if tensor.dtype == torch.float64 and operator in PRODUCTS:
            return "its products are of float32, bfloat16 and float16, got float64"
    return None


def on_gpu(operator: str, tensors: Sequence[Tensor], architecture: int) -> str | None:
    """Return why such tensors on a GPU of this compute capability, 90 for 9.0, could not be served, or None."""
    if operator not in OPERATORS:
        return f"has no kernel for {operator}"
    return no_code_for(architecture) or exceeds(operator, tensors) or too_wide_for(operator, tensors, architecture)
