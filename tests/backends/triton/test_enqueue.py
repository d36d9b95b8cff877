"""What is particular to the Triton kernels of ``enqueue_``: launches, loops, wild values.

Everything here is compared with the reference, bits apart. Blocks are made small, so that the interpreter meets several
of each and a tail within a few rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import protomem_kernels as pmk
from protomem_kernels.backends import reference, triton
from protomem_kernels.backends.triton import launch
from protomem_kernels.backends.triton.launch import Launch
from tests.backends.triton.launches import ALLOCATIONS, Launches
from tests.ops.cases import strided

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not triton.interpreted(), reason="runs in Triton's interpreter (TRITON_INTERPRET=1)"),
]
LAST = 2**63 - 1
each_policy = pytest.mark.parametrize("policy", ["fifo", "lru"])
SMALL = {
    "order of identities": Launch(rows=4, slots=8, columns=4),
    "find": Launch(slots=16),
    "write": Launch(slots=8),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "choose", lambda kind, *_: SMALL[kind])


@each_policy
def test_enqueue_takes_three_launches_and_reads_nothing_back(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state, rows, identities = pmk.MemoryState.empty(40, 3), torch.randn(5, 3), torch.arange(5)
    with Launches(monkeypatch) as seen:
        triton.BACKEND.kernels["enqueue_"](*state, rows, identities, 0.2, policy, True)
    assert len(seen.kernels) == 3
    assert seen.operators <= ALLOCATIONS | ({"sort"} if policy == "lru" else set())


def histories() -> Iterator[tuple[list[int], bool]]:
    """Batches for a memory of 20 slots, and whether to break some rows: new, known and repeated identities."""
    yield list(range(19)), False
    yield [60], False  # into the last slot: the ring wraps
    yield [*range(14, 25), -1, 3], False
    yield [24, 7, 30, 7, 24, 31, 30, -5, LAST], False
    yield [*range(0, 40, 3), LAST, 30, 30], True
    yield [41], False
    yield list(range(25, 44)), True


@each_policy
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("layout", [strided, lambda x: x.T.contiguous().T if x.ndim == 2 else x.clone()])
def test_enqueue_in_small_blocks(policy: str, dtype: torch.dtype, layout: object) -> None:
    g = torch.Generator().manual_seed(1)
    theirs = pmk.MemoryState.empty(20, 9, dtype=dtype)
    ours = pmk.MemoryState(*(layout(tensor) for tensor in theirs[:3]), theirs.cursor.clone(), theirs.clock.clone())
    for step, (identities, broken) in enumerate(histories()):
        rows = torch.randn(len(identities), 9, generator=g, dtype=torch.float64)
        if broken:
            rows[3], rows[5, 7], rows[6, 8] = 0, float("nan"), -float("inf")
        rest = strided(rows), strided(torch.tensor(identities)), [0.3, 0.0, 1.0][step % 3], policy, step != 1
        outputs = [
            kernels["enqueue_"](*state, *rest)
            for kernels, state in ((triton.BACKEND.kernels, ours), (reference.BACKEND.kernels, theirs))
        ]
        for a, b in zip((*outputs[0], *ours), (*outputs[1], *theirs), strict=True):
            assert a.dtype == b.dtype
            near = 4 * torch.finfo(dtype).eps if a.is_floating_point() else 0
            torch.testing.assert_close(a, b, rtol=near, atol=near)


@each_policy
@pytest.mark.parametrize("cursor", [-3, 2**40 + 1, 5, 6])
def test_enqueue_survives_a_memory_that_breaks_its_invariants(policy: str, cursor: int) -> None:
    """An identity in two slots, a row that is not finite, a cursor that is nowhere: all stays within the tensors."""
    state = pmk.MemoryState.empty(7, 2)
    state.identities.copy_(torch.tensor([5, 6, 5, -1, 5, 8, 9]))
    state.prototypes.fill_(1.0)
    state.prototypes[4] = float("nan")
    state.cursor.fill_(cursor)
    slots, *_ = triton.BACKEND.kernels["enqueue_"](
        *state, torch.ones(6, 2), torch.tensor([5, 1, 2, 3, 4, 6]), 0.5, policy, False
    )
    assert slots[0] == 4  # the highest slot counts, and the row that came in replaces what was broken
    assert sorted(slots.tolist()) == sorted(set(slots.tolist()))
    assert state.identities[slots].tolist() == [5, 1, 2, 3, 4, 6]
    assert torch.isfinite(state.prototypes).all()
    if policy == "fifo":
        free = [slot % 7 for slot in range(cursor, cursor + 7) if slot % 7 not in (1, 4)]
        assert slots[1:5].tolist() == free[:4]
        assert int(state.cursor) == (free[3] + 1) % 7


@each_policy
def test_enqueue_of_the_memory_s_own_rows(policy: str) -> None:
    made = []
    for kernels in (triton.BACKEND.kernels, reference.BACKEND.kernels):
        state = pmk.MemoryState.empty(6, 2)
        reference.BACKEND.kernels["enqueue_"](
            *state, torch.arange(10.0).view(5, 2) + 1, torch.arange(5), 0.2, policy, False
        )
        # Descending identities: the interpreter's first program writes a row that a later one reads.
        kernels["enqueue_"](*state, state.prototypes[:4], 20 - state.identities[:4], 0.2, policy, False)
        made.append(state)
    for ours, expected in zip(*made, strict=True):
        torch.testing.assert_close(ours, expected)
