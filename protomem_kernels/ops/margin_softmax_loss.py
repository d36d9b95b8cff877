"""``margin_softmax_loss``: a few vector operations around ``negative_logsumexp``, the one heavy operator.

A loss runs over one or more *banks* of prototypes: the memory alone, or the memory without the slots written in this
step plus those fresh rows with their graph. Each sample has its target in at most one bank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from protomem_kernels._checks import (
    check_batch,
    check_choice,
    check_number,
    check_occupied,
    check_prototypes,
)
from protomem_kernels.margins import ArcFace, DSoftmax, Margin, TargetMap, bind
from protomem_kernels.mining import HardestNegatives, HardSamples, MiningRule, ReshapesNegatives
from protomem_kernels.ops._embeddings import unit_embeddings
from protomem_kernels.ops.dispatch import call
from protomem_kernels.ops.negative_logsumexp import negative_logsumexp
from protomem_kernels.types import HardNegativeForm, MarginSoftmaxStats

REDUCTIONS = ("mean", "sum", "none")
PLAIN_SOFTPLUS = 50.0  # beyond it softplus(u) = u to the last bit of float64


class Bank(NamedTuple):
    """Prototypes (M, D), the samples' targets among them (B,), negative where they are elsewhere, and occupied (M,)."""

    prototypes: Tensor
    targets: Tensor
    occupied: Tensor | None


def margin_softmax_loss(
    embeddings: Tensor,
    prototypes: Tensor,
    targets: Tensor,
    *,
    margin: Margin | DSoftmax = ArcFace(0.5),
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
    check_batch(embeddings, targets, "targets")
    check_prototypes(prototypes, embeddings)
    check_occupied(occupied, prototypes)
    return loss_over_banks(
        embeddings,
        [Bank(prototypes, targets, occupied)],
        margin=margin,
        scale=scale,
        mining=mining,
        normalize_prototypes=normalize_prototypes,
        reduction=reduction,
        return_stats=return_stats,
    )


def loss_over_banks(
    embeddings: Tensor,
    banks: Sequence[Bank],
    *,
    margin: Margin | DSoftmax,
    scale: float,
    mining: MiningRule | None,
    normalize_prototypes: bool,
    reduction: str,
    return_stats: bool,
) -> Tensor | tuple[Tensor, MarginSoftmaxStats]:
    """Return ``margin_softmax_loss`` over the union of the banks."""
    check_objective(margin, scale, mining)
    check_choice("reduction", reduction, REDUCTIONS)

    counts = torch.stack([_in_bank(bank) for bank in banks]).any(dim=0)
    x, norm = unit_embeddings(torch.where(counts[:, None], embeddings, 0))
    target_map = bind(_no_margin if isinstance(margin, DSoftmax) else margin, norm)
    form = hard_negative_form(x, banks, counts, target_map, mining, normalize_prototypes)
    chosen = choose_negatives(x, banks, mining, normalize_prototypes)
    cosine, n = _cosine_and_negatives(x, banks, chosen, form, scale, normalize_prototypes)

    excess = n - scale * target_map(cosine)
    if isinstance(margin, DSoftmax):
        losses = _softplus(scale * (margin.d - cosine)) + _softplus(n)
    else:
        losses = _softplus(excess)
    penalty = getattr(margin, "penalty", None)
    if penalty is not None:
        losses = losses + penalty(norm)

    kept = mining.kept(losses, counts) if isinstance(mining, HardSamples) else counts
    loss = torch.where(kept, losses, 0)
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / kept.sum().clamp(min=1)
    if not return_stats:
        return loss
    seen = torch.stack([cosine, n, torch.sigmoid(-excess)]).detach()
    return loss, MarginSoftmaxStats(*torch.where(counts, seen, 0))


def _cosine_and_negatives(
    x: Tensor,
    banks: Sequence[Bank],
    chosen: Sequence[Tensor | None],
    form: HardNegativeForm | None,
    scale: float,
    normalize_prototypes: bool,
) -> tuple[Tensor, Tensor]:
    """Return the target cosine (B,) and the log-sum-exp of the negatives (B,) over all banks.

    A sample has its target in one bank and cosine 0 in the others; log-sum-exps of disjoint sets add up.
    """
    cosine = n = None
    for bank, negatives in zip(banks, chosen, strict=True):
        c_here, n_here = negative_logsumexp(
            x,
            bank.prototypes,
            bank.targets,
            scale=scale,
            occupied=bank.occupied,
            negatives=negatives,
            form=form,
            normalize_prototypes=normalize_prototypes,
        )
        cosine = c_here if cosine is None else cosine + c_here
        n = n_here if n is None else _logaddexp(n, n_here)
    assert cosine is not None
    assert n is not None
    return cosine, n


def check_objective(margin: Margin | DSoftmax, scale: float, mining: MiningRule | None) -> None:
    """Check what does not depend on a batch: the margin, the scale and the mining rule."""
    if not callable(margin) and not isinstance(margin, DSoftmax):
        raise TypeError(
            "margin must be a callable (target_cosine, embedding_norm) -> cosine or a DSoftmax, "
            f"got {type(margin).__name__}"
        )
    check_number("scale", scale, low=0, open_low=True)
    if mining is not None and not isinstance(mining, (ReshapesNegatives, HardestNegatives, HardSamples)):
        raise TypeError(f"mining must be a rule of protomem_kernels.mining or None, got {type(mining).__name__}")
    if isinstance(mining, type) or isinstance(margin, type):
        name, value = ("mining", mining) if isinstance(mining, type) else ("margin", margin)
        raise TypeError(f"{name} must be an instance, got the class {getattr(value, '__name__', value)}")


def hard_negative_form(
    x: Tensor,
    banks: Sequence[Bank],
    counts: Tensor,
    target_map: TargetMap,
    mining: MiningRule | None,
    normalize_prototypes: bool,
) -> HardNegativeForm | None:
    """Return how hard negatives are reshaped, or None: the target's cosine sets the threshold before the stream."""
    if not isinstance(mining, ReshapesNegatives):
        return None
    with torch.no_grad():
        cosine = torch.stack([target_cosine(x, bank, normalize_prototypes) for bank in banks]).sum(dim=0)
        return mining.hard_negatives(cosine, counts, target_map)


def target_cosine(x: Tensor, bank: Bank, normalize_prototypes: bool) -> Tensor:
    """Return the cosine of each unit row of ``x`` (B, D) to its target in the bank (B,), 0 where it has none."""
    if bank.prototypes.shape[0] == 0:
        return x.new_zeros(x.shape[0])
    inside = _in_bank(bank)
    rows = bank.prototypes.index_select(0, torch.where(inside, bank.targets, 0)).to(x.dtype)
    if normalize_prototypes:
        rows, _ = unit_embeddings(rows)
    return torch.where(inside, (x * rows).sum(dim=1), 0)


def choose_negatives(
    x: Tensor, banks: Sequence[Bank], mining: MiningRule | None, normalize_prototypes: bool
) -> list[Tensor | None]:
    """Return each bank's slots (B, k) of the k hardest negatives over all banks, or None where all negatives count."""
    if not isinstance(mining, HardestNegatives):
        return [None] * len(banks)
    found = [
        call(
            "hardest_negatives",
            x.detach(),
            bank.prototypes.detach(),
            bank.targets,
            bank.occupied,
            mining.k,
            normalize_prototypes,
        )
        for bank in banks
    ]
    if len(banks) == 1:
        return [found[0][1]]
    cosines = torch.cat([values for values, _ in found], dim=1)
    best = cosines.sort(dim=1, descending=True, stable=True).indices[:, : mining.k]
    kept = torch.zeros_like(cosines, dtype=torch.bool).scatter_(1, best, True)
    slots = torch.cat([slots for _, slots in found], dim=1)
    return list(torch.where(kept, slots, -1).split(mining.k, dim=1))


def _no_margin(cosine: Tensor, norm: Tensor) -> Tensor:
    return cosine


def _in_bank(bank: Bank) -> Tensor:
    return (bank.targets >= 0) & (bank.targets < bank.prototypes.shape[0])


def _softplus(x: Tensor) -> Tensor:
    return functional.softplus(x, threshold=PLAIN_SOFTPLUS)


def _logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """Return log(exp(a) + exp(b)); unlike torch's, the gradient is 0 and not NaN where both are -inf."""
    neither = (a == float("-inf")) & (b == float("-inf"))
    both = torch.logaddexp(torch.where(neither, 0, a), torch.where(neither, 0, b))
    return torch.where(neither, float("-inf"), both)
