"""``warm_start``: a trained classifier fills a memory or a head."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from protomem_kernels._checks import as_labels, check_tensor
from protomem_kernels.losses import MarginSoftmaxLoss, PrototypeMemoryLoss
from protomem_kernels.memory import PrototypeMemory

ROWS_AT_A_TIME = 1 << 16

_LOG = logging.getLogger(__name__)


@torch.no_grad()
def warm_start(
    module: PrototypeMemory | PrototypeMemoryLoss | MarginSoftmaxLoss, weight: Tensor, labels: Tensor | None = None
) -> None:
    """Fill a memory, or a head's class weights, with the rows of a trained classifier.

    - A memory takes the directions as prototypes, in order, as if their identities had just come: those that it knows
      are refreshed, of more than it has slots the last stay. Over several ranks every rank calls, each with its own
      rows (a PartialFC's shard with the labels of its classes), maybe none; they go to their owners.
    - ``MarginSoftmaxLoss`` (and ``compat.insightface.PartialFC_V2``) takes the rows as they are; classes that are not
      among ``labels`` keep theirs. Over several ranks each rank is given all rows, and takes those of its classes.

    Rows of zeros and rows that are not finite are passed over, as those of ``PrototypeMemory.prototypes_of`` are for
    identities that it does not know: so a memory becomes a classifier,
    ``warm_start(head, memory.prototypes_of(labels), labels)``. Its rows are of unit length; a rate that suits class
    weights drawn anew, which are shorter, turns them less.

    Args:
        module: whose rows are written.
        weight: (C, D) floating, one row per class, such as ``nn.Linear(D, C).weight``, or ``W.t()`` of
            pytorch-metric-learning's heads.
        labels: (C,) int, the identity or class of each row; negative: passed over. Default: 0, 1, ...

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range.

    Example:
        >>> memory = PrototypeMemory(capacity=8, embedding_dim=2)
        >>> warm_start(memory, torch.tensor([[3.0, 0.0], [0.0, 0.5]]), torch.tensor([1001, 77]))
        >>> memory.prototypes_of(torch.tensor([77, 5]))
        tensor([[0., 1.],
                [0., 0.]])
    """
    check_tensor("weight", weight, 2, "(C, D)", floating=True)
    if labels is None:
        labels = torch.arange(len(weight), device=weight.device)
    labels = as_labels("labels", labels, "(C,)", weight).long()
    if labels.shape[0] != weight.shape[0]:
        raise ValueError(f"labels must have shape ({weight.shape[0]},) to match weight, got {tuple(labels.shape)}")
    labels = torch.where(torch.isfinite(weight).all(dim=1) & (weight != 0).any(dim=1), labels, -1)
    if isinstance(module, PrototypeMemoryLoss):
        module = module.memory
    if isinstance(module, PrototypeMemory):
        _fill_memory(module, weight, labels)
    elif isinstance(module, MarginSoftmaxLoss):
        _fill_classes(module, weight, labels)
    else:
        raise TypeError(
            f"module must be a PrototypeMemory, PrototypeMemoryLoss or MarginSoftmaxLoss, got {type(module).__name__}"
        )


def _fill_memory(memory: PrototypeMemory, weight: Tensor, labels: Tensor) -> None:
    """Write some rows after the others; no call has more identities than one rank's shard has slots."""
    ranks = memory.ranks
    at_a_time = max(1, min(ROWS_AT_A_TIME, memory.slots_in_use) // ranks.size)
    device = memory.identities.device
    most = int(ranks.max_(torch.tensor(len(weight), device=device)))
    rows = int(ranks.sum_(torch.tensor(len(weight), device=device)))
    if rows > memory.capacity_in_use and ranks.rank == 0:
        _LOG.warning("%d rows for a memory of %d slots: of new identities the last stay", rows, memory.capacity_in_use)
    for start in range(0, most, at_a_time):
        part = slice(start, start + at_a_time)
        memory.update(weight[part].to(device), labels[part].to(device))


def _fill_classes(head: MarginSoftmaxLoss, weight: Tensor, labels: Tensor) -> None:
    """Write the rows of this rank's classes."""
    if weight.shape[1] != head.weight.shape[1]:
        raise ValueError(f"weight must have shape (C, {head.weight.shape[1]}), got {tuple(weight.shape)}")
    if len(labels) and int(labels.max()) >= head.num_classes:
        raise ValueError(f"labels must be below {head.num_classes}, the number of classes, got {int(labels.max())}")
    mine = (labels >= head.first_class) & (labels < head.first_class + len(head.weight))
    rows = (labels[mine] - head.first_class).to(head.weight.device)
    head.weight[rows] = weight[mine].to(head.weight)
