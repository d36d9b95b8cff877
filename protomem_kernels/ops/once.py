"""Backward passes that can be differentiated no further: trying it raises an error that says so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def once_differentiable(name: str, backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``backward`` with results that raise where somebody differentiates them again.

    They are computed outside autograd; what autograd could follow of them would be a part of the second derivative.
    They depend on ``grads`` and on what was saved, which has to hold every argument that can require a gradient;
    ``ctx.unsaved`` may name more.
    """

    @functools.wraps(backward)
    def guarded(ctx: Any, *grads: Any) -> Any:
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():  # the usual case: no create_graph
            return results
        results = results if isinstance(results, tuple) else (results,)
        made = [result for result in results if result is not None]
        causes = (*grads, *ctx.saved_tensors, *getattr(ctx, "unsaved", ()))
        final = iter(_Final.apply(name, len(made), *made, *causes))  # type: ignore[no-untyped-call]
        return tuple(None if result is None else next(final) for result in results)

    return guarded


class _Final(torch.autograd.Function):
    """The first ``count`` of the tensors as they are, as functions of all of them whose gradient is an error."""

    @staticmethod
    def forward(name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{ctx.name} can be differentiated once: its backward pass has no gradient of its own (double backward, "
            "create_graph=True, torch.func.hessian). Form the logits in plain PyTorch instead."
        )
