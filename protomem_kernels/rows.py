"""Rows of embeddings and prototypes: dtype of their sums, unit length, refreshing. Plain PyTorch, for every room."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

AT_A_TIME = 512 * 1024  # elements that are scaled in place at a time: 2 MiB of float32
VANISHED = 1e-6  # a refreshed row this short has no direction: the new prototype takes its place


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64 and float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sine_floor(dtype: torch.dtype) -> float:
    """Return below what 1 - c^2 of a cosine c in ``dtype`` is mere rounding: a divisor is no smaller than this."""
    return 8 * torch.finfo(dtype).eps


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a gradient in ``dtype``; a finite number beyond float16's range becomes the largest of that range.

    A gradient is large where an angle is near 0 or pi, or the scale is. Infinities and NaN stay what they are.
    """
    if dtype == torch.float16 and x.dtype != dtype:
        largest = torch.finfo(dtype).max
        x = torch.where(torch.isfinite(x), x.clamp(-largest, largest), x)
    return x.to(dtype)


class _Widened(torch.autograd.Function):
    """A cast whose gradient is ``narrowed``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return narrowed(grad, ctx.dtype), None


def widened(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return ``x`` in the accumulation dtype, or a ``dtype`` at least as wide; gradients to float16 stay in range."""
    dtype = accumulation_dtype(x.dtype) if dtype is None else dtype
    if x.dtype == torch.float16 and dtype != x.dtype:
        wide: Tensor = _Widened.apply(x, dtype)  # type: ignore[no-untyped-call]
        return wide
    return x.to(dtype)


class _WidenedForLoss(torch.autograd.Function):
    """A cast to float32 and a number of no value, whose gradient is how far the loss's own gradient was scaled up."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        wide = x.to(torch.float32)
        return wide, wide.new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor, upstream: Tensor) -> Tensor:
        return torch.where(upstream <= 1, narrowed(grad, ctx.dtype), grad.to(ctx.dtype))


class _NotingUpstream(torch.autograd.Function):
    """The loss as it is; in backward its gradient's largest number goes to the second argument."""

    @staticmethod
    def forward(loss: Tensor, noted: Tensor) -> Tensor:
        return loss.view_as(loss)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        largest = torch.cat([grad.detach().abs().reshape(-1), grad.new_zeros(1)]).max()
        return grad, largest.to(torch.float32)


def widened_for_loss(embeddings: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return float16 embeddings in float32, and a function that the loss has to pass through; others as they are.

    Their gradient is ``narrowed``, so that it stays finite near the poles and at large scales, unless the loss was
    scaled up by more than 1: then an overflow stays one, for a ``GradScaler`` to see and to back off.
    """
    if embeddings.dtype != torch.float16:
        return embeddings, _as_it_is
    wide, noted = _WidenedForLoss.apply(embeddings)  # type: ignore[no-untyped-call]
    return wide, lambda loss: _NotingUpstream.apply(loss, noted)  # type: ignore[no-untyped-call]


def _as_it_is(loss: Tensor) -> Tensor:
    return loss


def _scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``x`` (..., D) with each row's largest entry divided out as a constant, and that entry (..., 1).

    So that squares neither overflow nor underflow. The entry counts as 1 for a zero row; a non-finite row becomes NaN.
    """
    largest = x.detach().abs().amax(dim=-1, keepdim=True)
    largest = torch.where(largest > 0, largest, 1)
    return x / largest, largest


def row_lengths(x: Tensor) -> Tensor:
    """Return the length of each row of ``x`` (..., D), (...); NaN for a non-finite one."""
    y, largest = _scaled(x)
    lengths: Tensor = torch.linalg.vector_norm(y, dim=-1) * largest[..., 0]
    return lengths


def unit_rows(x: Tensor) -> Tensor:
    """Scale each row of ``x`` (N, D) to length 1; a non-finite row becomes NaN, a zero row stays and passes none."""
    y, _ = _scaled(x)
    norm = torch.linalg.vector_norm(y, dim=1, keepdim=True)
    return torch.where(norm == 0, 0, y / torch.where(norm == 0, 1, norm))


def unit_embeddings(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Return unit rows (B, D) and norms (B,) in the accumulation dtype (float32, float64 for float64)."""
    y, largest = _scaled(embeddings.to(accumulation_dtype(embeddings.dtype)))
    norm = torch.linalg.vector_norm(y, dim=1, keepdim=True)
    return torch.where(norm == 0, 0, y / torch.where(norm == 0, 1, norm)), (norm * largest)[:, 0]


def normalize_rows_(x: Tensor) -> None:
    """Scale the rows of ``x`` (M, D) to length 1 in place, tile by tile; zero rows stay zero."""
    for rows in x.split(AT_A_TIME // x.shape[1] + 1):
        rows.copy_(unit_rows(rows.to(accumulation_dtype(x.dtype))))


def refreshed_rows(old: Tensor, known: Tensor, prototypes: Tensor, refresh_ratio: float) -> Tensor:
    """Return the rows (P, D) that the memory will hold, in the accumulation dtype; differentiable in ``prototypes``.

    ``unit((1 - r) old + r p)`` where the identity is ``known`` (P,), ``unit(p)`` where it is new or the sum vanishes.
    """
    p = unit_rows(prototypes)
    blend = (1 - refresh_ratio) * old + refresh_ratio * p
    keeps_direction = torch.linalg.vector_norm(blend.detach(), dim=1) > VANISHED
    return unit_rows(torch.where((known & keeps_direction)[:, None], blend, p))
