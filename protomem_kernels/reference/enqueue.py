"""Reference of ``enqueue_``: refresh the identities that stand in the memory, let the new ones take the oldest slots.

The batch's identities are the small side of the join: they are sorted, and the memory's identities are streamed past
them once. Every step has a shape known beforehand, so nothing is read back to the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from protomem_kernels.reference._rows import accumulation_dtype, unit_rows

VANISHED = 1e-6  # a refreshed row this short has no direction: the new prototype takes its place


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


def refreshed_rows(old: Tensor, known: Tensor, prototypes: Tensor, refresh_ratio: float) -> Tensor:
    """Return the rows (P, D) that the memory will hold, in the accumulation dtype; differentiable in ``prototypes``.

    ``unit((1 - r) old + r p)`` where the identity is ``known`` (P,), ``unit(p)`` where it is new or the sum vanishes.
    """
    p = unit_rows(prototypes)
    blend = (1 - refresh_ratio) * old + refresh_ratio * p
    keeps_direction = torch.linalg.vector_norm(blend.detach(), dim=1) > VANISHED
    return unit_rows(torch.where((known & keeps_direction)[:, None], blend, p))


def victims_fifo(matched: Tensor, cursor: Tensor, rows: int) -> Tensor:
    """Return the next ``rows`` slots (P,) of the ring from ``cursor`` upwards, passing over ``matched`` ones.

    At most ``rows`` slots match, so a window of twice that many holds enough of the others.
    """
    capacity = matched.shape[0]
    window = (cursor + torch.arange(min(capacity, 2 * rows), device=matched.device)) % capacity
    free = (~matched[window]).cumsum(0)
    wanted = torch.arange(1, rows + 1, device=matched.device)
    return window[torch.searchsorted(free, wanted).clamp(max=window.shape[0] - 1)]


def victims_lru(matched: Tensor, identities: Tensor, stamps: Tensor, rows: int) -> Tensor:
    """Return the first ``rows`` slots (P,) in the order: empty, oldest stamp, lower slot; ``matched`` ones last."""
    int64 = torch.iinfo(torch.int64)
    age = torch.where(identities >= 0, stamps, int64.min)
    return torch.where(matched, int64.max, age).argsort(stable=True)[:rows]


def enqueue_(
    memory_prototypes: Tensor,
    memory_identities: Tensor,
    stamps: Tensor,
    cursor: Tensor,
    clock: Tensor,
    prototypes: Tensor,
    identities: Tensor,
    refresh_ratio: float,
    policy: str,
    keep_previous: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Write the batch's prototypes (P, D) into the memory in place.

    Returns slots (P,), evicted identities (P,), known (P,) bool: the identity stood in the memory before, and, if
    ``keep_previous``, what stood in the slots before (P, D).
    """
    clock += 1
    identities = identities.long()
    rows = identities.shape[0]
    if rows == 0:
        previous = memory_prototypes.new_empty((0, memory_prototypes.shape[1]) if keep_previous else (0, 0))
        return identities.new_empty(0), identities.new_empty(0), identities.new_empty(0, dtype=torch.bool), previous
    dtype = accumulation_dtype(memory_prototypes.dtype)
    p = prototypes.to(dtype)
    usable = torch.isfinite(p).all(dim=1) & (p != 0).any(dim=1) & (identities >= 0)
    first, slots, matched = match_identities(memory_identities, identities, usable)

    row = torch.arange(rows, device=identities.device)
    leads = usable & (first == row)  # the first usable row of its identity is the one that counts
    known = usable & (slots >= 0)
    new = leads & ~known
    if policy == "fifo":
        victims = victims_fifo(matched, cursor, rows)
    else:
        victims = victims_lru(matched, memory_identities, stamps, rows)
    place = new.cumsum(0) - 1
    slots = torch.where(new, victims[place.clamp(min=0)], slots)
    slots = torch.where(usable, slots[first.clamp(min=0)], -1)
    evicted = torch.where(new, memory_identities[slots.clamp(min=0)], -1)

    previous = memory_prototypes[slots.clamp(min=0)]
    written = refreshed_rows(previous.to(dtype), known, p, refresh_ratio).to(memory_prototypes.dtype)
    if refresh_ratio == 0:  # keeping means every bit
        written = torch.where(known[:, None], previous, written)

    # Rows that write nothing repeat the write of one that does, or rewrite slot 0 as it stands if none does.
    source = torch.where(leads, row, leads.int().argmax())
    target = torch.where(leads.any(), slots[source], 0)
    some = leads.any()
    memory_prototypes[target] = torch.where(some, written[source], memory_prototypes[0])
    memory_identities[target] = torch.where(some, identities[source], memory_identities[0])
    stamps[target] = torch.where(some, clock, stamps[0])
    if policy == "fifo":
        last = victims.index_select(0, place[-1:].clamp(min=0))[0]  # an index of one element alone would synchronise
        cursor.copy_(torch.where(new.any(), (last + 1) % memory_identities.shape[0], cursor))
    return slots, evicted, known, previous if keep_previous else previous.new_empty(0, 0)
