"""The objective: what a margin-softmax loss is, over one or more banks of prototypes.

A few operations on (B,) vectors around ``negative_logsumexp``, the one heavy operator. A bank is a set of prototypes:
the memory alone, or the memory without the slots written in this step beside those fresh rows with their graph. Each
sample has its target in at most one bank. ``Banks`` holds the four reductions over them; what spreads prototypes
further (``shards``) changes these and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from protomem_kernels import ops
from protomem_kernels._checks import check_batch, check_choice, check_number, check_occupied, check_prototypes
from protomem_kernels.distributed.batch import ONE_RANK, Rows
from protomem_kernels.margins import AnyMargin, ArcFace, TargetMap, as_margin
from protomem_kernels.mining import Chosen, MiningRule
from protomem_kernels.ops.call import call
from protomem_kernels.ops.register import register_function
from protomem_kernels.rows import unit_embeddings, widened, widened_for_loss
from protomem_kernels.types import HardNegativeForm, MarginSoftmaxStats

REDUCTIONS = ("mean", "sum", "none")
NO_MINING = MiningRule()


class Bank(NamedTuple):
    """Prototypes (M, D), the samples' targets among them (B,), negative where they are elsewhere, and occupied (M,)."""

    prototypes: Tensor
    targets: Tensor
    occupied: Tensor | None

    def has_target(self) -> Tensor:
        """Return which samples (B,) have their target here."""
        return (self.targets >= 0) & (self.targets < self.prototypes.shape[0])


class Banks:
    """Disjoint banks over which a loss is one softmax: the four reductions over them.

    Args:
        banks: at least one, of one embedding size.
        normalize_prototypes: scale their rows to unit length first.

    Attributes:
        rows: whose the samples are.
        counts: (B,) bool, which samples have a target; once ``sums`` has run.
    """

    rows: Rows = ONE_RANK
    counts: Tensor

    def __init__(self, banks: Sequence[Bank], normalize_prototypes: bool = False) -> None:
        self.banks, self.normalize_prototypes = banks, normalize_prototypes

    def has_target(self) -> Tensor:
        """Return which samples (B,) have their target in any bank: those that count."""
        return torch.stack([bank.has_target() for bank in self.banks]).any(dim=0)

    def candidates(self) -> Tensor:
        """Return which samples (B,) may have a target, as far as it is known before the prototypes are looked at."""
        return self.has_target()

    def look_ahead(self, x: Tensor, counts: Tensor) -> Tensor:
        """Return which samples (B,) have a target, for a rule that has to know before the sum; ``target_cosine`` too.

        Args:
            x: (B, D) unit rows.
            counts: (B,) what ``candidates`` returned.
        """
        return counts

    def norms(self, norm: Tensor, counts: Tensor) -> Tensor:
        """Return the norms (B,) that a margin is bound to: 0 where the sample does not count."""
        return norm

    def sums(
        self, x: Tensor, counts: Tensor, chosen: Chosen | None, form: HardNegativeForm | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return which samples (B,) have a target, and what ``negative_logsumexp`` returns."""
        self.counts = counts
        return counts, *self.negative_logsumexp(x, chosen, form, scale)

    def target_cosine(self, x: Tensor) -> Tensor:
        """Return the cosine of each unit row of ``x`` (B, D) to its target (B,), summed over the banks; 0 if none."""
        return torch.stack([self._cosine_in(bank, x) for bank in self.banks]).sum(dim=0)

    def negative_logsumexp(
        self, x: Tensor, chosen: Chosen | None, form: HardNegativeForm | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Return the target cosine (B,) and the log-sum-exp of the negatives (B,), both differentiable.

        A sample has its target in one bank and cosine 0 in the others; log-sum-exps of disjoint sets add up.
        """
        cosine = n = None
        for place, bank in enumerate(self.banks):
            c_here, n_here = ops.negative_logsumexp(
                x,
                bank.prototypes,
                bank.targets,
                scale=scale,
                occupied=bank.occupied,
                negatives=None if chosen is None else chosen[place],
                form=form,
                normalize_prototypes=self.normalize_prototypes,
            )
            cosine = c_here if cosine is None else cosine + c_here
            n = n_here if n is None else _logaddexp(n, n_here)
        assert cosine is not None
        assert n is not None
        return cosine, n

    def hardest(self, x: Tensor, k: int) -> Chosen:
        """Return each bank's slots (B, k) of the k hardest negatives of unit rows ``x`` over all banks; -1 is none."""
        found = self._hardest_in_each(x, k)
        if len(self.banks) == 1:
            return [found[0][1]]
        cosines = torch.cat([values for values, _ in found], dim=1)
        best = cosines.sort(dim=1, descending=True, stable=True).indices[:, :k]
        kept = torch.zeros_like(cosines, dtype=torch.bool).scatter_(1, best, True)
        slots = torch.cat([slots for _, slots in found], dim=1)
        return list(torch.where(kept, slots, -1).split(k, dim=1))

    def _hardest_in_each(self, x: Tensor, k: int) -> list[tuple[Tensor, Tensor]]:
        """Return of each bank the cosines (B, k) and slots (B, k) of its hardest negatives."""
        return [
            call(
                "hardest_negatives",
                x.detach(),
                bank.prototypes.detach(),
                bank.targets,
                bank.occupied,
                k,
                self.normalize_prototypes,
            )
            for bank in self.banks
        ]

    def _cosine_in(self, bank: Bank, x: Tensor) -> Tensor:
        if bank.prototypes.shape[0] == 0:
            return x.new_zeros(x.shape[0])
        inside = bank.has_target()
        rows = bank.prototypes.index_select(0, torch.where(inside, bank.targets, 0))
        rows = widened(rows, x.dtype)
        # Of a sample without a target nothing is read, and a broken embedding passes nothing on to prototypes: 0 times
        # what is not finite would reach a gradient.
        rows = torch.where(inside[:, None], rows, 0)
        rows = torch.where(torch.isfinite(x).all(dim=1, keepdim=True), rows, rows.detach())
        if self.normalize_prototypes:
            rows, _ = unit_embeddings(rows)
        return torch.where(inside, (x * rows).sum(dim=1), 0)


def margin_softmax_loss(
    embeddings: Tensor,
    prototypes: Tensor,
    targets: Tensor,
    *,
    margin: AnyMargin = ArcFace(0.5),
    scale: float = 64.0,
    mining: MiningRule | None = None,
    occupied: Tensor | None = None,
    normalize_prototypes: bool = False,
    reduction: str = "mean",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, MarginSoftmaxStats]:
    """Cross-entropy of margin softmax against the whole memory; the (B, M) logits are never materialised.

    With c_i the cosine to the target, T the margin, s the scale and n_i the log-sum-exp of the scaled negatives:
    ``L_i = softplus(n_i - s T(c_i))``. Ignored samples have loss 0 and pass no gradient. Gradients are right for any
    upstream gradient and finite even at cosines of exactly 1 or -1; they exist once (no double backward).

    Args:
        embeddings: (B, D) floating, raw; scaled to unit length inside. A zero row has cosine 0 to everything and gets
            gradient 0; a non-finite row makes its own loss non-finite and touches no other.
        prototypes: (M, D) floating, unit rows unless ``normalize_prototypes``; differentiated if they require it.
        targets: (B,) int slots; negative: the sample is ignored.
        margin: see ``protomem_kernels.margins``; any callable ``(target_cosine, embedding_norm) -> modified cosine``.
        scale: s > 0.
        mining: see ``protomem_kernels.mining``.
        occupied: (M,) bool; empty slots are no negatives. A target counts as present whatever it says. Default: all.
        normalize_prototypes: scale the rows of ``prototypes`` to unit length first (and differentiate through it).
        reduction: "mean" over the samples that are not ignored (0 if there is none), "sum", or "none" (B,).
        return_stats: also return ``MarginSoftmaxStats``.

    Returns:
        The loss, float32 (float64 for float64 embeddings); with ``return_stats`` the pair (loss, stats).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or value; on CPU tensors (elsewhere under ``PROTOMEM_DEBUG=1``) a target >= M.
            Unchecked on a GPU, such a sample counts as ignored.

    Example:
        >>> prototypes = torch.eye(3)
        >>> margin_softmax_loss(torch.tensor([[2.0, 0.0, 0.0]]), prototypes, torch.tensor([0]), scale=4.0)
        tensor(0.0581)

    Source: Deng et al., ArcFace, arXiv 1801.07698; Smirnov et al., Prototype Memory, arXiv 2105.02103.
    """
    targets = check_batch(embeddings, targets, "targets")
    check_prototypes(prototypes, embeddings)
    check_occupied(occupied, prototypes)
    check_objective(margin, scale, mining)
    embeddings, passed = widened_for_loss(embeddings)
    result = loss_over_banks(
        embeddings,
        Banks([Bank(prototypes, targets, occupied)], normalize_prototypes),
        margin=as_margin(margin).for_labels(targets),
        scale=scale,
        mining=mining,
        reduction=reduction,
        return_stats=return_stats,
    )
    return (passed(result[0]), result[1]) if isinstance(result, tuple) else passed(result)


def loss_over_banks(
    embeddings: Tensor,
    banks: Banks,
    *,
    margin: AnyMargin,
    scale: float,
    mining: MiningRule | None,
    reduction: str,
    return_stats: bool,
) -> Tensor | tuple[Tensor, MarginSoftmaxStats]:
    """Return ``margin_softmax_loss`` over the union of the banks."""
    check_objective(margin, scale, mining)
    check_choice("reduction", reduction, REDUCTIONS)
    margin, rule = as_margin(margin), NO_MINING if mining is None else mining

    counts, target_map, form = banks.candidates(), None, None
    x, norm = unit_embeddings(torch.where(counts[:, None], embeddings, 0))
    if reshapes(rule):
        counts = banks.look_ahead(x, counts)
        target_map = margin.bind(banks.norms(norm, counts))
        form = hard_negative_form(x, banks, counts, target_map, rule)
    chosen = rule.chosen_negatives(lambda k: banks.hardest(x, k))
    counts, cosine, n = banks.sums(x, counts, chosen, form, scale)
    norm = banks.norms(norm, counts)
    if target_map is None:
        target_map = margin.bind(norm)

    excess = n - scale * target_map(cosine)
    losses = margin.losses(excess, cosine, n, scale)
    penalty = margin.penalty(norm)
    if penalty is not None:
        losses = losses + penalty

    kept = rule.kept(losses, counts)
    loss = torch.where(kept, losses, 0)
    loss = banks.rows.own_losses(loss) if reduction == "none" else banks.rows.total(loss)
    if reduction == "mean":
        loss = loss / kept.sum().clamp(min=1)
    if not return_stats:
        return loss
    seen = torch.where(counts, torch.stack([cosine, n, torch.sigmoid(-excess)]).detach(), 0)
    return loss, MarginSoftmaxStats(*(banks.rows.own(values) for values in seen.unbind()))


def margin_softmax_logits(
    embeddings: Tensor,
    prototypes: Tensor,
    targets: Tensor,
    *,
    margin: AnyMargin = ArcFace(0.5),
    scale: float = 64.0,
    mining: MiningRule | None = None,
    occupied: Tensor | None = None,
    normalize_prototypes: bool = False,
) -> Tensor:
    """Return the scaled logits of ``margin_softmax_loss``: ``F.cross_entropy(logits, targets)`` equals that loss.

    The target's column holds ``s T(c_i)``, a negative's ``s h_ij`` (the mining rule's form where it is hard; -inf where
    ``HardestNegatives`` leaves it out), an empty slot's -inf. ``HardSamples`` and a margin's regulariser act on losses
    and change no logit. Differentiable in ``embeddings`` and ``prototypes``, once.

    Args:
        embeddings: (B, D) floating, raw; scaled to unit length inside.
        prototypes: (M, D) floating, unit rows unless ``normalize_prototypes``.
        targets: (B,) int slots; negative: the row has no target (use ``ignore_index`` in the loss).
        margin: see ``protomem_kernels.margins``; not ``DSoftmax``, which is no softmax of one set of logits.
        scale: s > 0.
        mining: see ``protomem_kernels.mining``.
        occupied: (M,) bool, default all.
        normalize_prototypes: scale the rows of ``prototypes`` to unit length first.

    Returns:
        (B, M) float32, or float64 for float64 embeddings.

    Raises:
        TypeError: a wrong type or dtype, or ``DSoftmax`` as the margin.
        ValueError: a wrong shape, device or value; on CPU tensors (elsewhere under ``PROTOMEM_DEBUG=1``) a target >= M.

    Example:
        >>> from protomem_kernels import CosFace
        >>> embeddings, targets = torch.tensor([[3.0, 4.0]]), torch.tensor([0])
        >>> margin_softmax_logits(embeddings, torch.eye(2), targets, margin=CosFace(0.25), scale=10)
        tensor([[3.5000, 8.0000]])
    """
    targets = check_batch(embeddings, targets, "targets")
    check_prototypes(prototypes, embeddings)
    check_occupied(occupied, prototypes)
    check_objective(margin, scale, mining)
    margin, rule = as_margin(margin).for_labels(targets), NO_MINING if mining is None else mining
    if not margin.has_logits:
        raise TypeError(
            f"margin must be a margin on the target's logit, got {type(margin).__name__}, which is no single softmax"
        )

    embeddings, passed = widened_for_loss(embeddings)
    if prototypes.dtype == torch.float16 and prototypes.requires_grad:
        prototypes = widened(prototypes)  # the gradients of targets and negatives add up before they are narrowed
    x, norm = unit_embeddings(embeddings)
    banks = Banks([Bank(prototypes, targets, occupied)], normalize_prototypes)
    target_map = margin.bind(norm)
    form = hard_negative_form(x, banks, banks.has_target(), target_map, rule)
    logits = ops.margin_softmax_logits(
        x,
        prototypes,
        targets,
        scale * target_map(banks.target_cosine(x)),
        scale=scale,
        occupied=occupied,
        form=form,
        normalize_prototypes=normalize_prototypes,
    )
    chosen = rule.chosen_negatives(lambda k: banks.hardest(x, k))
    logits = passed(logits)
    return logits if chosen is None else _only(logits, torch.cat([*chosen, targets.long()[:, None]], dim=1))


def _only(logits: Tensor, slots: Tensor) -> Tensor:
    """Return the logits (B, M) with -inf everywhere but at each row's ``slots`` (B, k); outside [0, M) is none."""
    capacity = logits.shape[1]
    kept = torch.zeros(logits.shape[0], capacity + 1, dtype=torch.bool, device=logits.device)
    kept.scatter_(1, torch.where((slots < 0) | (slots >= capacity), capacity, slots), True)
    return torch.where(kept[:, :capacity], logits, float("-inf"))


def check_objective(margin: AnyMargin, scale: float, mining: MiningRule | None) -> None:
    """Check what does not depend on a batch: the margin, the scale and the mining rule."""
    if not callable(margin):
        raise TypeError(
            "margin must be a callable (target_cosine, embedding_norm) -> cosine or a Margin, "
            f"got {type(margin).__name__}"
        )
    check_number("scale", scale, low=0, open_low=True)
    for name, value in (("mining", mining), ("margin", margin)):
        if isinstance(value, type):
            raise TypeError(f"{name} must be an instance, got the class {value.__name__}")
    if mining is not None and not isinstance(mining, MiningRule):
        raise TypeError(f"mining must be a rule of protomem_kernels.mining or None, got {type(mining).__name__}")


def reshapes(rule: MiningRule) -> bool:
    """Say whether a rule may reshape negatives, for which it asks for target cosines before the sum."""
    return type(rule).hard_negatives is not MiningRule.hard_negatives


def hard_negative_form(
    x: Tensor, banks: Banks, counts: Tensor, target_map: TargetMap, rule: MiningRule
) -> HardNegativeForm | None:
    """Return how hard negatives are reshaped, or None: the target's cosine sets the threshold before the stream."""
    with torch.no_grad():
        return rule.hard_negatives(lambda: banks.target_cosine(x), counts, target_map)


def _logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """Return log(exp(a) + exp(b)); unlike torch's, the gradient is 0 and not NaN where both are -inf."""
    neither = (a == float("-inf")) & (b == float("-inf"))
    both = torch.logaddexp(torch.where(neither, 0, a), torch.where(neither, 0, b))
    return torch.where(neither, float("-inf"), both)


register_function("margin_softmax_loss", around="negative_logsumexp")
