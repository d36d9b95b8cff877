"""Inputs out of a seed: shapes, dtypes, labels and rows as users have them, and as nobody would expect them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAST = 2**63 - 1
# Norms at the ends of what a dtype can hold, so that squares overflow and vanish where the dtype lets them.
ENDS = {torch.float64: 1e200, torch.float32: 1e30, torch.bfloat16: 1e30, torch.float16: 1e3}


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Draw:
    """One case's source of chance. What was drawn stands in ``notes``, for whoever reads a finding."""

    def __init__(self, subject: str, seed: int) -> None:
        self.subject, self.seed = subject, seed
        self.random = random.Random(f"{subject} {seed}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(62))
        self.notes: dict[str, Any] = {}

    def apart(self, name: str) -> random.Random:
        """Return a source of its own, for what differs from machine to machine: the inputs stay the same."""
        return random.Random(f"{name} {self.subject} {self.seed}")

    def note(self, **values: Any) -> None:
        self.notes.update(values)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def pick(self, *options: T) -> T:
        return self.random.choice(options)

    def some(self, options: Sequence[T], count: int) -> list[T]:
        return self.random.sample(list(options), count)

    def integer(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def mask(self, size: int, share: float) -> Tensor:
        return self.uniform(size) < share

    def batch(self) -> int:
        return self.pick(0, 1, 1, 2, 3, self.integer(1, 9), self.integer(4, 40))

    def columns(self) -> int:
        return self.pick(1, 2, 3, 4, self.integer(1, 20), self.integer(16, 70))

    def slots(self) -> int:
        """M, small as a rule; now and then more than a tile of any backend."""
        return self.pick(
            0, 1, 2, 3, self.integer(1, 12), self.integer(10, 70), self.integer(60, 300), self.rarely_many()
        )

    def rarely_many(self) -> int:
        return self.integer(4000, 9000) if self.chance(0.15) else self.integer(1, 40)

    def dtype(self) -> torch.dtype:
        return self.pick(torch.float32, *DTYPES)

    def layout(self, x: Tensor) -> Tensor:
        """Return the same values, laid out in memory as views have them."""
        kind = self.pick("as it is", "as it is", "transposed", "every other", "offset")
        if x.ndim == 0 or kind == "as it is":
            return x
        if kind == "transposed" and x.ndim == 2:
            return x.t().contiguous().t()
        junk = float("nan") if x.is_floating_point() else (True if x.dtype == torch.bool else -7)
        if kind == "every other":
            wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), junk)
            wide[..., ::2] = x
            return wide[..., ::2]
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), junk)
        wide[..., 2:-1] = x
        return wide[..., 2:-1]

    def directions(self, rows: int, columns: int, near: Tensor | None = None) -> Tensor:
        """Return (rows, columns) float64, most of them random; some axes, twins, almost twins and opposites.

        ``near`` (N, columns): rows to be like or opposite to, so that cosines of 1 and -1 turn up.
        """
        x = self.normal(rows, columns)
        if self.chance(0.35):
            return x
        others = x.clone() if near is None or near.shape[0] == 0 else torch.cat([x, near])
        for i in range(rows):
            if not self.chance(0.3):
                continue
            other = others[self.integer(0, others.shape[0] - 1)]
            kind = self.pick("axis", "twin", "opposite", "almost", "whole", "zero")
            if kind == "axis":
                x[i] = 0
                x[i, self.integer(0, columns - 1)] = self.pick(1.0, -1.0)
            elif kind == "whole":  # few values: ties of cosines, exact in any order of summation
                x[i] = (2 * x[i]).round()
            elif kind == "zero":
                x[i] = 0 if self.chance(0.5) else x[i]
            else:
                step = self.pick(1e-2, 1e-4, 1e-6, 1e-8) * self.normal(columns) if kind == "almost" else 0
                x[i] = (-other if kind == "opposite" else other) + step
        return x

    def rows(
        self,
        rows: int,
        columns: int,
        dtype: torch.dtype,
        *,
        near: Tensor | None = None,
        broken: bool = True,
        ends: bool = True,
    ) -> Tensor:
        """Return embeddings (rows, columns) in ``dtype``, some zero.

        With ``ends`` of any norm, with ``broken`` some not finite.
        """
        x = self.directions(rows, columns, near)
        norms = (
            1 + 3 * self.uniform(rows, 1)
            if self.chance(0.7)
            else 10 ** self.pick(0.5, 1.0, 2.0) * self.uniform(rows, 1)
        )
        length = x.norm(dim=1, keepdim=True)
        x = x / torch.where(length > 0, length, 1) * norms
        if ends and self.chance(0.25):
            end = ENDS[dtype]
            for i in range(rows):
                if self.chance(0.4):
                    x[i] *= self.pick(end, 1 / end, end**0.65, end**-0.65)
            self.note(norms="huge and tiny")
        largest = torch.finfo(dtype).max
        x = x.clamp(-0.9 * largest, 0.9 * largest).to(dtype)
        if broken and rows and self.chance(0.15):
            x[self.integer(0, rows - 1), self.integer(0, columns - 1)] = self.pick(
                float("nan"), float("inf"), -float("inf")
            )
            self.note(broken=True)
        if rows and self.chance(0.04):
            return x[:1].expand(rows, columns)
        return self.layout(x)

    def unit(self, rows: int, columns: int, dtype: torch.dtype, near: Tensor | None = None) -> Tensor:
        """Return unit rows (rows, columns), rounded once to ``dtype``; a direction that vanished stays zero."""
        x = self.directions(rows, columns, near)
        length = x.norm(dim=1, keepdim=True)
        return (x / torch.where(length > 0, length, 1)).to(dtype)

    def identities(self, count: int) -> list[int]:
        """Return that many different identities >= 0: small ones, huge ones, neighbours of powers of two."""
        edges = [LAST, LAST - 1, 2**62, 2**32, 2**32 - 1, 2**31, 2**31 - 1, 2**53 + 1, 2**53]
        pool = {self.pick(self.integer(0, 3 * count + 3), self.integer(0, LAST)) for _ in range(count)}
        pool |= set(self.some(edges, self.integer(0, 4))) if self.chance(0.5) else set()
        value = 0
        while len(pool) < count:
            pool.add(value)
            value += 1
        return self.some(sorted(pool), count)

    def labels(self, size: int, pool: Sequence[int]) -> Tensor:
        """Return labels (size,), int64 or (where they fit) int32: of the pool, some negative."""
        none = (-1, -1, -2, -(2**31), -(2**63)) if self.chance(0.5) else (-1,)
        share = self.pick(0.0, 0.0, 0.1, 0.5, 1.0 if self.chance(0.2) else 0.3)
        values = [self.pick(*none) if not pool or self.chance(share) else self.pick(*pool) for _ in range(size)]
        fits = all(-(2**31) <= value < 2**31 for value in values)
        dtype = torch.int32 if fits and self.chance(0.4) else torch.int64
        if values and self.chance(0.03):
            return torch.tensor(values[:1], dtype=dtype).expand(size)
        return self.layout(torch.tensor(values, dtype=dtype))
