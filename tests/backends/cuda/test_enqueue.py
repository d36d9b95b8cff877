"""The CUDA kernels of ``enqueue_``, run on the CPU beside the reference.

Sizes are chosen for the kernels: 8 columns per thread, 2048 slots per step, more than one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import pytest
import torch
from torch import Tensor

import protomem_kernels as pmk
from protomem_kernels.backends import reference
from tests.backends.cuda.operators import Kernels, Operators, load
from tests.backends.cuda.test_aggregate_prototypes import LAST, each_layout
from tests.ops.cases import each_dtype

each_policy = pytest.mark.parametrize("policy", ["fifo", "lru"])

# Batches for a memory of 20 slots, and whether to break some rows: new, known and repeated identities.
HISTORY: list[tuple[list[int], bool]] = [
    (list(range(19)), False),
    ([60], False),  # into the last slot: the ring wraps
    ([*range(14, 25), -1, 3], False),
    ([24, 7, 30, 7, 24, 31, 30, -5, LAST], False),
    ([*range(0, 40, 3), LAST, 30, 30], True),
    ([41], False),
    (list(range(25, 44)), True),
]


def enqueue_matches(
    kernels: Kernels,
    history: Iterable[tuple[list[int], bool]],
    policy: str,
    dim: int,
    dtype: torch.dtype,
    layout: Callable[[Tensor], Tensor],
) -> None:
    """Compare memory and results with the reference after every batch."""
    g = torch.Generator().manual_seed(1)
    theirs = pmk.MemoryState.empty(20, dim, dtype=dtype)
    ours = pmk.MemoryState(*(layout(x.clone()) for x in theirs[:3]), theirs.cursor.clone(), theirs.clock.clone())
    for step, (identities, broken) in enumerate(history):
        rows = torch.randn(len(identities), dim, generator=g, dtype=torch.float64)
        if broken:
            rows[3], rows[5, 7], rows[6, 8] = 0, float("nan"), -float("inf")
        rest = layout(rows), layout(torch.tensor(identities)), [0.3, 0.0, 1.0][step % 3], policy, step != 1
        before = ours.prototypes.clone()
        outputs = [k["enqueue_"](*s, *rest) for k, s in ((kernels, ours), (reference.BACKEND.kernels, theirs))]
        if step % 3 == 1:  # a ratio of 0 keeps every bit
            kept = outputs[0][0][outputs[0][2]]
            assert torch.equal(ours.prototypes[kept], before[kept])
        for a, b in zip((*outputs[0], *ours), (*outputs[1], *theirs), strict=True):
            assert a.dtype == b.dtype
            near = 4 * torch.finfo(dtype).eps if a.is_floating_point() else 0
            torch.testing.assert_close(a, b, rtol=near, atol=near)


def full_memory(capacity: int) -> pmk.MemoryState:
    """Return a memory whose slots hold identities all over, some of them none, and a ring that is about to wrap."""
    g = torch.Generator().manual_seed(capacity)
    state = pmk.MemoryState.empty(capacity, 1)
    state.identities.copy_(torch.randperm(10 * capacity, generator=g)[:capacity])
    state.stamps.copy_(torch.randint(0, 50, (capacity,), generator=g))
    empty = torch.rand(capacity, generator=g) < 0.01
    state.prototypes.fill_(1.0)
    state.prototypes[empty], state.identities[empty], state.stamps[empty] = 0, -1, 0
    state.cursor.fill_(capacity - 3)
    return state


def rows_and_identities(capacity: int, size: int) -> tuple[Tensor, Tensor]:
    """Return a batch for ``full_memory``: a third of it are known."""
    g = torch.Generator().manual_seed(size)
    identities = torch.randint(0, 10 * capacity, (size,), generator=g)
    known = full_memory(capacity).identities
    identities[::3] = known[torch.randint(0, capacity, (len(identities[::3]),), generator=g)]
    return torch.randn(size, 1, generator=g), identities


def lru_matches(kernels: Kernels, sizes: Sequence[int] = (1, 30, 800)) -> None:
    """Compare what is selected: all empty, all stamps alike, neighbours alike, and stamps from end to end of int64."""
    capacity = 2500
    g = torch.Generator().manual_seed(2)
    widest = torch.randint(-(2**63), 2**63 - 1, (capacity,), generator=g)
    widest[7], widest[1900] = -(2**63), 2**63 - 1
    for stamps in (
        None,
        torch.zeros(capacity),
        torch.arange(capacity) // 100,
        torch.arange(capacity).flip(0),
        torch.randint(0, 2**40, (capacity,), generator=g),
        widest,
    ):
        for size in sizes:
            theirs = pmk.MemoryState.empty(capacity, 1)
            if stamps is not None:
                theirs.identities.copy_(torch.arange(capacity))
                theirs.stamps.copy_(stamps)
                theirs.prototypes.fill_(1.0)
            ours = pmk.MemoryState(*(x.clone() for x in theirs))
            identities = 10 * capacity + torch.arange(size)
            identities[::4] = torch.arange(0, size, 4)  # these stand in the oldest slots already
            rest = torch.ones(size, 1), identities, 0.5, "lru", False
            outputs = [k["enqueue_"](*s, *rest) for k, s in ((kernels, ours), (reference.BACKEND.kernels, theirs))]
            for a, b in zip((*outputs[0], *ours), (*outputs[1], *theirs), strict=True):
                torch.testing.assert_close(a, b)


@each_dtype
@each_layout
@each_policy
@pytest.mark.parametrize("dim", [9, 16])
def test_enqueue(ops: Operators, dtype: torch.dtype, layout: Callable[[Tensor], Tensor], policy: str, dim: int) -> None:
    enqueue_matches(ops.kernels, HISTORY, policy, dim, dtype, layout)


@each_policy
def test_enqueue_into_several_blocks(ops: Operators, policy: str) -> None:
    capacity = 4100
    ours, theirs = full_memory(capacity), full_memory(capacity)
    for step in range(3):
        rest = (*rows_and_identities(capacity, [300, 700, 1][step]), 0.2, policy, True)
        outputs = [k["enqueue_"](*s, *rest) for k, s in ((ops.kernels, ours), (reference.BACKEND.kernels, theirs))]
        for a, b in zip((*outputs[0], *ours), (*outputs[1], *theirs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_ring_longer_than_one_window(mode: str) -> None:
    """Over 16384 new rows: their victims are dealt out in more than one window."""
    if mode != "plain":
        pytest.skip("takes long, and holds nothing for the checks that the smaller ones do not")
    capacity, size = 20000, 16600
    ours, theirs = full_memory(capacity), full_memory(capacity)
    rest = torch.ones(size, 1), 10**6 + torch.arange(size), 0.2, "fifo", False
    rest[1][::50] = theirs.identities[capacity - 332 :]
    for kernels, state in ((load(mode).kernels, ours), (reference.BACKEND.kernels, theirs)):
        kernels["enqueue_"](*state, *rest)
    assert torch.equal(ours.identities, theirs.identities)
    assert torch.equal(ours.cursor, theirs.cursor)


def test_lru_selects_exactly(ops: Operators) -> None:
    lru_matches(ops.kernels)


@each_policy
@pytest.mark.parametrize("cursor", [-3, 2**40 + 1, 5, 6])
def test_enqueue_survives_a_memory_that_breaks_its_invariants(ops: Operators, policy: str, cursor: int) -> None:
    """An identity in two slots, a row that is not finite, a cursor that is nowhere: all stays within the tensors."""
    state = pmk.MemoryState.empty(7, 2)
    state.identities.copy_(torch.tensor([5, 6, 5, -1, 5, 8, 9]))
    state.prototypes.fill_(1.0)
    state.prototypes[4] = float("nan")
    state.cursor.fill_(cursor)
    slots, *_ = ops.kernels["enqueue_"](*state, torch.ones(6, 2), torch.tensor([5, 1, 2, 3, 4, 6]), 0.5, policy, False)
    assert slots[0] == 4  # the highest slot counts, and the row that came in replaces what was broken
    assert sorted(slots.tolist()) == sorted(set(slots.tolist()))
    assert state.identities[slots].tolist() == [5, 1, 2, 3, 4, 6]
    assert torch.isfinite(state.prototypes).all()
    if policy == "fifo":
        free = [slot % 7 for slot in range(cursor, cursor + 7) if slot % 7 not in (1, 4)]
        assert slots[1:5].tolist() == free[:4]
        assert int(state.cursor) == (free[3] + 1) % 7


@each_policy
def test_enqueue_of_the_memory_s_own_rows(ops: Operators, policy: str) -> None:
    made = []
    for kernels in (ops.kernels, reference.BACKEND.kernels):
        state = pmk.MemoryState.empty(6, 2)
        reference.BACKEND.kernels["enqueue_"](
            *state, torch.arange(10.0).view(5, 2) + 1, torch.arange(5), 0.2, policy, False
        )
        kernels["enqueue_"](*state, state.prototypes[:4], 20 - state.identities[:4], 0.2, policy, False)
        made.append(state)
    for ours, expected in zip(*made, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("size", [3e38, 1e-44])
def test_enqueue_of_rows_whose_squares_leave_float32(ops: Operators, size: float) -> None:
    state = pmk.MemoryState.empty(4, 3)
    ops.kernels["enqueue_"](*state, torch.full((1, 3), size), torch.tensor([LAST]), 0.2, "fifo", False)
    torch.testing.assert_close(state.prototypes[0], torch.full((3,), 3**-0.5))


def test_an_empty_batch_ticks_the_clock(ops: Operators) -> None:
    state = pmk.MemoryState.empty(4, 3)
    outputs = ops.kernels["enqueue_"](*state, torch.empty(0, 3), torch.empty(0, dtype=torch.int64), 0.2, "lru", True)
    assert [tuple(output.shape) for output in outputs] == [(0,), (0,), (0,), (0, 3)]
    assert int(state.clock) == 1


@each_policy
def test_the_order_of_blocks_and_threads_changes_no_bit(mode: str, policy: str) -> None:
    results = []
    for seed in range(4):
        load(mode).seed(seed)
        state = full_memory(4100)
        outputs = load(mode).kernels["enqueue_"](*state, *rows_and_identities(4100, 40), 0.3, policy, True)
        results.append((*state, *outputs))
    for other in results[1:]:
        for ours, first in zip(other, results[0], strict=True):
            assert torch.equal(ours, first)


@pytest.mark.parametrize(("policy", "launches"), [("fifo", 3), ("lru", 11)])
def test_number_of_launches(ops: Operators, policy: str, launches: int) -> None:
    """The lru figure is for M = 4100: 3, 7 that narrow down, and 1 that collects; one more past M = 2^19."""
    before = ops.launches()
    ops.kernels["enqueue_"](*full_memory(4100), *rows_and_identities(4100, 9), 0.2, policy, False)
    assert ops.launches() - before == launches
