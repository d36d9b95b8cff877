"""Where identities stand in a memory: the join of a batch's labels with the memory's. Plain PyTorch, for every room.

The batch's identities are the small side of the join: they are sorted, and the memory's identities are streamed past
them once. Every step has a shape known beforehand, so nothing is read back to the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from protomem_kernels._checks import as_labels, check_tensor


def match_identities(memory_identities: Tensor, identities: Tensor, usable: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Join the batch's identities (P,) with the memory's (M,); negative identities match nothing.

    Returns:
        first: (P,) int64; the first row of the batch with the same identity, the ``usable`` (P,) ones before the
            others; -1 for a negative identity.
        slots: (P,) int64; where the identity stands in the memory, or -1.
        matched: (M,) bool; the slots whose identity is in the batch.
    """
    rows, capacity = identities.shape[0], memory_identities.shape[0]
    if rows == 0 or capacity == 0:
        none = torch.full_like(identities, -1)
        return none, none, torch.zeros_like(memory_identities, dtype=torch.bool)
    order = (~usable).int().argsort(stable=True)
    ordered, by_identity = identities[order].sort(stable=True)
    order = order[by_identity]
    starts = torch.searchsorted(ordered, ordered)  # the first of each run of equal identities
    first = torch.empty_like(order).scatter_(0, order, order[starts])
    first = torch.where(identities >= 0, first, -1)

    position = torch.searchsorted(ordered, memory_identities).clamp(max=rows - 1)
    matched = (memory_identities >= 0) & (ordered[position] == memory_identities)
    slot_of_run = identities.new_full((rows + 1,), -1)  # the last entry takes the slots that match nothing
    every_slot = torch.arange(capacity, device=identities.device)
    slot_of_run.scatter_(0, torch.where(matched, position, rows), every_slot)
    slots = torch.empty_like(order).scatter_(0, order, slot_of_run[starts])
    return first, torch.where(identities >= 0, slots, -1), matched


def find_slots(memory_identities: Tensor, identities: Tensor) -> Tensor:
    """Return where each identity (P,) stands among the memory's (M,): slots (P,) int64, -1 if absent or negative."""
    check_tensor("memory_identities", memory_identities, 1, "(M,)", floating=False)
    identities = as_labels("identities", identities, "(P,)", memory_identities)
    usable = torch.ones_like(identities, dtype=torch.bool)
    return match_identities(memory_identities.long(), identities.long(), usable)[1]
