"""The circular memory as lists: what a step does to it, written from the contract."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.fuzz.oracles.rows import directions, lengths

VANISHED = 1e-6


@dataclass
class Slots:
    """A memory: identities, stamps, cursor and clock. Rows are numbers, and stand where the package keeps them."""

    identities: list[int]
    stamps: list[int]
    cursor: int = 0
    clock: int = 0

    @classmethod
    def of(cls, identities: Tensor, stamps: Tensor, cursor: Tensor, clock: Tensor) -> Slots:
        return cls(identities.tolist(), stamps.tolist(), int(cursor), int(clock))

    def find(self, identity: int) -> int:
        return self.identities.index(identity) if identity >= 0 and identity in self.identities else -1


@dataclass
class Written:
    """What a step wrote: per row of the batch its slot, whom it evicted, whether it leads and was known."""

    slots: list[int] = field(default_factory=list)
    evicted: list[int] = field(default_factory=list)
    leads: list[bool] = field(default_factory=list)
    known: list[bool] = field(default_factory=list)


def write(memory: Slots, identities: list[int], usable: list[bool], policy: str) -> Written:
    """Refresh and enqueue rows in place. ``usable``: a finite prototype that is not zero, of an identity >= 0."""
    memory.clock += 1
    capacity, batch = len(memory.identities), {identity for identity in identities if identity >= 0}
    first: dict[int, int] = {}
    for row, identity in enumerate(identities):
        if usable[row]:
            first.setdefault(identity, row)
    before = {identity: memory.find(identity) for identity in first}
    ring = [(memory.cursor + step) % capacity for step in range(capacity)]
    ages = sorted(range(capacity), key=lambda s: (memory.stamps[s], s))
    ages = [s for s in range(capacity) if memory.identities[s] < 0] + [s for s in ages if memory.identities[s] >= 0]
    free = iter([s for s in (ring if policy == "fifo" else ages) if memory.identities[s] not in batch])
    slot, evicted = dict(before), {}
    for identity in first:  # in the order of their rows
        if before[identity] < 0:
            slot[identity] = next(free)
            evicted[identity] = memory.identities[slot[identity]]
    for identity, s in slot.items():
        if before[identity] < 0 and policy == "fifo":
            memory.cursor = (s + 1) % capacity
        memory.identities[s], memory.stamps[s] = identity, memory.clock
    done = Written()
    for row, identity in enumerate(identities):
        leads = usable[row] and first[identity] == row
        done.leads.append(leads)
        done.known.append(usable[row] and before[identity] >= 0)
        done.slots.append(slot[identity] if usable[row] else -1)
        done.evicted.append(max(-1, evicted.get(identity, -1)) if leads else -1)
    return done


def blended(old: Tensor, known: Tensor, prototypes: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Return the rows (P, D) after a step, and how long the blend of each was before it was scaled (P,)."""
    p = directions(prototypes)
    blend = (1 - ratio) * old + ratio * p
    length = lengths(blend.detach())
    vanished = length <= VANISHED
    rows = directions(torch.where((known & ~vanished)[:, None], blend, p))
    return rows, torch.where(known, length, 1.0)
