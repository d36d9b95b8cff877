"""The named tuples that operators take and return."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class MemoryState(NamedTuple):
    """The five tensors of a circular prototype memory with ``M`` slots, all on one device.

    Attributes:
        prototypes: (M, D) floating; unit rows in occupied slots, zero rows in empty ones.
        identities: (M,) int64; the identity in each slot, -1 where it is empty.
        stamps: (M,) int64; the clock's reading when the slot was last written.
        cursor: () int64; the slot at which the ring writes next.
        clock: () int64; the number of ``enqueue_`` calls so far.
    """

    prototypes: Tensor
    identities: Tensor
    stamps: Tensor
    cursor: Tensor
    clock: Tensor

    @classmethod
    def empty(
        cls,
        capacity: int,
        embedding_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> MemoryState:
        """Return a memory of ``capacity`` empty slots for embeddings of size ``embedding_dim``.

        >>> MemoryState.empty(4, 2).identities
        tensor([-1, -1, -1, -1])
        """
        for name, value in (("capacity", capacity), ("embedding_dim", embedding_dim)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating point type, got {dtype}")
        return cls(
            prototypes=torch.zeros(capacity, embedding_dim, dtype=dtype, device=device),
            identities=torch.full((capacity,), -1, dtype=torch.int64, device=device),
            stamps=torch.zeros(capacity, dtype=torch.int64, device=device),
            cursor=torch.zeros((), dtype=torch.int64, device=device),
            clock=torch.zeros((), dtype=torch.int64, device=device),
        )


class AggregatedPrototypes(NamedTuple):
    """What ``aggregate_prototypes`` returns for ``P`` identities in a batch of ``B`` samples.

    Attributes:
        prototypes: (P, D) float32 (float64 for float64 embeddings); unit rows, or a zero row where none exists.
        identities: (P,) int64; ascending and distinct, -1 in unused rows.
        index: (B,) int64; the row of ``prototypes`` that each sample belongs to, -1 for a negative label.
        mass: (P,) like ``prototypes``; the sum of the weights.
    """

    prototypes: Tensor
    identities: Tensor
    index: Tensor  # type: ignore[assignment]  # the field's name; nobody looks for tuple.index here
    mass: Tensor


class EnqueueResult(NamedTuple):
    """What ``enqueue_`` did with each of its ``P`` rows.

    Attributes:
        slots: (P,) int64; where the row's identity stands now, -1 if the row was not written.
        evicted: (P,) int64; the identity that had to leave for this row, or -1.
    """

    slots: Tensor
    evicted: Tensor


class HardNegativeForm(NamedTuple):
    """How hard negatives are reshaped: ``h = a cos + b + g cos**2`` where ``cos > threshold``, else ``h = cos``.

    Attributes:
        threshold: (B,) floating; tau of each sample.
        coefficients: (3,) floating; ``a``, ``b``, ``g``.
        lowest: a bound known on the host: ``h >= lowest`` for every cosine in [-1, 1].
        highest: likewise ``h <= highest``.
        steepest: likewise ``|dh/dcos| <= steepest``.
    """

    threshold: Tensor
    coefficients: Tensor
    lowest: float
    highest: float
    steepest: float


class HardestNegativesResult(NamedTuple):
    """What ``hardest_negatives`` found for each of ``B`` samples: the ``k`` hardest negatives.

    Attributes:
        cosines: (B, k) float32 (float64 for float64); descending, -inf where there are fewer than ``k``.
        slots: (B, k) int64; -1 where there are fewer than ``k``.
    """

    cosines: Tensor
    slots: Tensor


class MarginSoftmaxStats(NamedTuple):
    """What a margin-softmax loss saw of each of ``B`` samples; detached, 0 for ignored samples.

    Attributes:
        target_cosine: (B,) cosine to the sample's own prototype.
        negative_logsumexp: (B,) log of the summed exponentials of the negatives' scaled logits.
        target_probability: (B,) softmax probability of the target, margin included.
    """

    target_cosine: Tensor
    negative_logsumexp: Tensor
    target_probability: Tensor
