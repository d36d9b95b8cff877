"""``prepare_samples``: a batch's targets and unit rows in one launch. Contract, checks, fake kernel and autograd."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from protomem_kernels.backends.operators import BATCH
from protomem_kernels.ops.call import call
from protomem_kernels.ops.problems import problems
from protomem_kernels.ops.register import register
from protomem_kernels.rows import accumulation_dtype


def prepare_samples(
    embeddings: Tensor, labels: Tensor, index: Tensor, slots: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each sample's unit row and target in a memory that its identity was just written into.

    Where every operation is a launch, this takes the place of some forty of plain PyTorch's.

    Args:
        embeddings: (B, D) floating, raw.
        labels: (B,) int; negative: no label.
        index: (B,) int64, the row of ``slots`` that belongs to a sample's identity; negative: none.
        slots: (P,) int64, where identities stand; -1: nowhere.
        capacity: M.

    Returns:
        ``x`` (B, D), unit rows in the accumulation dtype, zero where the embedding or the target is none,
        differentiable in ``embeddings``; ``norm`` (B,) their lengths, 0 likewise, a constant; ``targets`` (B,) int64.
        A sample with a label, no slot and a non-finite embedding has target 0, so that its loss tells.
    """
    result: tuple[Tensor, Tensor, Tensor] = call("prepare_samples", embeddings, labels, index, slots, capacity)
    return result


def _fake(embeddings: Tensor, labels: Tensor, index: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(embeddings.dtype)
    return (
        embeddings.new_empty(embeddings.shape, dtype=dtype),
        embeddings.new_empty(embeddings.shape[0], dtype=dtype),
        index.new_empty(index.shape, dtype=torch.int64),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, norm, targets = output
    ctx.mark_non_differentiable(norm, targets)
    ctx.set_materialize_grads(False)  # no zeros for what has no gradient
    ctx.save_for_backward(inputs[0], x, norm)


def _backward(ctx: Any, grad_x: Tensor | None, *_: Any) -> Any:
    if grad_x is None:
        return None, None, None, None, None
    embeddings, x, norm = ctx.saved_tensors
    return call("prepare_samples_backward", grad_x, embeddings, x, norm), None, None, None, None


def _problems(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for x, prototypes, targets, _, _ in problems(dtype):
        embeddings = 7 * x.to(dtype)
        embeddings[-1:] = 0
        index = torch.arange(len(x)) // 2
        index[1:2] = -1
        slots = torch.where(torch.arange(len(x)) % 5 == 3, -1, targets)
        yield embeddings, torch.where(targets < 0, -1, targets), index, slots, len(prototypes)


def _backward_problems(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for embeddings, *_ in _problems(dtype):
        wide = embeddings.to(accumulation_dtype(dtype))
        norm = wide.norm(dim=1)
        yield wide.roll(1, dims=1), embeddings, wide / norm.clamp(min=1e-6)[:, None], norm


register(
    "prepare_samples",
    works_through=BATCH,
    problems=_problems,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
register(
    "prepare_samples_backward",
    works_through=BATCH,
    problems=_backward_problems,
    fake=lambda grad_x, embeddings, *_: embeddings.new_empty(embeddings.shape),
)
