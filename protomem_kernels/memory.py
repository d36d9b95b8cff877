"""``PrototypeMemory``: the circular memory as a module around the five state tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from protomem_kernels._checks import as_labels, check_batch, check_choice, check_int, check_number, check_weights
from protomem_kernels.identities import find_slots
from protomem_kernels.ops import aggregate_prototypes, hardest_negatives
from protomem_kernels.ops.enqueue import POLICIES, enqueue_keeping_previous_
from protomem_kernels.recomputation import Replay, version
from protomem_kernels.rows import normalize_rows_
from protomem_kernels.state import StatefulModule
from protomem_kernels.types import AggregatedPrototypes, EnqueueResult, MemoryState


class PrototypeMemory(StatefulModule):
    """A limited memory of recent prototypes: made from the batch, refreshed on return, the oldest dequeued.

    The five state tensors are persistent buffers (``prototypes`` a parameter if ``learnable``): ``state_dict()``
    round-trips, and training continues bit for bit, the ring's position included. ``module.to(dtype)`` changes the
    dtype of ``prototypes`` alone; rows that come out of a coarser dtype are scaled to unit length again.

    A state that is loaded, or that something else has written since the memory did (an average of weights with
    ``use_buffers=True``, say, which makes up identities that never existed), is validated once before it is used.

    Args:
        capacity: M, the number of slots.
        embedding_dim: D.
        refresh_ratio: share of the new prototype when an identity returns, in [0, 1].
        policy: which slots new identities take: "fifo" (the ring) or "lru" (the least recently written).
        dtype: of the prototypes; they are computed in float32 (float64) and rounded once.
        device: where the memory lives.
        learnable: make ``prototypes`` an ``nn.Parameter``.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range.
        RuntimeError: from ``load_state_dict``, a state that cannot be; nothing is loaded then.
        ValueError: from later calls, such a state that something else has written (``MemoryState.validate``).
        RuntimeError: from ``update`` in a forward pass that activation checkpointing runs again, when the memory has
            moved on since: it cannot take part in the step that was.

    Example:
        >>> memory = PrototypeMemory(capacity=4, embedding_dim=2)
        >>> memory.update(torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([12, 7]))  # their slots
        tensor([1, 0])
        >>> len(memory), memory.lookup(torch.tensor([7, 8]))
        (2, tensor([ 0, -1]))

    Source: Smirnov et al., Prototype Memory, arXiv 2105.02103.
    """

    KEEPS_DTYPE = ("identities", "stamps", "cursor", "clock")

    prototypes: Tensor
    identities: Tensor
    stamps: Tensor
    cursor: Tensor
    clock: Tensor

    def __init__(
        self,
        capacity: int,
        embedding_dim: int,
        *,
        refresh_ratio: float = 0.2,
        policy: str = "fifo",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        learnable: bool = False,
    ) -> None:
        super().__init__()
        check_number("refresh_ratio", refresh_ratio, low=0, high=1)
        check_choice("policy", policy, POLICIES)
        self.refresh_ratio, self.policy = float(refresh_ratio), policy
        state = MemoryState.empty(capacity, embedding_dim, dtype=dtype, device=device)
        if learnable:
            self.prototypes = nn.Parameter(state.prototypes)
        else:
            self.register_buffer("prototypes", state.prototypes)
        for name in self.KEEPS_DTYPE:
            self.register_buffer(name, getattr(state, name))
        self._enqueued: Replay[tuple[Tensor, Tensor, Tensor, Tensor]] = Replay("a memory's update")
        self._known: tuple[Tensor, int] | None = None  # identities, and how often they were written when last seen
        self._note_identities()

    @property
    def capacity(self) -> int:
        """M, the number of slots."""
        return self.prototypes.shape[0]

    @property
    def embedding_dim(self) -> int:
        """D."""
        return self.prototypes.shape[1]

    @property
    def state(self) -> MemoryState:
        """The five tensors themselves, not copies."""
        return MemoryState(self.prototypes, self.identities, self.stamps, self.cursor, self.clock)

    @property
    def occupied(self) -> Tensor:
        """(M,) bool: which slots hold an identity."""
        return self.identities >= 0

    def __len__(self) -> int:
        """Return the number of identities in the memory; on a GPU this synchronises."""
        return int(self.occupied.sum())

    def __bool__(self) -> bool:
        """Return True: an empty memory is still a memory."""
        return True

    def extra_repr(self) -> str:
        """Return the settings and how full the memory is."""
        filled = "?" if self.identities.is_meta else len(self)
        return (
            f"{filled}/{self.capacity} identities, embedding_dim={self.embedding_dim}, "
            f"refresh_ratio={self.refresh_ratio:g}, policy={self.policy!r}, dtype={self.prototypes.dtype}"
        )

    def check(self, embeddings: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Check a batch against the memory, and the memory if something else has written it; return labels as a tensor.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        self._validate_foreign_state()
        labels = check_batch(embeddings, labels)
        if embeddings.shape[1] != self.embedding_dim:
            raise ValueError(
                f"embeddings must have shape (B, {self.embedding_dim}) to match the memory's embedding_dim, "
                f"got {tuple(embeddings.shape)}"
            )
        if embeddings.device != self.identities.device:
            raise ValueError(f"embeddings must be on {self.identities.device} like the memory, got {embeddings.device}")
        check_weights(weights, embeddings)
        return labels

    def aggregate(self, embeddings: Tensor, labels: Tensor, weights: Tensor | None = None) -> AggregatedPrototypes:
        """Make the batch's prototypes, padded to min(B, M) rows so that no size depends on data.

        Args:
            embeddings: (B, D) floating.
            labels: (B,) integers; negative: the sample takes no part.
            weights: (B,) floating >= 0. Default: all 1.

        Raises:
            ValueError: also if the batch holds more identities than the memory has slots (CPU tensors).
        """
        labels = self.check(embeddings, labels, weights)
        rows = min(embeddings.shape[0], self.capacity)
        return aggregate_prototypes(embeddings, labels, weights, max_identities=rows)

    def enqueue(self, aggregated: AggregatedPrototypes) -> EnqueueResult:
        """Refresh or enqueue the batch's prototypes."""
        slots, evicted, _, _ = self.enqueue_keeping_previous(aggregated, keep_previous=False)
        return EnqueueResult(slots, evicted)

    def enqueue_keeping_previous(
        self, aggregated: AggregatedPrototypes, *, keep_previous: bool = True
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Do what ``enqueue`` does and return more, as ``ops.enqueue.enqueue_keeping_previous_`` does.

        A forward pass that activation checkpointing runs again gets what the step got; the memory does not move.
        """
        made = aggregated.prototypes, aggregated.identities

        def move() -> tuple[Tensor, Tensor, Tensor, Tensor]:
            return enqueue_keeping_previous_(
                self.state,
                *made,
                refresh_ratio=self.refresh_ratio,
                policy=self.policy,
                keep_previous=keep_previous,
            )

        result = self._enqueued(move, inputs=made, state=(self.identities, self.clock))
        self._note_identities()
        return result

    @torch.no_grad()
    def update(self, embeddings: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Aggregate the batch's prototypes and write them into the memory, in any mode of the module.

        Args:
            embeddings: (B, D) floating, raw encoder outputs.
            labels: (B,) int64 or int32; negative: the sample takes no part.
            weights: (B,) floating >= 0, the quality of each image. Default: all 1.

        Returns:
            (B,) int64: the slot of each sample's identity, -1 where there is none.
        """
        aggregated = self.aggregate(embeddings, labels, weights)
        return sample_slots(self.enqueue(aggregated).slots, aggregated.index)

    @torch.no_grad()
    def lookup(self, labels: Tensor) -> Tensor:
        """Return the slot of each label (B,) int64, -1 where it is not in the memory or negative."""
        self._validate_foreign_state()
        return find_slots(self.identities, as_labels("labels", labels, "(B,)", self.identities))

    @torch.no_grad()
    def doppelgangers(self, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the k identities that look most like each given one.

        Args:
            labels: (N,) int, identities.
            k: how many, >= 1.

        Returns:
            ``(cosines (N, k), identities (N, k) int64)``, descending; (-inf, -1) where there are fewer, or where the
            label is not in the memory.
        """
        check_int("k", k, at_least=1)
        slots = self.lookup(labels)
        queries = self.prototypes.index_select(0, slots.clamp(min=0))
        cosines, found = hardest_negatives(queries, self.prototypes, slots, k=k, occupied=self.occupied)
        known = (slots >= 0)[:, None] & (found >= 0)
        identities = self.identities[found.clamp(min=0)]
        return torch.where(known, cosines, float("-inf")), torch.where(known, identities, -1)

    @torch.no_grad()
    def reset(self) -> None:
        """Forget every identity and start over."""
        self.prototypes.zero_()
        self.identities.fill_(-1)
        for tensor in (self.stamps, self.cursor, self.clock):
            tensor.zero_()
        self._note_identities()

    def reset_parameters(self) -> None:
        """Forget every identity and start over: ``reset`` by the name that PyTorch looks for."""
        self.reset()

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Raise if this is not the state of a memory of this size, or of none at all.

        Raises:
            TypeError, ValueError: naming the tensor, what was expected and what came.
        """
        missing = [name for name in MemoryState._fields if name not in state]
        if missing:
            if len(missing) == len(MemoryState._fields):
                return  # PyTorch itself reports what lacks
            raise ValueError(f"a memory's five tensors must come together, {', '.join(missing)} lack")
        loaded = MemoryState(**{name: state[name] for name in MemoryState._fields})
        if loaded.prototypes.shape != self.prototypes.shape:
            raise ValueError(
                f"prototypes must have shape {tuple(self.prototypes.shape)} like this memory's, "
                f"got {tuple(loaded.prototypes.shape)}"
            )
        loaded.validate("")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        value = state_dict.get(prefix + "prototypes")
        if isinstance(value, Tensor):
            self._rescale_rows_from(value.dtype)
        self._note_identities()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        dtype = self.prototypes.dtype
        super()._apply(fn, recurse)
        self._rescale_rows_from(dtype)
        self._note_identities()
        return self

    def _rescale_rows_from(self, dtype: torch.dtype) -> None:
        """Scale rows that were rounded to a coarser dtype to unit length: they are to the rounding of that one."""
        if torch.finfo(dtype).eps > torch.finfo(self.prototypes.dtype).eps and not self.prototypes.is_meta:
            normalize_rows_(self.prototypes.detach())

    def _note_identities(self) -> None:
        """Remember which identities are this memory's own work, or were validated."""
        if not torch.compiler.is_compiling():
            self._known = self.identities, version(self.identities)

    def _validate_foreign_state(self) -> None:
        """Validate the state if something else has written the identities; otherwise two comparisons."""
        if torch.compiler.is_compiling() or self.identities.is_meta:
            return
        tensor, written = self._known or (None, 0)
        if tensor is not self.identities or written != version(tensor):
            self.state.validate("memory")
            self._note_identities()

    def __getstate__(self) -> dict[str, Any]:
        """Have copies and pickles validate their state once: a copy may be written by what averages weights."""
        return self.__dict__ | {"_known": None}


def sample_slots(slots: Tensor, index: Tensor) -> Tensor:
    """Return each sample's slot (B,) from its identity's (P,) and the row of its identity (B,); -1 is none."""
    padded = torch.cat([slots, slots.new_full((1,), -1)])
    return padded[torch.where(index < 0, slots.shape[0], index)]
