"""enqueue_: the batch's prototypes go into the circular memory, in place.

The memory has M slots; slot s holds a unit row w_s (D numbers), an identity and a stamp. The batch brings P <= M rows
p_i with identities. A row is usable if it is finite, not zero and its identity is not negative; the first usable row of
an identity leads, its later ones only learn its slot. With u(x) = x / |x| and the ratio r, a leading row whose identity
stands at slot s refreshes it,

    w_s <- u((1 - r) w_s + r u(p_i)),   or u(p_i) where that sum is no longer than 1e-6;   r = 0: not a bit changes,

and any other takes the next victim v: w_v <- u(p_i). Victims are, for "fifo", the slots from the cursor upwards modulo
M; for "lru", empty slots in ascending order, then the smallest (stamp, slot). Slots whose identity is in the batch,
usable or not, are no victims.

Three launches, and for "lru" a sort between the last two:

1. ``order_kernel`` sorts the batch's identities by counting (``rows.ranks``), finds out which rows are usable, answers
   the unusable ones, ticks the clock.
2. ``find_kernel`` is the join: the memory's identities stream past the sorted ones of the batch once, each looks itself
   up by halving (ceil log2 P loads that hit L1) and leaves its slot there. A few programs more pick, meanwhile, the
   leading row of each identity. Under "lru" every slot also writes an age, M int64.
3. ``write_kernel``: one program per identity. Its place among the new ones is a count over the batch; it is therefore
   found without a scan. Under "fifo" the k-th victim follows from the hits alone, without a look at the ring:
   with t(v) the number of hits at most v slots past the cursor, v - t(v) slots before v are free, so v is
   the least with v + 1 - t(v) > k, found by halving between k and k + P. At M < 2P the ring may be walked around, and
   the same holds: hits and victims are distinct slots, all of them less than M past the cursor.

The join sorts where the CPU's hashes: it shares its order with ``aggregate_prototypes``, needs no table to be cleared
and no collisions to be resolved, and cannot depend on the order in which programs run.

Bytes: 8 M, P D numbers of the batch from memory and once more from cache, as many of the memory read and written; per
identity 12 P bytes of the batch's notes from L2 for the count. "lru" adds 16 M for the ages and what ``torch.sort``
moves. Scratch: some 36 bytes per row of the batch; "lru" some words per slot. Nothing is read back to the host.

Deterministic: no two programs write one place, except that hits are noted by an integer maximum; it matters only to a
memory that breaks the invariant that an identity stands in one slot: that is served without harm, the highest slot
counts. Before the third launch only notes and the clock are written; in it every slot is read and written by the
one program that it belongs to. Prototypes that share storage with the memory are copied first. Within a program, the
threads hold several copies of a scalar and of a row shorter than the block: a barrier stands between the loads of what
it changes (the clock, the slot) and its stores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from protomem_kernels.backends.triton import launch
from protomem_kernels.backends.triton.rows import ranks, unit_rows
from protomem_kernels.backends.triton.tiles import load_rows, narrow

VANISHED = tl.constexpr(1e-6)  # a refreshed row this short has no direction: the new prototype takes its place
OLDEST, NEWEST = tl.constexpr(-(2**63)), tl.constexpr(2**63 - 1)


@triton.jit
def order_kernel(
    prototypes_ptr, stride_prototype, stride_column, identities_ptr, stride_identity, memory_ptr, stride_slot,
    stride_slot_column, cursor_ptr, clock_ptr, start_ptr, ordered_ptr, found_ptr, order_ptr, length_ptr, usable_ptr,
    slots_ptr, evicted_ptr, known_ptr, previous_ptr, size, dim,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sort the batch by identity, note which rows are usable, answer for those that are not, tick the clock.

    Notes by position in the order: the identity, ``found`` = -1 (no slot yet), the row, and how many rows the identity
    has where its first one stands, 0 elsewhere.
    """
    if tl.program_id(0) == 0:
        clock = tl.load(clock_ptr)
        tl.debug_barrier()  # every thread has loaded the clock before one of them stores it
        tl.store(clock_ptr, clock + 1)
        tl.store(start_ptr, tl.load(cursor_ptr))  # the third launch moves the cursor while it reads where it stood
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < size
    identity, less, before, equal = ranks(identities_ptr, stride_identity, size, rows, BLOCK_KEYS)
    position = less + before
    first = (identity >= 0) & (before == 0)
    tl.store(ordered_ptr + position, identity, mask=inside)
    tl.store(found_ptr + position, -1, mask=inside)
    tl.store(order_ptr + position, rows, mask=inside)
    tl.store(length_ptr + position, tl.where(first, equal, 0), mask=inside)

    broken = tl.zeros([BLOCK_ROWS], tl.int32)
    filled = tl.zeros([BLOCK_ROWS], tl.int32)
    dtype: tl.constexpr = tl.float64 if memory_ptr.dtype.element_ty == tl.float64 else tl.float32
    for start in range(0, dim, BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        p = load_rows(prototypes_ptr, rows, columns, stride_prototype, stride_column, inside, dim).to(dtype)
        broken += tl.sum((tl.abs(p) < float("inf")).to(tl.int32), axis=1) - BLOCK_COLUMNS
        filled += tl.sum((p != 0).to(tl.int32), axis=1)
    usable = (identity >= 0) & (broken == 0) & (filled > 0)
    tl.store(usable_ptr + rows, usable.to(tl.int32), mask=inside)
    tl.store(slots_ptr + rows, -1, mask=inside)
    tl.store(evicted_ptr + rows, -1, mask=inside)
    tl.store(known_ptr + rows, 0, mask=inside)
    if previous_ptr is not None:  # slot 0 stands in for none, as in every backend
        for start in range(0, dim, BLOCK_COLUMNS):
            columns = start + tl.arange(0, BLOCK_COLUMNS)
            at = columns.to(tl.int64)
            kept = tl.load(memory_ptr + at * stride_slot_column, mask=columns < dim, other=0.0)
            out = rows.to(tl.int64)[:, None] * dim + at[None, :]
            mask = (inside & (usable == 0))[:, None] & (columns < dim)[None, :]
            tl.store(previous_ptr + out, tl.broadcast_to(kept[None, :], [BLOCK_ROWS, BLOCK_COLUMNS]), mask=mask)


@triton.jit
def find_kernel(
    memory_identities_ptr, stride_identity, stamps_ptr, stride_stamp, ages_ptr, ordered_ptr, found_ptr, order_ptr,
    length_ptr, usable_ptr, leader_ptr, size, capacity, halvings, row_blocks,
    BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """Note at each identity of the batch the slot where it stands, and its leading row.

    2 ** halvings >= size. The first ``row_blocks`` programs look for the leading rows, the others for slots.
    """
    if tl.program_id(0) < row_blocks:
        position = tl.program_id(0) * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
        length = tl.load(length_ptr + position, mask=position < size, other=0)
        leader = tl.full([BLOCK_SLOTS], -1, tl.int32)
        for k in range(0, tl.max(length, axis=0)):
            row = tl.load(order_ptr + position + k, mask=k < length, other=0)
            usable = tl.load(usable_ptr + row, mask=k < length, other=0)
            leader = tl.where((leader < 0) & (usable != 0), row, leader)
        tl.store(leader_ptr + position, leader, mask=position < size)
    else:
        slot = (tl.program_id(0) - row_blocks).to(tl.int64) * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
        inside = slot < capacity
        identity = tl.load(memory_identities_ptr + slot * stride_identity, mask=inside, other=-1)
        occupied = identity >= 0
        low = tl.zeros([BLOCK_SLOTS], tl.int32)  # so many of the batch's identities but the last are known to be less
        for k in range(0, halvings):
            middle = low + (1 << (halvings - 1 - k))
            mask = occupied & (middle < size)
            probe = tl.load(ordered_ptr + middle - 1, mask=mask, other=-1)
            less = (probe >= 0) & (probe < identity)  # negative ones stand behind all others
            low = tl.where(mask & less, middle, low)
        hit = occupied & (tl.load(ordered_ptr + low, mask=occupied, other=-1) == identity)
        tl.atomic_max(found_ptr + low, slot, mask=hit, sem="relaxed")  # the next launch reads it
        if ages_ptr is not None:
            stamp = tl.load(stamps_ptr + slot * stride_stamp, mask=inside, other=0)
            age = tl.where(hit, NEWEST, tl.where(occupied, stamp, OLDEST))
            tl.store(ages_ptr + slot, age, mask=inside)


@triton.jit
def free_slot(found_ptr, place, cursor, size, capacity, halvings, BLOCK_NOTES: tl.constexpr):
    """Return the free slot number ``place`` of the ring from ``cursor`` upwards: those not in ``found`` are free.

    2 ** halvings >= size, more than there are in ``found``: one row of the batch at least is looking for a slot.
    """
    skipped = tl.cast(0, tl.int64)  # so many of the slots from number ``place`` on are known to be too early
    for k in range(0, halvings):
        middle = skipped + (1 << (halvings - 1 - k))
        taken = tl.zeros([BLOCK_NOTES], tl.int32)
        for start in range(0, size, BLOCK_NOTES):
            at = start + tl.arange(0, BLOCK_NOTES)
            found = tl.load(found_ptr + at, mask=at < size, other=-1)
            past = found - cursor
            past = tl.where(past < 0, past + capacity, past)
            taken += ((found >= 0) & (past < place + middle)).to(tl.int32)
        free = place + middle - tl.sum(taken, axis=0)  # among the slots before number place + middle
        skipped = tl.where(free <= place, middle, skipped)
    return (cursor + place + skipped) % capacity


@triton.jit
def write_kernel(
    memory_ptr, stride_slot, stride_slot_column, memory_identities_ptr, stride_identity, stamps_ptr, stride_stamp,
    cursor_ptr, clock_ptr, prototypes_ptr, stride_prototype, stride_column, start_ptr, ordered_ptr, found_ptr,
    order_ptr, length_ptr, usable_ptr, leader_ptr, victims_ptr, slots_ptr, evicted_ptr, known_ptr, previous_ptr,
    refresh_ratio: tl.float64, size, dim, capacity, halvings,
    BLOCK_NOTES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the slot of the identity whose first row stands at this program's position in the order.

    ``victims_ptr`` lists the victims in order; None: take them from the ring.
    """
    position = tl.program_id(0)
    leader = tl.load(leader_ptr + position)
    if leader >= 0:
        slot = tl.load(found_ptr + position)
        known = slot >= 0
        evicted = tl.cast(-1, tl.int64)
        if slot < 0:
            earlier = tl.zeros([BLOCK_NOTES], tl.int32)
            new = tl.zeros([BLOCK_NOTES], tl.int32)
            for start in range(0, size, BLOCK_NOTES):
                at = start + tl.arange(0, BLOCK_NOTES)
                other = tl.load(leader_ptr + at, mask=at < size, other=-1)
                found = tl.load(found_ptr + at, mask=at < size, other=0)
                enters = (other >= 0) & (found < 0)
                new += enters.to(tl.int32)
                earlier += (enters & (other < leader)).to(tl.int32)
            place = tl.sum(earlier, axis=0)
            if victims_ptr is None:
                cursor = tl.load(start_ptr) % capacity
                cursor = tl.where(cursor < 0, cursor + capacity, cursor)
                slot = free_slot(found_ptr, place, cursor, size, capacity, halvings, BLOCK_NOTES)
                if place == tl.sum(new, axis=0) - 1:
                    tl.store(cursor_ptr, (slot + 1) % capacity)
            else:
                slot = tl.load(victims_ptr + place)
            evicted = tl.load(memory_identities_ptr + slot * stride_identity)

        dtype: tl.constexpr = tl.float64 if memory_ptr.dtype.element_ty == tl.float64 else tl.float32
        one = tl.arange(0, 1)
        all_columns = tl.arange(0, BLOCK_D)
        columns = all_columns[None, :].to(tl.int64)
        inside = columns < dim
        row = slot * stride_slot + columns * stride_slot_column
        old = tl.load(memory_ptr + row, mask=inside, other=0.0)
        tl.debug_barrier()  # every thread has what stood in the slot before any of them writes there
        p = load_rows(prototypes_ptr, leader + one, all_columns, stride_prototype, stride_column, one == 0, dim)
        p, _ = unit_rows(p.to(dtype))
        ratio, rest = tl.full([1, 1], refresh_ratio, dtype), tl.full([1, 1], 1.0 - refresh_ratio, dtype)
        blend = rest * old.to(dtype) + ratio * p
        blended, norm = unit_rows(blend)
        refreshed = tl.where(known, norm, 0.0) > VANISHED
        written = tl.where(refreshed[:, None], blended, p)
        changes = tl.where(known, ratio, 1.0) != 0  # keeping means every bit
        tl.store(memory_ptr + row, narrow(written, memory_ptr.dtype.element_ty), mask=inside & changes)
        tl.store(memory_identities_ptr + slot * stride_identity, tl.load(ordered_ptr + position))
        tl.store(stamps_ptr + slot * stride_stamp, tl.load(clock_ptr))

        tl.store(evicted_ptr + leader, evicted)
        for k in range(0, tl.load(length_ptr + position)):
            same = tl.load(order_ptr + position + k)
            if tl.load(usable_ptr + same) != 0:
                tl.store(slots_ptr + same, slot)
                tl.store(known_ptr + same, known)
                if previous_ptr is not None:
                    tl.store(previous_ptr + same.to(tl.int64) * dim + columns, old, mask=inside)


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
    size, (capacity, dim) = identities.shape[0], memory_prototypes.shape
    slots, evicted = (identities.new_empty(size, dtype=torch.int64) for _ in range(2))
    known = identities.new_empty(size, dtype=torch.bool)
    previous = memory_prototypes.new_empty((size, dim) if keep_previous else (0, 0))
    if size == 0:
        clock += 1
        return slots, evicted, known, previous
    if prototypes.untyped_storage().data_ptr() == memory_prototypes.untyped_storage().data_ptr():
        prototypes = prototypes.clone()
    start, ordered, found = clock.new_empty(2 * size + 1).split((1, size, size))
    order, length, usable, leader = clock.new_empty((4, size), dtype=torch.int32).unbind()
    ages = stamps.new_empty(capacity) if policy == "lru" else None
    outputs = slots, evicted, known, previous if keep_previous else None
    halvings = (size - 1).bit_length()

    kinds = "order of identities", "find", "write"
    arch, dtype = launch.architecture(memory_prototypes.device), memory_prototypes.dtype
    compare, find, write = (launch.choose(kind, arch, dtype, dim) for kind in kinds)
    order_kernel[(triton.cdiv(size, compare.rows),)](
        prototypes, *prototypes.stride(), identities, identities.stride(0), memory_prototypes,
        *memory_prototypes.stride(), cursor, clock, start, ordered, found, order, length, usable, *outputs, size, dim,
        compare.rows, compare.slots, compare.columns, **compare.options(),
    )  # fmt: skip
    row_blocks = triton.cdiv(size, find.slots)
    find_kernel[(row_blocks + triton.cdiv(capacity, find.slots),)](
        memory_identities, memory_identities.stride(0), stamps, stamps.stride(0), ages, ordered, found, order, length,
        usable, leader, size, capacity, halvings, row_blocks, find.slots, **find.options(),
    )  # fmt: skip
    victims = None if ages is None else ages.sort(stable=True).indices
    write_kernel[(size,)](
        memory_prototypes, *memory_prototypes.stride(), memory_identities, memory_identities.stride(0), stamps,
        stamps.stride(0), cursor, clock, prototypes, *prototypes.stride(), start, ordered, found, order, length, usable,
        leader, victims, *outputs, refresh_ratio, size, dim, capacity, halvings, write.slots,
        triton.next_power_of_2(dim), **write.options(),
    )  # fmt: skip
    return slots, evicted, known, previous
