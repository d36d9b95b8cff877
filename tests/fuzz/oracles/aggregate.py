"""Prototypes of a batch: a loop over identities."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tests.fuzz.oracles.rows import directions, lengths

ANTIPODAL = 1e-6


class Made(NamedTuple):
    """Of each identity, ascending: prototype (P, D), weight (P,), whether it has a direction, and how well it is known.

    ``condition`` (P,): how much rounding of what is summed is magnified in the direction. ``size`` (P,): |m_c|.
    """

    identities: list[int]
    index: list[int]
    prototypes: Tensor
    mass: Tensor
    exists: Tensor
    condition: Tensor
    size: Tensor

    def doubtful(self, eps: float) -> Tensor:
        """Return the identities (P,) of which rounding decides whether they have a direction."""
        return (self.condition > 0.3 / ANTIPODAL) & (self.condition < 1e3 / eps)


def order(labels: list[int]) -> tuple[list[int], list[int]]:
    """Return the identities, ascending, and each sample's place among them, -1 for none."""
    identities = sorted({label for label in labels if label >= 0})
    place = {identity: p for p, identity in enumerate(identities)}
    return identities, [place.get(label, -1) for label in labels]


def aggregate(x: Tensor, labels: list[int], weights: Tensor | None, normalize: bool = True) -> Made:
    identities, index = order(labels)
    rows, masses, exist, condition, size = [], [], [], [], []
    for p in range(len(identities)):
        mine = [i for i, at in enumerate(index) if at == p]
        e = x[mine]
        given = x.new_ones(len(mine)) if weights is None else weights[mine].to(x.dtype)
        masses.append(given.sum())
        q = given if given.sum() > 0 else torch.ones_like(given)
        y = directions(e) if normalize else e
        total = (q[:, None] * y).sum(dim=0)
        budget = float((q * lengths(y)).detach().sum())
        length = float(lengths(total.detach()[None])[0])
        lives = bool(total.isfinite().all()) and bool(e.isfinite().all()) and length > ANTIPODAL * budget
        exist.append(lives)
        size.append(length if lives else 0.0)
        condition.append(budget / length if length > 0 and budget > 0 else float("inf") if budget > 0 else 1.0)
        rows.append(directions(total[None])[0] if lives else torch.zeros_like(total))
    f64 = torch.float64
    return Made(
        identities,
        index,
        torch.stack(rows) if rows else x.new_zeros(0, x.shape[1]),
        torch.stack(masses) if masses else x.new_zeros(0),
        torch.tensor(exist, dtype=torch.bool),
        torch.tensor(condition, dtype=f64),
        torch.tensor(size, dtype=f64),
    )
