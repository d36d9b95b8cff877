"""``margin_softmax_logits``: the (B, M) logits for whoever wants them. Contract, checks, fake kernel and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from protomem_kernels._checks import check_batch, check_occupied, check_prototypes, refuse_targets_past_the_end
from protomem_kernels.margins import ArcFace, DSoftmax, Margin, bind
from protomem_kernels.mining import MiningRule
from protomem_kernels.ops._embeddings import unit_embeddings
from protomem_kernels.ops.dispatch import call, register
from protomem_kernels.ops.margin_softmax_loss import (
    Bank,
    check_objective,
    choose_negatives,
    hard_negative_form,
    target_cosine,
)


def margin_softmax_logits(
    embeddings: Tensor,
    prototypes: Tensor,
    targets: Tensor,
    *,
    margin: Margin = ArcFace(0.5),
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
    check_batch(embeddings, targets, "targets")
    check_prototypes(prototypes, embeddings)
    check_occupied(occupied, prototypes)
    check_objective(margin, scale, mining)
    if isinstance(margin, DSoftmax):
        raise TypeError("margin must be a margin on the target's logit, got DSoftmax, which is no single softmax")

    x, norm = unit_embeddings(embeddings)
    bank = Bank(prototypes, targets, occupied)
    counts = (targets >= 0) & (targets < prototypes.shape[0])
    target_map = bind(margin, norm)
    form = hard_negative_form(x, [bank], counts, target_map, mining, normalize_prototypes)
    logits = call(
        "margin_softmax_logits",
        x,
        prototypes,
        targets,
        scale * target_map(target_cosine(x, bank, normalize_prototypes)),
        occupied,
        None if form is None else form.threshold,
        None if form is None else form.coefficients,
        float(scale),
        normalize_prototypes,
    )
    (chosen,) = choose_negatives(x, [bank], mining, normalize_prototypes)
    return logits if chosen is None else _only(logits, torch.cat([chosen, targets.long()[:, None]], dim=1))


def _only(logits: Tensor, slots: Tensor) -> Tensor:
    """Return the logits (B, M) with -inf everywhere but at each row's ``slots`` (B, k); outside [0, M) is none."""
    capacity = logits.shape[1]
    kept = torch.zeros(logits.shape[0], capacity + 1, dtype=torch.bool, device=logits.device)
    kept.scatter_(1, torch.where((slots < 0) | (slots >= capacity), capacity, slots), True)
    return torch.where(kept[:, :capacity], logits, float("-inf"))


def _check_values(x: Tensor, prototypes: Tensor, targets: Tensor, *_: Any) -> None:
    refuse_targets_past_the_end(targets, prototypes.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, prototypes, targets, _, occupied, threshold, coefficients, ctx.scale, ctx.normalize_prototypes = inputs
    ctx.save_for_backward(x, prototypes, targets, occupied, threshold, coefficients)


def _backward(ctx: Any, grad: Tensor) -> Any:
    need_prototypes = ctx.needs_input_grad[1]
    grad_x, grad_prototypes, grad_target = call(
        "margin_softmax_logits_backward", grad, *ctx.saved_tensors, ctx.scale, ctx.normalize_prototypes, need_prototypes
    )
    return grad_x, grad_prototypes if need_prototypes else None, None, grad_target, *[None] * 5


def _backward_fake(grad: Tensor, x: Tensor, prototypes: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_prototypes = rest[-1]
    grad_prototypes = prototypes.new_empty(prototypes.shape) if need_prototypes else x.new_empty(0, 0)
    return x.new_empty(x.shape), grad_prototypes, x.new_empty(x.shape[0])


register(
    "margin_softmax_logits",
    "(Tensor x, Tensor prototypes, Tensor targets, Tensor target_logits, Tensor? occupied, Tensor? threshold,"
    " Tensor? coefficients, float scale, bool normalize_prototypes) -> Tensor logits",
    fake=lambda x, prototypes, *_: x.new_empty(x.shape[0], prototypes.shape[0]),
    check_values=_check_values,
    setup_context=_setup_context,
    backward=_backward,
)
register(
    "margin_softmax_logits_backward",
    "(Tensor grad, Tensor x, Tensor prototypes, Tensor targets, Tensor? occupied, Tensor? threshold,"
    " Tensor? coefficients, float scale, bool normalize_prototypes, bool need_prototypes)"
    " -> (Tensor grad_x, Tensor grad_prototypes, Tensor grad_target_logits)",
    fake=_backward_fake,
)
