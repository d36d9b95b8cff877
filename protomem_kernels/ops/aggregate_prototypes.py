"""``aggregate_prototypes``: contract, checks, fake kernel and autograd."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from protomem_kernels._checks import check_batch, check_int, check_weights, refuse_bad_weights
from protomem_kernels.backends.choice import BACKENDS
from protomem_kernels.backends.operators import BATCH
from protomem_kernels.ops.call import call
from protomem_kernels.ops.problems import problems
from protomem_kernels.ops.register import register
from protomem_kernels.rows import accumulation_dtype
from protomem_kernels.types import AggregatedPrototypes


def aggregate_prototypes(
    embeddings: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    normalize: bool = True,
    max_identities: int | None = None,
) -> AggregatedPrototypes:
    """Make one quality-weighted prototype of every identity in the batch.

    With ``x_i`` the embedding of sample i (scaled to unit length first if ``normalize``) and ``q_i`` its weight,
    identity c gets ``m_c = sum q_i x_i`` over its samples and the prototype ``m_c / |m_c|``. Where an identity's
    weights sum to zero, its samples count equally. A row is zero where ``|m_c| <= 1e-6 sum q_i |x_i|`` or where
    anything in it is not finite; other identities are not touched by it. Samples are added in batch order, so the
    result is reproducible bit for bit. Differentiable in ``embeddings`` and ``weights``; a zero row passes zero
    gradient.

    Args:
        embeddings: (B, D) floating, raw encoder outputs.
        labels: (B,) int64 or int32, the identity of each sample; negative: the sample takes no part.
        weights: (B,) floating, the quality of each image, >= 0. Default: all 1, plain Prototype Memory.
        normalize: scale embeddings to unit length before they are summed.
        max_identities: give every output this many rows and read nothing back to the host; unused rows hold identity
            -1, a zero prototype and mass 0. Default: as many rows as there are identities, which on a GPU synchronises.

    Returns:
        ``AggregatedPrototypes(prototypes (P, D), identities (P,), index (B,), mass (P,))``; floating outputs are
        float32, or float64 for float64 embeddings.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device; on CPU tensors (elsewhere under ``PROTOMEM_DEBUG=1``) a negative or
            non-finite weight, or more identities than ``max_identities``. Unchecked on a GPU, a bad weight counts as 0
            and identities past ``max_identities`` get index -1.

    Example:
        >>> e = torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.0, 1.0]])
        >>> p = aggregate_prototypes(e, torch.tensor([7, 5, 5]))
        >>> p.identities, p.index, p.prototypes
        (tensor([5, 7]), tensor([1, 0, 0]), tensor([[0., 1.],
                [1., 0.]]))

    Source: Prototype Memory, arXiv 2105.02103, section 3; weights: Quality-Aware Prototype Memory, arXiv 2311.07734.
    """
    labels = check_batch(embeddings, labels)
    check_weights(weights, embeddings)
    if max_identities is not None:
        check_int("max_identities", max_identities, at_least=0)
    outputs = call("aggregate_prototypes", embeddings, labels, weights, normalize, max_identities)
    return AggregatedPrototypes(*outputs[:4])


def _check_values(
    embeddings: Tensor, labels: Tensor, weights: Tensor | None, normalize: bool, max_identities: int | None
) -> None:
    if weights is not None:
        refuse_bad_weights(weights)
    if max_identities is not None and max_identities < labels.shape[0]:
        present = int(labels[labels >= 0].unique().numel())
        if present > max_identities:
            raise ValueError(
                f"max_identities (of a memory: its capacity) must be at least {present}, the number of identities "
                f"in labels, got {max_identities}"
            )


def _fake(
    embeddings: Tensor, labels: Tensor, weights: Tensor | None, normalize: bool, max_identities: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = torch.library.get_ctx().new_dynamic_size() if max_identities is None else max_identities
    dtype = accumulation_dtype(embeddings.dtype)
    return (
        embeddings.new_empty(rows, embeddings.shape[1], dtype=dtype),
        labels.new_empty(rows, dtype=torch.int64),
        labels.new_empty(labels.shape, dtype=torch.int64),
        embeddings.new_empty(rows, dtype=dtype),
        embeddings.new_empty(rows, dtype=dtype),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    embeddings, _, weights, normalize, _ = inputs
    prototypes, identities, index, mass, norm = output
    ctx.mark_non_differentiable(identities, index, norm)
    ctx.save_for_backward(embeddings, weights, index, prototypes, mass, norm)
    ctx.normalize = normalize


def _backward(ctx: Any, grad_prototypes: Tensor, _i: Tensor, _x: Tensor, grad_mass: Tensor, _n: Tensor) -> Any:
    embeddings, weights, index, prototypes, mass, norm = ctx.saved_tensors
    grad_embeddings, grad_weights = call(
        "aggregate_prototypes_backward",
        grad_prototypes,
        grad_mass,
        embeddings,
        weights,
        index,
        prototypes,
        mass,
        norm,
        ctx.normalize,
    )
    return grad_embeddings, None, grad_weights if weights is not None else None, None, None


def _backward_fake(
    grad_prototypes: Tensor, grad_mass: Tensor, embeddings: Tensor, weights: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor]:
    grad_weights = grad_mass.new_empty(embeddings.shape[0]) if weights is None else torch.empty_like(weights)
    return embeddings.new_empty(embeddings.shape), grad_weights


def _problems(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for problem in problems(dtype):
        embeddings = (7 * problem.x).to(dtype)
        labels = torch.where(problem.targets < 0, -1, problem.targets // 4)  # several samples of an identity
        yield embeddings, labels, None, True, len(labels)
        yield embeddings, labels, problem.grad.abs(), False, len(labels)


def _backward_problems(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    aggregate = BACKENDS["reference"].kernels["aggregate_prototypes"]
    for embeddings, labels, weights, normalize, rows in _problems(dtype):
        prototypes, _, index, mass, norm = aggregate(embeddings, labels, weights, normalize, rows)
        grad = prototypes.roll(1, dims=1)
        grad_mass = torch.cos(torch.arange(len(mass), dtype=mass.dtype))  # beside what cancels where an image is alone
        yield grad, grad_mass, embeddings, weights, index, prototypes, mass, norm, normalize


register(
    "aggregate_prototypes",
    works_through=BATCH,
    problems=_problems,
    fake=_fake,
    check_values=_check_values,
    setup_context=_setup_context,
    backward=_backward,
)
register(
    "aggregate_prototypes_backward",
    works_through=BATCH,
    problems=_backward_problems,
    fake=_backward_fake,
)
