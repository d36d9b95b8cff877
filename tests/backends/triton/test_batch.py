"""What is particular to the Triton kernels of ``aggregate_prototypes`` and ``enqueue_``: launches, loops, wild values.

Everything here is compared with the reference, bits apart. Blocks are made small, so that the interpreter meets several
of each and a tail within a few rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import protomem_kernels as pmk
from protomem_kernels.backends import reference, triton
from tests.ops.cases import strided

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not triton.interpreted(), reason="runs in Triton's interpreter (TRITON_INTERPRET=1)"),
]
LAST = 2**63 - 1
each_policy = pytest.mark.parametrize("policy", ["fifo", "lru"])
BLOCKS = {
    "aggregate_prototypes": {"BLOCK_ROWS": 4, "BLOCK_KEYS": 8, "BLOCK_FLAGS": 8, "BLOCK_SAMPLES": 2},
    "enqueue": {"BLOCK_ROWS": 4, "BLOCK_KEYS": 8, "BLOCK_COLUMNS": 4, "BLOCK_SLOTS": 16, "BLOCK_NOTES": 8},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, sizes in BLOCKS.items():
        for name, size in sizes.items():
            monkeypatch.setattr(f"protomem_kernels.backends.triton.{module}.{name}", size)


class Launches(TorchDispatchMode):
    """Lists the kernels that are launched, and whatever PyTorch is asked for between them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.interpreter import GridExecutor

        super().__init__()
        self.kernels: list[str] = []
        self.operators: set[str] = set()
        launch = GridExecutor.__call__

        def counted(executor, *args, **kwargs):
            self.kernels.append(executor.fn.__name__)
            with _disable_current_modes():
                return launch(executor, *args, **kwargs)

        monkeypatch.setattr(GridExecutor, "__call__", counted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


ALLOCATIONS = {"empty", "new_empty", "select", "unbind", "split_with_sizes", "split", "detach"}


def batch(size: int, dim: int, people: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return embeddings, labels of which some are negative and some huge, and weights of which some are zero."""
    g = torch.Generator().manual_seed(size + dim)
    labels = torch.randint(-2, people, (size,), generator=g)
    weights = torch.rand(size, generator=g) * (torch.rand(size, generator=g) < 0.7)
    return torch.randn(size, dim, generator=g).to(dtype), torch.where(labels == 3, LAST, labels), weights


def test_aggregate_takes_two_launches_and_reads_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    e, labels, weights = batch(21, 5, 6)
    with Launches(monkeypatch) as seen:
        outputs = triton.BACKEND.kernels["aggregate_prototypes"](e, labels, weights, True, 21)
    assert len(seen.kernels) == 2
    assert seen.operators <= ALLOCATIONS
    prototypes, _, index, mass, norm = outputs
    seen.kernels.clear()
    with seen:
        triton.BACKEND.kernels["aggregate_prototypes_backward"](
            prototypes, mass, e, weights, index, prototypes, mass, norm, True
        )
    assert len(seen.kernels) == 1
    assert seen.operators <= ALLOCATIONS
    with seen:  # the instrument notices the one documented read-back
        triton.BACKEND.kernels["aggregate_prototypes"](e, labels, weights, True, None)
    assert "_local_scalar_dense" in seen.operators


@each_policy
def test_enqueue_takes_three_launches_and_reads_nothing_back(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state, rows, identities = pmk.MemoryState.empty(40, 3), torch.randn(5, 3), torch.arange(5)
    with Launches(monkeypatch) as seen:
        triton.BACKEND.kernels["enqueue_"](*state, rows, identities, 0.2, policy, True)
    assert len(seen.kernels) == 3
    assert seen.operators <= ALLOCATIONS | ({"sort"} if policy == "lru" else set())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("size", "dim", "people", "rows"), [(45, 9, 14, 45), (17, 3, 4, 2), (3, 1, 9, 20), (8, 2, 1, 8)]
)
@pytest.mark.parametrize("normalize", [True, False])
def test_aggregate_in_small_blocks(
    dtype: torch.dtype, size: int, dim: int, people: int, rows: int, normalize: bool
) -> None:
    e, labels, weights = batch(size, dim, people, dtype)
    ours, theirs = (
        kernels["aggregate_prototypes"](strided(e), strided(labels), strided(weights), normalize, rows)
        for kernels in (triton.BACKEND.kernels, reference.BACKEND.kernels)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    prototypes, _, index, mass, norm = theirs
    upstream = torch.randn(rows, dim, dtype=prototypes.dtype), torch.randn(1, dtype=mass.dtype).expand(rows)
    for given in (strided(weights.to(dtype)), None):
        ours, theirs = (
            kernels["aggregate_prototypes_backward"](
                strided(upstream[0]), upstream[1], strided(e), given, strided(index), strided(prototypes),
                strided(mass), strided(norm), normalize
            )
            for kernels in (triton.BACKEND.kernels, reference.BACKEND.kernels)
        )  # fmt: skip
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype
            near = max(4 * torch.finfo(a.dtype).eps, 1e-12 if dtype == torch.float64 else 1e-5)
            torch.testing.assert_close(a, b, rtol=near, atol=near)


def test_aggregate_meets_wild_values() -> None:
    """What a GPU meets without PROTOMEM_DEBUG=1: bad weights count as 0, identities past the rows get no row."""
    e, labels = torch.randn(6, 3), torch.tensor([8, 3, 5, 3, 9, 8])
    weights = torch.tensor([float("nan"), -3.0, 1.0, 2.0, float("inf"), -float("inf")])
    made = [
        kernels["aggregate_prototypes"](e, labels, weights, True, 3)
        for kernels in (triton.BACKEND.kernels, reference.BACKEND.kernels)
    ]
    for ours, expected in zip(*made, strict=True):
        torch.testing.assert_close(ours, expected)
    assert made[0][2].tolist() == [2, 0, 1, 0, -1, 2]
    assert made[0][3].tolist() == [2, 1, 0]
    prototypes, _, index, mass, norm = made[0]
    wild = torch.where(index < 0, 2**40, index)
    wild[5] = -(2**40)
    grads = [
        triton.BACKEND.kernels["aggregate_prototypes_backward"](
            torch.ones(3, 3), torch.ones(3), e, weights, given, prototypes, mass, norm, True
        )
        for given in (wild, torch.where(wild.abs() < 3, wild, -1))
    ]
    for ours, expected in zip(*grads, strict=True):
        assert torch.equal(ours, expected)
        assert torch.isfinite(ours).all()


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
