"""``enqueue_``: contract, checks and fake kernel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from protomem_kernels._checks import as_labels, check_choice, check_matches, check_number, check_tensor, shape_of
from protomem_kernels.backends.operators import BATCH
from protomem_kernels.ops.call import call
from protomem_kernels.ops.problems import problems
from protomem_kernels.ops.register import register
from protomem_kernels.types import EnqueueResult, MemoryState

POLICIES = ("fifo", "lru")


def enqueue_(
    state: MemoryState, prototypes: Tensor, identities: Tensor, *, refresh_ratio: float = 0.5, policy: str = "fifo"
) -> EnqueueResult:
    """Scatter the batch's prototypes into the circular memory, in place.

    An identity that stands in the memory is *refreshed*: ``row <- unit((1 - r) row + r p)`` (``p`` alone if that sum
    has norm <= 1e-6). The others, in the order of their rows, are *enqueued* into the next victims: with
    ``policy="fifo"`` the slots from ``cursor`` upwards modulo M, with ``"lru"`` empty slots first and then the
    smallest stamps (ties: the lower slot); slots whose identity is in this batch are passed over. Rows with a
    negative identity, a zero or a non-finite prototype are skipped. Of an identity that comes twice, the first
    usable row counts and the others get its slot. Rows need not be of unit length: they are scaled. Deterministic,
    no host synchronisation.

    Args:
        state: the memory; its tensors are written.
        prototypes: (P, D) floating, from ``aggregate_prototypes``; not differentiated (the memory is a buffer).
        identities: (P,) int64 or int32; negative: skip the row.
        refresh_ratio: r in [0, 1]; 1 replaces, 0 keeps.
        policy: "fifo" or "lru".

    Returns:
        ``EnqueueResult(slots (P,), evicted (P,))``, int64: where each row's identity stands (-1: not written) and which
        identity had to leave for it (-1: none).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or value, or more rows than the memory has slots. A refused call changes
            nothing.

    Example:
        >>> state = MemoryState.empty(capacity=2, embedding_dim=2)
        >>> enqueue_(state, torch.eye(2), torch.tensor([30, 10])).slots
        tensor([0, 1])
        >>> enqueue_(state, torch.ones(1, 2), torch.tensor([20]))
        EnqueueResult(slots=tensor([0]), evicted=tensor([30]))

    Source: Prototype Memory, arXiv 2105.02103, section 3.
    """
    slots, evicted, _, _ = enqueue_keeping_previous_(
        state, prototypes, identities, refresh_ratio=refresh_ratio, policy=policy, keep_previous=False
    )
    return EnqueueResult(slots, evicted)


def enqueue_keeping_previous_(
    state: MemoryState,
    prototypes: Tensor,
    identities: Tensor,
    *,
    refresh_ratio: float,
    policy: str,
    keep_previous: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Do what ``enqueue_`` does and return more: slots, evicted, known (P,) bool and previous (P, D).

    ``known`` says whether the identity stood in the memory before, ``previous`` is what its slot held then (empty
    without ``keep_previous``). They come out of the operator itself because a compiler may move a read of the memory
    past the write.
    """
    if not isinstance(state, MemoryState):
        raise TypeError(f"state must be a MemoryState, got {type(state).__name__}")
    state.check()
    check_tensor("prototypes", prototypes, 2, "(P, D)", floating=True)
    identities = as_labels("identities", identities, "(P,)", prototypes)
    capacity, embedding_dim = state.prototypes.shape
    rows = prototypes.shape[0]
    check_matches("prototypes", prototypes, (rows, embedding_dim), "state.prototypes", state.prototypes)
    check_matches("identities", identities, (rows,), "prototypes", prototypes)
    if rows > capacity:
        raise ValueError(
            f"prototypes must have at most {capacity} rows to fit into state.prototypes "
            f"{shape_of(state.prototypes)}, got {shape_of(prototypes)}"
        )
    check_number("refresh_ratio", refresh_ratio, low=0, high=1)
    check_choice("policy", policy, POLICIES)
    with torch.no_grad():
        slots, evicted, known, previous = call(
            "enqueue_",
            *(tensor.detach() for tensor in state),
            prototypes.detach(),
            identities,
            float(refresh_ratio),
            policy,
            keep_previous,
        )
    return slots, evicted, known, previous


def _fake(
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
    rows = identities.shape[0]
    return (
        identities.new_empty(rows, dtype=torch.int64),
        identities.new_empty(rows, dtype=torch.int64),
        identities.new_empty(rows, dtype=torch.bool),
        memory_prototypes.new_empty((rows, memory_prototypes.shape[1]) if keep_previous else (0, 0)),
    )


def _problems(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for problem in problems(dtype):
        capacity, batch = len(problem.occupied), len(problem.targets)
        identities = torch.where(problem.occupied, 10 * torch.arange(capacity), -1)
        stamps = torch.where(problem.occupied, torch.arange(capacity) % 5, 0)
        cursor, clock = torch.tensor(capacity - 1), torch.tensor(5)  # the ring wraps
        coming = torch.where(problem.targets % 2 == 0, 10 * problem.targets, 10 * problem.targets + 3)
        rows = problem.x.clone()
        rows[2:3] = 0  # may not enter
        for policy in POLICIES:
            yield problem.prototypes, identities, stamps, cursor, clock, rows, coming, 0.3, policy, batch > 1


register(
    "enqueue_",
    works_through=BATCH,
    once_per_step=True,
    problems=_problems,
    fake=_fake,
)
