"""Margins: the target's new cosine, out of angles. Each is bound to a batch's norms first, as some need statistics."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]


@dataclass
class Bound:
    """A margin bound to a batch: T with and without the guard past pi; where (c) T or its slope jumps; statistics."""

    guarded: Map
    unguarded: Map
    edges: Callable[[Tensor], Tensor]  # cosines (B,) -> (B, E): how far in cosine each edge is
    penalty: Tensor | None = None
    state: dict[str, float] = field(default_factory=dict)


def angle(c: Tensor) -> Tensor:
    """Return arccos(c), of a cosine that rounding may have pushed past 1; past it the derivative is 0."""
    return c.clamp(-1, 1).acos() if not c.requires_grad else _acos(c)


class _Arccos(torch.autograd.Function):
    """arccos, with a derivative to the last bit near 1, where 1 - c^2 as PyTorch forms it has few digits left."""

    @staticmethod
    def forward(ctx: Any, c: Tensor) -> Tensor:
        ctx.save_for_backward(c)
        return c.acos()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (c,) = ctx.saved_tensors
        return -grad / ((1 - c) * (1 + c)).sqrt()


def _acos(c: Tensor) -> Tensor:
    inside = (1 - c * c) > 4 * torch.finfo(c.dtype).eps
    safe = torch.where(inside, c, 0)
    return torch.where(inside, _Arccos.apply(safe), c.detach().clamp(-1, 1).acos())


def never(c: Tensor) -> Tensor:
    return c.new_ones(c.shape[0], 1)


def at(*cosines: float | Tensor) -> Callable[[Tensor], Tensor]:
    return lambda c: torch.stack([(c - cosine).abs() for cosine in cosines], dim=1)


def arc(m: float | Tensor) -> Bound:
    turn = torch.as_tensor(m, dtype=torch.float64)

    def guarded(c: Tensor) -> Tensor:
        k = turn.to(c.dtype)
        return torch.where(c >= (math.pi - k).cos(), (angle(c) + k).cos(), c - k * k.sin())

    return Bound(guarded, lambda c: (angle(c) + turn.to(c.dtype)).cos(), at((math.pi - turn).cos()))


def straight(m: float) -> Bound:
    def value(c: Tensor) -> Tensor:
        return (c.detach().clamp(-1, 1).acos() + m).cos()

    return Bound(lambda c: value(c) + (c - c.detach()), value, never)


def cos(m: float | Tensor) -> Bound:
    return Bound(lambda c: c - m, lambda c: c - m, never)


def combined(m1: float, m2: float, m3: float) -> Bound:
    edge = (math.pi - m2) / m1

    def unguarded(c: Tensor) -> Tensor:
        return (m1 * angle(c) + m2).cos() - m3

    def guarded(c: Tensor) -> Tensor:
        beyond = c - m2 * math.sin(m2) if m1 == 1 else c - 1 - math.cos(edge)
        return torch.where(c >= math.cos(edge), (m1 * angle(c) + m2).cos(), beyond) - m3

    return Bound(guarded, unguarded, at(math.cos(edge)))


def sphere(m: float) -> Bound:
    def value(c: Tensor) -> Tensor:
        theta = angle(c)
        k = (m * theta.detach() / math.pi).floor()
        sign = torch.where(k.remainder(2) == 0, 1.0, -1.0).to(c.dtype)
        return sign * (m * theta).cos() - 2 * k

    turns = [math.cos(k * math.pi / m) for k in range(1, int(m) + 1)]
    return Bound(value, value, at(*turns) if turns else never)


def ada(norm: Tensor, m: float, h: float, momentum: float, mean: float, std: float, training: bool) -> Bound:
    """``norm`` (B,): 0 for samples that take no part."""
    clipped = norm.detach().clamp(1e-3, 100)
    counted = clipped[(norm > 0) & norm.isfinite()]
    if training and len(counted) > 1:
        mean = momentum * float(counted.mean()) + (1 - momentum) * mean
        std = momentum * float(counted.std()) + (1 - momentum) * std
    g = (h * (clipped - mean) / (std + 1e-3)).clamp(-1, 1)

    def value(c: Tensor) -> Tensor:
        return (angle(c) - m * g).clamp(1e-3, math.pi - 1e-3).cos() - m * (1 + g)

    low, high = ((m * g + edge).clamp(0, math.pi).cos() for edge in (1e-3, math.pi - 1e-3))
    return Bound(value, value, at(low, high), state={"mean": mean, "std": std})


def mag(norm: Tensor, l_a: float, u_a: float, l_m: float, u_m: float, regularizer: float) -> Bound:
    a = norm.clamp(l_a, u_a)
    margin = l_m + (u_m - l_m) * (a - l_a) / (u_a - l_a)

    def guarded(c: Tensor) -> Tensor:
        return torch.where(c >= (math.pi - margin).cos(), (angle(c) + margin).cos(), c - margin * margin.sin())

    close = [(norm - edge).abs() / edge for edge in (l_a, u_a)]
    return Bound(
        guarded,
        lambda c: (angle(c) + margin).cos(),
        lambda c: torch.stack([(c - (math.pi - margin).cos()).abs(), *close], dim=1).detach(),
        penalty=regularizer * (a / u_a**2 + 1 / a),
    )


Binder = Callable[[Tensor, dict[str, Any], bool], Bound]  # (norms (B,), statistics before, training) -> bound


@dataclass
class MarginOracle:
    """A margin: how it binds; ``d`` if its loss is D-Softmax's."""

    bind: Binder
    d: float | None = None
