"""Reference of ``enqueue_``: refresh the identities that stand in the memory, let the new ones take the oldest slots.

The join with the memory is ``protomem_kernels.identities``. Every step has a shape known beforehand, so nothing is read
back to the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from protomem_kernels.identities import match_identities
from protomem_kernels.rows import accumulation_dtype, refreshed_rows


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
