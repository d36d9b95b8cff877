"""Comparisons of the batch operators' kernels with the reference, for the tests and for their mutants."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

import protomem_kernels as pmk
from protomem_kernels import reference
from tests.ops.cases import strided

LAST = 2**63 - 1
Kernels = dict[str, Callable[..., Any]]


def batch(size: int, dim: int, people: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return embeddings, labels of which some are negative and some huge, and weights of which some are zero."""
    g = torch.Generator().manual_seed(size + dim)
    labels = torch.randint(-2, people, (size,), generator=g)
    weights = torch.rand(size, generator=g) * (torch.rand(size, generator=g) < 0.7)
    return torch.randn(size, dim, generator=g).to(dtype), torch.where(labels == 3, LAST, labels), weights


def padded(x: Tensor) -> Tensor:
    """Return the same rows, each beginning at a multiple of 16 bytes, whatever their length; vectors as they are."""
    if x.ndim < 2:
        return x
    wide = torch.full((x.shape[0], -(-x.shape[1] // 8) * 8 + 8), float("nan"), dtype=x.dtype)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


def aggregate_matches(
    kernels: Kernels, e: Tensor, labels: Tensor, weights: Tensor | None, normalize: bool, rows: int | None
) -> None:
    """Compare forward and backward with the reference; integers exactly."""
    both = kernels, reference.KERNELS
    ours, theirs = (k["aggregate_prototypes"](e, labels, weights, normalize, rows) for k in both)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    prototypes, _, index, mass, norm = theirs
    g = torch.Generator().manual_seed(0)
    upstream = torch.randn(prototypes.shape, generator=g, dtype=prototypes.dtype)
    one = torch.randn(1, generator=g, dtype=mass.dtype).expand(mass.shape)
    layout = strided if e.numel() and not e.is_contiguous() else lambda x: x
    rest = layout(upstream), one, e, weights, layout(index), layout(prototypes), layout(mass), layout(norm), normalize
    ours, theirs = (k["aggregate_prototypes_backward"](*rest) for k in both)
    for a, b in zip(ours, theirs, strict=True):
        near = max(4 * torch.finfo(a.dtype).eps, 1e-12 if e.dtype == torch.float64 else 1e-5)
        torch.testing.assert_close(a, b, rtol=near, atol=near)


def sums_in_batch_order(kernels: Kernels) -> None:
    """Three ones count beside 2^25 in float32 only where they are added up first."""
    for e, norm in (([1, 1, 1, 2**25], 2**25 + 4), ([2**25, 1, 1, 1], 2**25)):
        rows = torch.tensor(e, dtype=torch.float32)[:, None]
        made = kernels["aggregate_prototypes"](rows, torch.zeros(4, dtype=torch.int64), None, False, 1)
        assert made[4].tolist() == [norm]


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
        outputs = [k["enqueue_"](*s, *rest) for k, s in ((kernels, ours), (reference.KERNELS, theirs))]
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
            outputs = [k["enqueue_"](*s, *rest) for k, s in ((kernels, ours), (reference.KERNELS, theirs))]
            for a, b in zip((*outputs[0], *ours), (*outputs[1], *theirs), strict=True):
                torch.testing.assert_close(a, b)
