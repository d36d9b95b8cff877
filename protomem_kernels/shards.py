"""A loss over prototypes that lie on several ranks: the reductions over banks go on over the ranks.

Each rank has the rows of all ranks' batches and the prototypes that it owns. Of each sample it knows its part: whether
the target is here, its cosine (0 if not), and n_r, the log-sum-exp of the negatives here. With

    present = sum_r present_r,   c = sum_r c_r,   n = log sum_r exp(n_r)

every rank knows the whole. A sample's |s h| is bounded by what is known before the step, so that exp(n_r - offset)
just adds up and **one SUM all-reduce of three numbers per sample** does it all; where no offset keeps both ends of the
range (``exponent_offset``, here of all ranks' slots), a MAX comes before. Back, dn/dn_r = exp(n_r - n) is known on rank
r, and what comes from above is alike on all ranks: no collective.

Rules that reshape negatives need to know the target's cosine before the sums: a SUM of (present, c) comes first. The
sums carry c once more: that one comes out of the operator, and near c = 1 a margin turns its last bit into many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from protomem_kernels.distributed.batch import Rows, among_largest
from protomem_kernels.distributed.ranks import Ranks
from protomem_kernels.mining import Chosen
from protomem_kernels.objective import Bank, Banks
from protomem_kernels.ops.negative_logsumexp import exponent_offset
from protomem_kernels.types import HardNegativeForm


class ShardedBanks(Banks):
    """The banks of this rank's shard, as a part of all ranks'.

    Args:
        banks: at least one, of one embedding size.
        rows: whose the samples are.
        candidates: (N,) bool, which samples may have a target on some rank.
        slots: how many prototypes there are on all ranks, or more.
        normalize_prototypes: scale their rows to unit length first.
    """

    def __init__(
        self,
        banks: Sequence[Bank],
        rows: Rows,
        candidates: Tensor,
        slots: int,
        normalize_prototypes: bool = False,
    ) -> None:
        super().__init__(banks, normalize_prototypes)
        self.rows, self.slots, self._candidates = rows, slots, candidates
        self._target_cosine: Tensor | None = None

    def candidates(self) -> Tensor:
        """Return which samples (N,) may have a target: only an owner knows more."""
        return self._candidates

    def look_ahead(self, x: Tensor, counts: Tensor) -> Tensor:
        """Return which samples (N,) have a target, and know its cosine from now on: one SUM of two numbers each."""
        with torch.no_grad():
            found = torch.stack([self.has_target().to(x.dtype), super().target_cosine(x)])
            present, self._target_cosine = self.rows.ranks.sum_(found)
        self.counts = present > 0
        return self.counts

    def target_cosine(self, x: Tensor) -> Tensor:
        """Return the cosine of each unit row of ``x`` (N, D) to its target (N,), which ``look_ahead`` has found."""
        assert self._target_cosine is not None
        return self._target_cosine

    def norms(self, norm: Tensor, counts: Tensor) -> Tensor:
        """Return the norms (N,): 0 where the sample does not count, with a gradient on its own rank alone."""
        return self.rows.differentiated_once(torch.where(counts, norm, 0))

    def sums(
        self, x: Tensor, counts: Tensor, chosen: Chosen | None, form: HardNegativeForm | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return over all ranks which samples (N,) have a target, its cosine and the negatives' log-sum-exp (N,)."""
        cosine, n = self.negative_logsumexp(x, chosen, form, scale)
        offset = exponent_offset(scale, self.slots, form, x.dtype)
        known = None if self._target_cosine is None else counts
        cosine, n, self.counts = _OverRanks.apply(  # type: ignore[no-untyped-call]
            cosine, n, self.has_target(), known, offset, self.rows.ranks
        )
        return self.counts, cosine, n

    def hardest(self, x: Tensor, k: int) -> Chosen:
        """Return each bank's slots (N, k) of the k hardest negatives over all ranks: one all-gather of k numbers."""
        found = self._hardest_in_each(x, k)
        cosines, slots = (torch.cat(list(part), dim=1) for part in zip(*found, strict=True))
        here = cosines.argsort(dim=1, descending=True, stable=True)[:, :k]
        among = among_largest(self.rows.ranks, cosines.gather(1, here))
        kept = torch.zeros_like(slots, dtype=torch.bool).scatter_(1, here, among)
        return list(torch.where(kept, slots, -1).split(k, dim=1))


class _OverRanks(torch.autograd.Function):
    """What each rank knows of its prototypes, made what all ranks know together."""

    @staticmethod
    def forward(
        ctx: Any, cosine: Tensor, n: Tensor, present: Tensor, known: Tensor | None, offset: float | None, ranks: Ranks
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return cosine, n and present, each (N,), of what this rank has; or where ``present`` is ``known``, that."""
        shift = n.new_full(n.shape, offset) if offset is not None else ranks.max_(n.clone())
        shift = torch.where(shift == float("-inf"), 0, shift)
        parts = [cosine, (n - shift).exp()]
        told = ranks.sum_(torch.stack(parts if known is not None else [*parts, present.to(n.dtype)]))
        over_all = told[1].log() + shift
        ctx.save_for_backward(torch.where(over_all == float("-inf"), 0, (n - over_all).exp()))
        ctx.set_materialize_grads(False)
        present = known.clone() if known is not None else told[2] > 0
        ctx.mark_non_differentiable(present)
        return told[0].clone(), over_all, present

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_cosine: Tensor | None, grad_n: Tensor | None, _: Tensor | None) -> Any:
        (share,) = ctx.saved_tensors
        return grad_cosine, None if grad_n is None else grad_n * share, None, None, None, None
