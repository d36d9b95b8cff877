"""Triton kernels: one file per operator. They run on NVIDIA GPUs, and on the CPU in Triton's interpreter.

``KERNELS`` is what the dispatch sees. Triton itself is imported at the first call, so that importing the package stays
quick and works where there is no Triton. ``TRITON_INTERPRET=1``, set before that first call, runs every kernel in the
interpreter, on CPU tensors too: that is how the tests execute them without a GPU.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

NOT_INSTALLED = "triton is not installed (pip install triton; it exists for Linux and comes with CUDA builds of torch)"

# operator -> the module in this folder that holds it
OPERATORS: dict[str, str] = {
    "aggregate_prototypes": "aggregate_prototypes",
    "aggregate_prototypes_backward": "aggregate_prototypes",
    "enqueue_": "enqueue",
    "hardest_negatives": "hardest_negatives",
    "hardest_negatives_backward": "hardest_negatives",
    "margin_softmax_logits": "margin_softmax_logits",
    "margin_softmax_logits_backward": "margin_softmax_logits",
    "negative_logsumexp": "negative_logsumexp",
    "negative_logsumexp_backward_": "negative_logsumexp",
}


def _on_first_call(operator: str) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        module = importlib.import_module(f"protomem_kernels.triton.{OPERATORS[operator]}")
        with torch.cuda.device_of(args[0]):  # Triton launches on the current device; nothing happens for CPU tensors
            return getattr(module, operator)(*args)

    kernel.__name__ = operator
    return kernel


KERNELS: dict[str, Callable[..., Any]] = {operator: _on_first_call(operator) for operator in OPERATORS}


@functools.cache
def interpreted() -> bool:
    """Say whether kernels run in Triton's interpreter instead of on a GPU; settled at the first call."""
    return os.environ.get("TRITON_INTERPRET") == "1"


# It costs more than a small call of an operator.
_is_installed = functools.cache(lambda: importlib.util.find_spec("triton") is not None)


@functools.cache
def unavailable() -> str | None:
    """Return why no call can be served here, or None if some can."""
    if not _is_installed():
        return NOT_INSTALLED
    if not interpreted() and not torch.cuda.is_available():
        return "torch sees no GPU, and TRITON_INTERPRET=1 is not set"
    return None


def refuses(operator: str, tensors: Sequence[Tensor]) -> str | None:
    """Return why these tensors cannot be served, or None if they can."""
    for tensor in tensors:
        if not tensor.is_cuda and not (tensor.is_cpu and interpreted()):
            return f"serves tensors on a GPU, got one on {tensor.device}"
    return None


def on_gpu(operator: str, tensors: Sequence[Tensor], architecture: int) -> str | None:
    """Return why such tensors on a GPU of this compute capability, 90 for 9.0, could not be served, or None."""
    if not _is_installed():
        return NOT_INSTALLED
    if operator not in OPERATORS:
        return f"has no kernel for {operator}"
    return None if architecture >= 80 else f"serves sm_80 and newer, and this is sm_{architecture}"
