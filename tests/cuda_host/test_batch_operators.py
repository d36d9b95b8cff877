"""The CUDA kernels of ``aggregate_prototypes`` and ``enqueue_``, run on the CPU beside the reference.

Sizes are chosen for the kernels: tiles of 16 samples, 8 columns per thread, 2048 slots per step, more than one block.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import protomem_kernels as pmk
from protomem_kernels import reference
from tests.cuda_host.batch_checks import (
    HISTORY,
    LAST,
    aggregate_matches,
    batch,
    enqueue_matches,
    full_memory,
    lru_matches,
    padded,
    rows_and_identities,
    sums_in_batch_order,
)
from tests.cuda_host.operators import Operators, load
from tests.ops.cases import DTYPES, strided

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {"contiguous": lambda x: x, "strided": strided, "padded": padded}
each_policy = pytest.mark.parametrize("policy", ["fifo", "lru"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@each_dtype
@each_layout
@pytest.mark.parametrize(
    ("size", "dim", "people", "rows"),
    [(45, 9, 14, 45), (17, 3, 4, 2), (3, 1, 9, 20), (90, 16, 1, 8), (5, 1000, 3, None), (0, 5, 1, 3), (1, 1, 1, None)],
)
def test_aggregate(
    ops: Operators,
    dtype: torch.dtype,
    layout: Callable[[Tensor], Tensor],
    size: int,
    dim: int,
    people: int,
    rows: int | None,
) -> None:
    for normalize, weighted in ((True, True), (True, False), (False, True)):
        e, labels, weights = batch(size, dim, people, dtype)
        given = layout(weights) if weighted else None
        aggregate_matches(ops.kernels, layout(e), layout(labels), given, normalize, rows)


def test_samples_are_added_in_batch_order(ops: Operators) -> None:
    sums_in_batch_order(ops.kernels)


def test_aggregate_meets_wild_values(ops: Operators) -> None:
    """What a GPU meets without PROTOMEM_DEBUG=1: bad weights count as 0, identities past the rows get no row."""
    e, labels = torch.randn(6, 3), torch.tensor([8, 3, 5, 3, 9, 8])
    weights = torch.tensor([float("nan"), -3.0, 1.0, 2.0, float("inf"), -float("inf")])
    aggregate_matches(ops.kernels, e, labels, weights, True, 3)
    e[2, 1], e[5, 0] = float("inf"), float("nan")
    aggregate_matches(ops.kernels, e, labels.int(), weights, True, 3)
    prototypes, _, index, mass, norm = ops.kernels["aggregate_prototypes"](e, labels, weights, True, 3)
    wild = torch.where(index < 0, 2**40, index)
    wild[5] = -(2**40)
    grads = [
        ops.kernels["aggregate_prototypes_backward"](
            torch.ones(3, 3), torch.ones(3), e, weights, given, prototypes, mass, norm, True
        )
        for given in (wild, torch.where(wild.abs() < 3, wild, -1))
    ]
    for ours, expected in zip(*grads, strict=True):
        assert torch.equal(ours, expected)
        assert torch.isfinite(ours).all()


@pytest.mark.parametrize("size", [1e-44, 1e-25, 1e25, 1e38])
def test_aggregate_of_rows_whose_squares_leave_float32(ops: Operators, size: float) -> None:
    e, labels, weights = batch(9, 5, 3)
    e = e / e.abs().amax() * size
    kernel = ops.kernels["aggregate_prototypes"]
    ours, truth = kernel(e, labels, weights, True, 9), kernel(e.double(), labels, weights, True, 9)
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=1e-5, atol=1e-6)


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
        outputs = [k["enqueue_"](*s, *rest) for k, s in ((ops.kernels, ours), (reference.KERNELS, theirs))]
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
    for kernels, state in ((load(mode).kernels, ours), (reference.KERNELS, theirs)):
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
    for kernels in (ops.kernels, reference.KERNELS):
        state = pmk.MemoryState.empty(6, 2)
        reference.KERNELS["enqueue_"](*state, torch.arange(10.0).view(5, 2) + 1, torch.arange(5), 0.2, policy, False)
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
    e, labels, weights = batch(60, 24, 9)
    results = []
    for seed in range(4):
        load(mode).seed(seed)
        kernels = load(mode).kernels
        made = kernels["aggregate_prototypes"](e, labels, weights, True, 60)
        grads = kernels["aggregate_prototypes_backward"](made[0].flip(0), made[3], e, weights, *made[2:3], *made[:1],
                                                         *made[3:], True)  # fmt: skip
        state = full_memory(4100)
        outputs = kernels["enqueue_"](*state, *rows_and_identities(4100, 40), 0.3, policy, True)
        results.append((*made, *grads, *state, *outputs))
    for other in results[1:]:
        for ours, first in zip(other, results[0], strict=True):
            assert torch.equal(ours, first)


@pytest.mark.parametrize(
    ("operator", "policy", "launches"), [("aggregate", "", 2), ("enqueue", "fifo", 3), ("enqueue", "lru", 11)]
)
def test_number_of_launches(ops: Operators, operator: str, policy: str, launches: int) -> None:
    """The lru figure is for M = 4100: 3, 7 that narrow down, and 1 that collects; one more past M = 2^19."""
    before = ops.launches()
    if operator == "aggregate":
        made = ops.kernels["aggregate_prototypes"](*batch(20, 4, 5), True, 20)
        assert ops.launches() - before == launches
        ops.kernels["aggregate_prototypes_backward"](
            made[0], made[3], *batch(20, 4, 5)[::2], made[2], made[0], *made[3:], True
        )
        assert ops.launches() - before == launches + 1
    else:
        ops.kernels["enqueue_"](*full_memory(4100), *rows_and_identities(4100, 9), 0.2, policy, False)
        assert ops.launches() - before == launches
