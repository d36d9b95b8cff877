"""The named tuples that operators take and return."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from protomem_kernels._checks import check_int, check_matches, check_tensor

ROWS_AT_A_TIME = 1 << 21  # elements whose norms are taken at a time


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
        check_int("capacity", capacity, at_least=1)
        check_int("embedding_dim", embedding_dim, at_least=1)
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating point type, got {dtype}")
        return cls(
            prototypes=torch.zeros(capacity, embedding_dim, dtype=dtype, device=device),
            identities=torch.full((capacity,), -1, dtype=torch.int64, device=device),
            stamps=torch.zeros(capacity, dtype=torch.int64, device=device),
            cursor=torch.zeros((), dtype=torch.int64, device=device),
            clock=torch.zeros((), dtype=torch.int64, device=device),
        )

    def check(self, name: str = "state") -> None:
        """Check the five tensors against each other; reads no values.

        Args:
            name: what messages call the state; "" for none.

        Raises:
            TypeError, ValueError: naming the tensor, what was expected and what came.
        """
        of = f"{name}." if name else ""
        check_tensor(of + "prototypes", self.prototypes, 2, "(M, D)", floating=True)
        capacity = self.prototypes.shape[0]
        shapes: dict[str, tuple[int, ...]] = {
            "identities": (capacity,),
            "stamps": (capacity,),
            "cursor": (),
            "clock": (),
        }
        for field, shape in shapes.items():
            value, called = getattr(self, field), of + field
            check_tensor(called, value, len(shape), "(M,)" if shape else "()", floating=False)
            if value.dtype != torch.int64:
                raise TypeError(f"{called} must be int64, got {value.dtype}")
            check_matches(called, value, shape, of + "prototypes", self.prototypes)

    def validate(self, name: str = "state") -> None:
        """Check that these five tensors can be the state of a memory; reads all values, once.

        An identity stands in one slot at most and is -1 (none) or >= 0; rows are finite, of unit length where a slot is
        occupied (to the rounding of their dtype) and zero where it is empty; ``stamps`` lie in [0, clock], ``cursor``
        in [0, M).

        Args:
            name: what messages call the state; "" for none.

        Raises:
            TypeError: a wrong type or dtype.
            ValueError: a wrong shape or device, or values that break a rule: the message names the tensor, the rule,
                what came and where.

        >>> MemoryState.empty(4, 2)._replace(cursor=torch.tensor(4)).validate()
        Traceback (most recent call last):
            ...
        ValueError: state.cursor must be in [0, 4), got 4
        """
        self.check(name)
        of = f"{name}." if name else ""
        capacity, clock, cursor = len(self.identities), int(self.clock), int(self.cursor)
        if clock < 0:
            raise ValueError(f"{of}clock must be at least 0, got {clock}")
        if not 0 <= cursor < max(capacity, 1):
            raise ValueError(f"{of}cursor must be in [0, {capacity}), got {cursor}")
        slot = _first(self.identities < -1)
        if slot is not None:
            came = int(self.identities[slot])
            raise ValueError(f"{of}identities must be at least 0, or -1 for none, got {came} in slot {slot}")
        slot = _first((self.stamps < 0) | (self.stamps > clock))
        if slot is not None:
            came = int(self.stamps[slot])
            raise ValueError(f"{of}stamps must be in [0, clock], clock being {clock}, got {came} in slot {slot}")
        ordered, order = self.identities.sort(stable=True)
        at = _first((ordered[1:] == ordered[:-1]) & (ordered[1:] >= 0))
        if at is not None:
            twice, slots = int(ordered[at]), order[at : at + 2].tolist()
            raise ValueError(f"{of}identities must be in one slot each, got {twice} in slots {slots[0]} and {slots[1]}")
        self._validate_rows(of)

    def _validate_rows(self, of: str) -> None:
        dtype = self.prototypes.dtype
        eps = torch.finfo(dtype).eps
        allowed = eps if dtype.itemsize < 4 else 64 * eps  # a sum of D squares rounds too, a stored number once
        start = 0
        for rows in self.prototypes.split(max(ROWS_AT_A_TIME // max(self.prototypes.shape[1], 1), 1)):
            occupied = self.identities[start : start + len(rows)] >= 0
            length = torch.linalg.vector_norm(rows, dim=1, dtype=torch.promote_types(dtype, torch.float32))
            wrong = _first(~((length - occupied.to(length.dtype)).abs() <= torch.where(occupied, allowed, 0.0)))
            if wrong is not None:
                rule = "of length 1 in occupied slots" if bool(occupied[wrong]) else "zero in empty slots"
                raise ValueError(
                    f"{of}prototypes must be {rule}, got a row of length {float(length[wrong]):.6g} "
                    f"in slot {start + wrong}"
                )
            start += len(rows)


def _first(found: Tensor) -> int | None:
    """Return the index of the first True in (N,) bool, or None; reads values."""
    return int(found.int().argmax()) if bool(found.any()) else None


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
