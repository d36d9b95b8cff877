"""``graphed``: a whole step of a training head, forward and backward, as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from protomem_kernels.losses import MarginSoftmaxLoss, PrototypeMemoryLoss
from protomem_kernels.ops.once import once_differentiable
from protomem_kernels.warm_up import warm_up

Step: TypeAlias = Callable[..., Tensor]


def graphed(loss_fn: PrototypeMemoryLoss | MarginSoftmaxLoss, example: tuple[Tensor, ...]) -> Step:
    """Capture a step of the head on batches like ``example``; return a function that is called as the head is.

    A step costs the host one launch instead of some forty operations, which take Python as long as a GPU where the
    memory is not large. The gradients of the embeddings, and of the head's parameters, are computed in the forward pass
    already; backward multiplies them by what comes from above.

    Args:
        loss_fn: the head, on a GPU, in training mode, with ``reduction`` "mean" or "sum", of one process. Its kernels
            are checked and compiled first (``warm_up``); capturing moves nothing of its state.
        example: embeddings and labels, or embeddings, labels and weights, of the shapes and dtypes to come.

    Returns:
        ``step(embeddings, labels, weights=None) -> loss``; arguments must be like the example's. The loss is a new
        tensor each time, and can be differentiated once. Options of the head that are changed later are not seen.

    Raises:
        TypeError: ``loss_fn`` is no head, or the example holds something else than tensors.
        ValueError: the head or the example is not as said above; later, a batch that is not like the example.

    Source: CUDA graphs as in ``torch.cuda.make_graphed_callables``, which leaves state that a forward pass moves to its
    caller: that captures the backward pass by a second run, which would enqueue the example.
    """
    if not isinstance(loss_fn, (PrototypeMemoryLoss, MarginSoftmaxLoss)):
        raise TypeError(f"loss_fn must be a PrototypeMemoryLoss or MarginSoftmaxLoss, got {type(loss_fn).__name__}")
    if not all(isinstance(tensor, Tensor) for tensor in example) or len(example) not in (2, 3):
        raise TypeError("example must be (embeddings, labels) or (embeddings, labels, weights), all of them tensors")
    if loss_fn.reduction == "none":
        raise ValueError("loss_fn must have reduction 'mean' or 'sum', got 'none': a graph has one loss")
    if not loss_fn.training:
        raise ValueError("loss_fn must be in training mode: reading a memory needs no graph")
    if not loss_fn.ranks.alone:
        raise ValueError("loss_fn must be of one process: collectives are not captured")
    _check_place(example)
    warm_up(loss_fn, len(example[0]), example[0].dtype)
    kept = [tensor.detach().clone() for tensor in example]
    kept[0].requires_grad_()
    parameters = [parameter for parameter in loss_fn.parameters() if parameter.requires_grad]
    wanted = [kept[0], *parameters]

    def once() -> tuple[Tensor, ...]:
        loss = loss_fn(*kept)
        grads = torch.autograd.grad(loss, wanted, allow_unused=True)
        zeros = (torch.zeros_like(of) if grad is None else grad for grad, of in zip(grads, wanted, strict=True))
        return loss.detach(), *zeros

    replay, results = _captured(once)

    def step(embeddings: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        given = [embeddings, labels, *([] if weights is None else [weights])]
        _check_like(given, kept)
        for place, tensor in zip(kept, given, strict=True):
            place.detach().copy_(tensor.detach())
        replay()
        loss: Tensor = _Replayed.apply(results, embeddings, *parameters)  # type: ignore[no-untyped-call]
        return loss

    return step


class _Replayed(torch.autograd.Function):
    """The loss that a replay has left, with the gradients that it has left."""

    @staticmethod
    def forward(ctx: Any, results: tuple[Tensor, ...], *inputs: Tensor) -> Tensor:
        loss, *grads = results
        ctx.save_for_backward(*(grad.clone() for grad in grads))  # the next replay writes over them
        ctx.unsaved = inputs
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _multiplied(ctx, grad)


def _multiply(ctx: Any, grad: Tensor) -> Any:
    return None, *(grad * each for each in ctx.saved_tensors)


_multiplied = once_differentiable("graphed", _multiply)


def _check_place(example: tuple[Tensor, ...]) -> None:
    if not all(tensor.is_cuda for tensor in example):
        places = ", ".join(str(tensor.device) for tensor in example)
        raise ValueError(f"example must lie on a GPU, which CUDA graphs are of, got {places}")


def _check_like(given: list[Tensor], kept: list[Tensor]) -> None:
    """Refuse a batch that the graph was not captured for."""
    if len(given) != len(kept):
        raise ValueError(f"weights must be given just as in the example: it had {len(kept)} tensors, got {len(given)}")
    for name, ours, theirs in zip(("embeddings", "labels", "weights"), given, kept, strict=False):
        if (ours.shape, ours.dtype, ours.device) != (theirs.shape, theirs.dtype, theirs.device):
            raise ValueError(
                f"{name} must be like the example's, {theirs.dtype} {tuple(theirs.shape)} on {theirs.device}, "
                f"got {ours.dtype} {tuple(ours.shape)} on {ours.device}"
            )


def _captured(step: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], object], tuple[Tensor, ...]]:
    """Capture a step, which does not run it; return what replays it, and where its results will lie."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph.replay, results
