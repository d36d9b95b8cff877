"""A batch of all ranks: who has which rows, how they come together, and how gradients find back.

Every rank computes on the rows of all ranks, in the order of ranks, against the prototypes that it owns. A number of a
sample that every rank knows alike (its loss, its norm) is differentiated by the sample's own rank alone; what a rank
knows of its own prototypes, by that rank. So each part of a gradient exists once, and one reduce-scatter adds them up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from protomem_kernels.distributed.ranks import ALONE, Ranks


class Rows:
    """Whose the rows of a batch are: one rank's here.

    Attributes:
        ranks: who shares the batch.
        sizes: how many rows each of them has.
    """

    ranks: Ranks = ALONE

    def own(self, values: Tensor) -> Tensor:
        """Return this rank's part of (N, ...)."""
        return values

    def differentiated_once(self, values: Tensor) -> Tensor:
        """Return (N,) numbers that all ranks know alike, each with a gradient on its own rank alone."""
        return values

    def total(self, losses: Tensor) -> Tensor:
        """Return the sum of (N,) losses that all ranks know alike; backward, each counts as its own rank's upstream."""
        return losses.sum()

    def own_losses(self, losses: Tensor) -> Tensor:
        """Return this rank's part (B,) of such losses; backward likewise."""
        return losses


ONE_RANK = Rows()


class SharedRows(Rows):
    """The rows of several ranks' batches, rank by rank.

    Args:
        ranks: who shares the batch.
        sizes: how many rows each of them has.
    """

    def __init__(self, ranks: Ranks, sizes: Sequence[int]) -> None:
        self.ranks, self.sizes = ranks, tuple(sizes)
        self.first = sum(self.sizes[: ranks.rank])
        self.size, self.padded_to = self.sizes[ranks.rank], max(self.sizes)

    def own(self, values: Tensor) -> Tensor:
        """Return this rank's part (B, ...) of (N, ...)."""
        return values[self.first : self.first + self.size]

    def differentiated_once(self, values: Tensor) -> Tensor:
        """Return the same numbers (N,), those of other ranks' samples without their graph."""
        if not values.requires_grad:
            return values
        parts = values.detach().split(list(self.sizes))
        return torch.cat([*parts[: self.ranks.rank], self.own(values), *parts[self.ranks.rank + 1 :]])

    def total(self, losses: Tensor) -> Tensor:
        """Return the sum of all ranks' losses (N,): backward, one all-gather of a number per rank."""
        total: Tensor = _Total.apply(losses, self)  # type: ignore[no-untyped-call]
        return total

    def own_losses(self, losses: Tensor) -> Tensor:
        """Return this rank's losses (B,) of (N,): backward, one all-gather of a number per sample."""
        own: Tensor = _OwnLosses.apply(losses, self)  # type: ignore[no-untyped-call]
        return own

    def gather(self, values: Tensor) -> Tensor:
        """Return all ranks' rows (N, ...) of this rank's (B, ...)."""
        if self.padded_to == 0:
            return values
        return self._joined(self.ranks.all_gather(self._padded(values)))

    def scatter_sum(self, values: Tensor) -> Tensor:
        """Return this rank's rows (B, ...) of the sum of the ranks' (N, ...)."""
        if self.padded_to == 0:
            return values
        parts = [self._padded(part) for part in values.split(list(self.sizes))]
        return self.ranks.reduce_scatter(torch.stack(parts))[: self.size]

    def _padded(self, values: Tensor) -> Tensor:
        lacking = self.padded_to - values.shape[0]
        return values if lacking == 0 else torch.cat([values, values.new_zeros(lacking, *values.shape[1:])])

    def _joined(self, gathered: Tensor) -> Tensor:
        if min(self.sizes) == self.padded_to:
            return gathered.flatten(0, 1)
        return torch.cat([part[:size] for part, size in zip(gathered, self.sizes, strict=True)])


class Batch(NamedTuple):
    """The batch of all ranks, as each of them sees it.

    Attributes:
        embeddings: (N, D) floating, rank by rank.
        labels: (N,) integers.
        weights: (N,) floating or None.
        rows: whose they are.
    """

    embeddings: Tensor
    labels: Tensor
    weights: Tensor | None
    rows: Rows


def batch_options(embeddings: Tensor, weights: Tensor | None) -> dict[str, object]:
    """Return what has to be alike of the ranks' batches, by name."""
    differentiated = torch.is_grad_enabled()
    return {
        "the embeddings' dtype": embeddings.dtype,
        "the weights' dtype": None if weights is None else weights.dtype,
        "whether embeddings require a gradient": differentiated and embeddings.requires_grad,
        "whether weights require a gradient": differentiated and weights is not None and weights.requires_grad,
    }


def gather_batch(
    rows: SharedRows,
    embeddings: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    *,
    wire: torch.dtype,
    factor: float,
) -> Batch:
    """Bring the ranks' batches together: one all-gather there, one reduce-scatter back.

    Args:
        rows: how many come from where.
        embeddings: (B, D) floating; their gradient is added up in this dtype.
        labels: (B,) integers.
        weights: (B,) floating or None, on all ranks alike.
        wire: the dtype in which embeddings travel, which holds their values exactly.
        factor: what the gradients of embeddings and weights are multiplied by: as many ranks as average them later.
    """
    labels = labels.long()
    if rows.padded_to == 0:
        return Batch(embeddings, labels, weights, rows)
    sent = [embeddings.detach().to(wire), labels[:, None]]
    if weights is not None:
        sent.append(weights.detach()[:, None])
    came = _unpacked(rows.gather(_packed(sent)), sent)
    x, y, q = came[0].to(embeddings.dtype), came[1][:, 0], None if weights is None else came[2][:, 0]
    if torch.is_grad_enabled() and embeddings.requires_grad:
        x = _GatheredRows.apply(embeddings, x, rows, factor)  # type: ignore[no-untyped-call]
    if q is not None and weights is not None and torch.is_grad_enabled() and weights.requires_grad:
        q = _GatheredRows.apply(weights, q, rows, factor)  # type: ignore[no-untyped-call]
    return Batch(x, y, q, rows)


def _packed(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors (B, ...) of any dtypes as one of bytes (B, K), since one collective is quicker than three."""
    return torch.cat([tensor.contiguous().view(torch.uint8) for tensor in tensors], dim=1)


def _unpacked(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors (N, ...) in bytes (N, K)."""
    widths = [tensor.shape[1] * tensor.element_size() for tensor in like]
    parts = packed.split(widths, dim=1)
    return [part.contiguous().view(tensor.dtype) for part, tensor in zip(parts, like, strict=True)]


def largest(ranks: Ranks, values: Tensor, identities: Tensor) -> tuple[Tensor, Tensor]:
    """Return, of each row's k numbers on each rank, the k largest of all and what they belong to: one all-gather.

    Args:
        ranks: who has found some.
        values: (N, k) floating, descending.
        identities: (N, k) int64.
    """
    if ranks.alone or len(values) == 0:
        return values, identities
    k, sent = values.shape[1], [values, identities]
    came = ranks.all_gather(_packed(sent))
    every = [torch.cat(list(part), dim=1) for part in zip(*(_unpacked(one, sent) for one in came), strict=True)]
    best = every[0].argsort(dim=1, descending=True, stable=True)[:, :k]
    return every[0].gather(1, best), every[1].gather(1, best)


def among_largest(ranks: Ranks, values: Tensor) -> Tensor:
    """Return which of this rank's numbers (N, k) are among the k largest (N, k) of all ranks: one all-gather."""
    k = values.shape[1]
    every = torch.cat(list(ranks.all_gather(values)), dim=1)
    best = every.argsort(dim=1, descending=True, stable=True)[:, :k]
    mask = torch.zeros_like(every, dtype=torch.bool).scatter_(1, best, True)
    return mask[:, ranks.rank * k : (ranks.rank + 1) * k]


class _GatheredRows(torch.autograd.Function):
    """Rows of all ranks that were gathered: backward hands each rank the sum of its rows' gradients."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, gathered: Tensor, rows: SharedRows, factor: float) -> Tensor:
        ctx.rows, ctx.factor = rows, factor
        return gathered.view_as(gathered)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.rows.scatter_sum(grad) * ctx.factor, None, None, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, losses: Tensor, rows: SharedRows) -> Tensor:
        ctx.rows = rows
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        rows: SharedRows = ctx.rows
        upstreams = rows.ranks.all_gather(grad)
        return torch.cat([one.expand(size) for one, size in zip(upstreams, rows.sizes, strict=True)]), None


class _OwnLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, losses: Tensor, rows: SharedRows) -> Tensor:
        ctx.rows = rows
        return rows.own(losses).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.rows.gather(grad), None


class _OverflowShared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return parameter.view_as(parameter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        largest = torch.linalg.vector_norm(grad, torch.inf, dtype=torch.promote_types(grad.dtype, torch.float32))
        broken = ctx.ranks.max_((~torch.isfinite(largest)).to(torch.float32))
        if grad.is_cpu and not broken:  # elsewhere looking would stop the device
            return grad, None
        return torch.where(broken > 0, grad.new_full((), float("inf")), grad), None


def overflow_shared(parameter: Tensor, ranks: Ranks) -> Tensor:
    """Return a shard of a parameter whose gradient is infinite on every rank where it is not finite on one.

    So that a gradient scaler which knows nothing of shards skips the step, and backs off, on all ranks alike.
    """
    if ranks.alone or not (torch.is_grad_enabled() and parameter.requires_grad):
        return parameter
    shared: Tensor = _OverflowShared.apply(parameter, ranks)  # type: ignore[no-untyped-call]
    return shared
