"""How exact products of matrices are on a GPU, in PyTorch's words: "highest", "high" or "medium".

What each word means to a kernel stands in ``PARTS`` and ``tf32``; docs/gpu.md has the errors that come of it. The
kernels that serve CPU tensors, Triton's interpreter excepted, and the small operators are always exact.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

HIGHEST, HIGH, MEDIUM = "highest", "high", "medium"
PRECISIONS = (HIGHEST, HIGH, MEDIUM)
# Numbers of the memory's dtype that stand for one float32 number of an embedding, in cosines that are results: three of
# bfloat16, or two of float16, hold all its bits.
PARTS: dict[torch.dtype, dict[str, int]] = {
    torch.bfloat16: {HIGHEST: 3, HIGH: 2, MEDIUM: 1},
    torch.float16: {HIGHEST: 2, HIGH: 2, MEDIUM: 1},
}

_asked: ContextVar[str | None] = ContextVar("protomem_matmul_precision", default=None)


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Within the block, have the products of the GPU's kernels formed in this precision.

    Without a block ``torch.get_float32_matmul_precision()`` holds, which is "highest" unless somebody has set it. A
    backward pass takes the precision of its forward pass; that of a compiled function takes PyTorch's.

    Args:
        precision: "highest": cosines as exact as float32. "high": one product of tf32 numbers for one of float32; two
            numbers of bfloat16 instead of three beside such a memory. "medium": embeddings rounded once to the dtype
            of a 16-bit memory; like "high" for one of float32.

    Raises:
        ValueError: it is none of these.

    >>> with matmul_precision("medium"):
    ...     pass
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    token = _asked.set(precision)
    try:
        yield
    finally:
        _asked.reset(token)


def in_force() -> str:
    """Return the precision that holds here: the block's, else PyTorch's."""
    return _asked.get() or _of_torch()


def _of_torch() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # set by both of PyTorch's ways, which it does not bring together
        return HIGH if of_cublas() == "tf32" else HIGHEST


def tf32() -> bool:
    """Say whether one product of tf32 numbers stands for one of float32."""
    return in_force() != HIGHEST


def parts(dtype: torch.dtype) -> int:
    """Return how many numbers of ``dtype`` stand for one of the accumulation dtype where cosines are results."""
    return PARTS[dtype][in_force()] if dtype in PARTS else 1


def halves(dtype: torch.dtype) -> int:
    """Return the same where what they leave of x is counted to first order (``negative_logsumexp``): 2, 1 in medium."""
    return min(2, PARTS[dtype][in_force()]) if dtype in PARTS else 1


def of_cublas() -> str:
    """Return how PyTorch's own GPU products of float32 are formed now: "ieee" or "tf32"."""
    own = torch.backends.cuda.matmul.fp32_precision
    own = getattr(torch.backends, "fp32_precision", own) if own == "none" else own
    return "tf32" if own == "tf32" else "ieee"


@contextlib.contextmanager
def held_by_cublas() -> Iterator[None]:
    """Within the block have PyTorch's own GPU products of float32 formed in the precision that is in force.

    Its switch is the process's: it is moved only where a block of ``matmul_precision`` asks for something else.
    """
    wanted = "tf32" if tf32() else "ieee"
    if of_cublas() == wanted:
        yield
        return
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = wanted
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
