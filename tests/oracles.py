"""Oracles written anew from the contract and the papers: float64 formulas, explicit (B, M) logits, a dict for a memory.

Nothing here calls the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Formula = Callable[[Tensor, Tensor], Tensor]  # (target cosine, norm) -> modified cosine
NegativeForm = Callable[[Tensor, Tensor, Tensor], Tensor]  # (cosines (B, M), c (B,), T(c) (B,)) -> h (B, M)


def arcface(c: Tensor, m: float | Tensor) -> Tensor:
    m = torch.as_tensor(m, dtype=c.dtype)
    theta = c.acos()
    return torch.where(theta + m <= math.pi, (theta + m).cos(), c - m * m.sin())


def sphereface(c: Tensor, m: float) -> Tensor:
    theta = c.acos()
    k = (m * theta.detach() / math.pi).floor()
    return torch.where(k % 2 == 0, 1.0, -1.0) * (m * theta).cos() - 2 * k


def adaface(c: Tensor, norm: Tensor, m: float, h: float, mean: float, std: float) -> Tensor:
    g = (h * (norm.detach().clamp(1e-3, 100) - mean) / (std + 1e-3)).clamp(-1, 1)
    return (c.acos() - m * g).clamp(1e-3, math.pi - 1e-3).cos() - m * (1 + g)


def magface_margin(norm: Tensor, l_a: float, u_a: float, l_m: float, u_m: float) -> Tensor:
    return l_m + (u_m - l_m) * (norm.clamp(l_a, u_a) - l_a) / (u_a - l_a)


def magface_penalty(norm: Tensor, l_a: float, u_a: float, regularizer: float) -> Tensor:
    a = norm.clamp(l_a, u_a)
    return regularizer * (a / u_a**2 + 1 / a)


def unit(x: Tensor) -> Tensor:
    """Return unit rows; a zero row stays zero."""
    norm = x.norm(dim=-1, keepdim=True)
    return torch.where(norm > 0, x / torch.where(norm > 0, norm, 1), 0)


def dense_logits(
    embeddings: Tensor,
    prototypes: Tensor,
    targets: Tensor,
    formula: Formula,
    scale: float,
    *,
    negatives: NegativeForm | None = None,
    occupied: Tensor | None = None,
) -> Tensor:
    """Return the explicit (B, M) logits; rows with a negative target hold no margin."""
    cosines = unit(embeddings) @ prototypes.T
    c = cosines.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    modified = formula(c, embeddings.norm(dim=1))
    h = cosines if negatives is None else negatives(cosines, c.detach(), modified.detach())
    if occupied is not None:
        h = torch.where(occupied, h, float("-inf"))
    is_target = functional.one_hot(targets.clamp(min=0), prototypes.shape[0]).bool() & (targets >= 0)[:, None]
    return scale * torch.where(is_target, modified[:, None], h)


def dense_losses(embeddings: Tensor, prototypes: Tensor, targets: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return each sample's cross-entropy over ``dense_logits``, 0 for a negative target."""
    logits = dense_logits(embeddings, prototypes, targets, *args, **kwargs)
    return functional.cross_entropy(logits, targets, ignore_index=-1, reduction="none")


def reduce(losses: Tensor, targets: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / max(1, int((targets >= 0).sum()))


def aggregate(embeddings: Tensor, labels: Tensor, weights: Tensor | None = None) -> dict[int, Tensor | None]:
    """Return identity -> prototype (differentiable), ascending; None where antipodal or non-finite."""
    x = unit(embeddings)
    result: dict[int, Tensor | None] = {}
    for identity in sorted({label for label in labels.tolist() if label >= 0}):
        of = [i for i, label in enumerate(labels.tolist()) if label == identity]
        q = torch.ones(len(of), dtype=x.dtype) if weights is None else weights[of].to(x.dtype)
        if q.sum().item() == 0:
            q = torch.ones_like(q)
        total = (q[:, None] * x[of]).sum(dim=0)
        budget = (q * x[of].norm(dim=1)).sum().item()
        lives = bool(torch.isfinite(total).all()) and total.norm().item() > 1e-6 * budget
        result[identity] = total / total.norm() if lives else None
    return result


class DictMemory:
    """The circular memory as a list of slots; rows are float64 and keep their graph until ``detach``."""

    def __init__(self, capacity: int, dim: int, *, ratio: float = 0.5, policy: str = "fifo") -> None:
        self.capacity, self.dim, self.ratio, self.policy = capacity, dim, ratio, policy
        self.identity: list[int] = [-1] * capacity
        self.row: list[Tensor] = [torch.zeros(dim, dtype=torch.float64) for _ in range(capacity)]
        self.stamp = [0] * capacity
        self.cursor = self.clock = 0
        self.entered = self.refreshed = self.left = 0

    def slot(self, identity: int) -> int:
        return self.identity.index(identity) if identity >= 0 and identity in self.identity else -1

    def victim(self, batch: set[int]) -> int:
        free = [s for s in range(self.capacity) if self.identity[s] not in batch]
        if self.policy == "fifo":
            return min(free, key=lambda s: (s - self.cursor) % self.capacity)
        return min(free, key=lambda s: (self.identity[s] >= 0, self.stamp[s], s))

    def write(self, made: dict[int, Tensor | None]) -> dict[int, int]:
        """Refresh and enqueue; return identity -> slot for what was written."""
        self.clock += 1
        self.entered = self.refreshed = self.left = 0
        usable = {identity: p for identity, p in made.items() if p is not None}
        for identity, p in usable.items():
            s = self.slot(identity)
            if s >= 0:
                blend = (1 - self.ratio) * self.row[s].detach() + self.ratio * p
                self.row[s] = blend / blend.norm() if float(blend.norm().detach()) > 1e-6 else p
                self.stamp[s] = self.clock
                self.refreshed += 1
        for identity, p in usable.items():
            if self.slot(identity) < 0:
                s = self.victim(set(usable))
                self.left += self.identity[s] >= 0
                self.entered += 1
                self.identity[s], self.row[s], self.stamp[s] = identity, p, self.clock
                if self.policy == "fifo":
                    self.cursor = (s + 1) % self.capacity
        return {identity: self.slot(identity) for identity in usable}

    def step(self, embeddings: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Aggregate and write; return each sample's slot."""
        slots = self.write(aggregate(embeddings, labels, weights))
        return torch.tensor([slots.get(label, -1) for label in labels.tolist()], dtype=torch.int64)

    def detach(self) -> None:
        self.row = [row.detach().clone() for row in self.row]

    @property
    def rows(self) -> Tensor:
        return torch.stack(self.row)

    @property
    def occupied(self) -> Tensor:
        return torch.tensor([identity >= 0 for identity in self.identity])

    def equals(self, memory: Any, **tolerance: float) -> None:
        """Assert that a ``PrototypeMemory`` holds the same."""
        assert memory.identities.tolist() == self.identity
        assert memory.stamps.tolist() == self.stamp
        assert int(memory.cursor) == self.cursor
        assert int(memory.clock) == self.clock
        torch.testing.assert_close(memory.prototypes.detach().double(), self.rows.detach(), **tolerance)


def same(a: Any, b: Any) -> bool:
    """Say whether two state dicts hold the same keys and the same bits."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def snapshot(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
