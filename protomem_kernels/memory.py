"""``PrototypeMemory``: the circular memory as a module around the five state tensors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from protomem_kernels._checks import (
    as_labels,
    check_batch,
    check_choice,
    check_device,
    check_int,
    check_number,
    check_weights,
)
from protomem_kernels.distributed.agreement import Agreement
from protomem_kernels.distributed.batch import ONE_RANK, Batch, Rows, SharedRows, batch_options, gather_batch, largest
from protomem_kernels.distributed.data_parallel import OwnedByRank, warn_of_own_memory
from protomem_kernels.distributed.owners import owners
from protomem_kernels.distributed.ranks import ranks_of
from protomem_kernels.distributed.resharding import KeptInShards, Saved, Shard, laid, oldest_first
from protomem_kernels.identities import find_slots
from protomem_kernels.ops import aggregate_prototypes, hardest_negatives
from protomem_kernels.ops.enqueue import POLICIES, enqueue_keeping_previous_
from protomem_kernels.ops.register import values_can_be_read
from protomem_kernels.recomputation import Replay, version
from protomem_kernels.rows import AT_A_TIME, accumulation_dtype, normalize_rows_, widened
from protomem_kernels.state import StatefulModule
from protomem_kernels.types import AggregatedPrototypes, EnqueueResult, MemoryState

_LOG = logging.getLogger(__name__)


class PrototypeMemory(StatefulModule, OwnedByRank, KeptInShards):
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
        process_group: of ``torch.distributed``: one memory over its ranks (docs/distributed.md). ``capacity`` is the
            total; a rank keeps ceil(capacity / W) slots, for the identities that it owns, and the five tensors, ``len``
            and ``state_dict()`` are that shard's. ``update``, ``aggregate``, ``lookup``, ``prototypes_of`` and
            ``doppelgangers`` are then collective: every rank calls, each with its own part of the batch, maybe an empty
            one. Slots count through the shards: rank * shard_size + the slot there. Default: this process alone.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range; of a collective call, on every rank alike,
            what one rank was given.
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
        refresh_ratio: float = 0.5,
        policy: str = "fifo",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        learnable: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_number("refresh_ratio", refresh_ratio, low=0, high=1)
        check_choice("policy", policy, POLICIES)
        self.refresh_ratio, self.policy = float(refresh_ratio), policy
        check_int("capacity", capacity, at_least=1)
        self.ranks = ranks_of(process_group)
        if capacity < self.ranks.size:
            raise ValueError(f"capacity must be at least {self.ranks.size}, the ranks of process_group, got {capacity}")
        self._capacity = self._capacity_in_use = capacity
        self._agree = Agreement(self.ranks)
        self._met_ranks = False
        state = MemoryState.empty(-(-capacity // self.ranks.size), embedding_dim, dtype=dtype, device=device)
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
        """M, the number of slots; over several ranks, of all shards together, as it was asked for."""
        return self._capacity

    @property
    def shard_size(self) -> int:
        """The number of slots on this rank."""
        return self.prototypes.shape[0]

    @property
    def capacity_in_use(self) -> int:
        """How many of the ``capacity`` slots the ring takes now; over several ranks, of all shards together."""
        return self._capacity_in_use

    @property
    def slots_in_use(self) -> int:
        """The same on this rank: the first of its slots."""
        return min(-(-self._capacity_in_use // self.ranks.size), self.shard_size)

    @torch.no_grad()
    def use(self, capacity: int) -> None:
        """Let the ring take ``capacity`` slots from now on, the first ones; the others stay empty and cost nothing.

        The identities keep their order. Where there are more, those go that would have been overwritten first. Not
        collective, but every rank has to call it alike. ``state_dict()`` keeps its size; a memory that loads a state
        with identities beyond goes back to all slots, until it is told again.

        Args:
            capacity: in [the number of ranks, ``capacity``]; a batch may hold no more identities.

        Raises:
            ValueError: out of range, or ``prototypes`` is a parameter, whose rows an optimiser knows by their place.
        """
        check_int("capacity", capacity, at_least=self.ranks.size)
        if capacity > self.capacity:
            raise ValueError(f"capacity must be at most {self.capacity}, the memory's, got {capacity}")
        if capacity == self._capacity_in_use:
            return
        if isinstance(self.prototypes, nn.Parameter):
            raise ValueError("a learnable memory must use all its slots: an optimizer knows its rows by their place")
        before, self._capacity_in_use = self.slots_in_use, capacity
        if self.slots_in_use > before or not self._fits():
            self._lay(before)

    def _fits(self) -> bool:
        """Say whether nothing stands beyond the slots in use; reads values."""
        slots = self.slots_in_use
        return int(self.cursor) < slots and not bool(self.occupied[slots:].any())

    def _lay(self, ring: int) -> None:
        """Lay the identities of a ring of so many slots from slot 0 on, as many of the last as there are in use."""
        order = (
            oldest_first(self.cursor.reshape(1).cpu(), ring).to(self.stamps.device)
            if self.policy == "fifo"
            else self.stamps[:ring].argsort(stable=True)
        )
        order = order[self.identities[order] >= 0][-self.slots_in_use :]
        rows, identities, stamps = self.prototypes[order], self.identities[order], self.stamps[order]
        clock = self.clock.clone()
        self.reset()
        for tensor, values in ((self.prototypes, rows), (self.identities, identities), (self.stamps, stamps)):
            tensor[: len(order)] = values
        self.cursor.fill_(len(order) % self.slots_in_use)
        self.clock.copy_(clock)
        self._note_identities()

    @property
    def ring(self) -> MemoryState:
        """The five tensors as far as the slots in use go: views where these are not all."""
        slots = self.slots_in_use
        if slots == self.shard_size:
            return self.state
        return MemoryState(
            self.prototypes[:slots], self.identities[:slots], self.stamps[:slots], self.cursor, self.clock
        )

    @property
    def embedding_dim(self) -> int:
        """D."""
        return self.prototypes.shape[1]

    @property
    def state(self) -> MemoryState:
        """The five tensors themselves, not copies; over several ranks, this one's."""
        return MemoryState(self.prototypes, self.identities, self.stamps, self.cursor, self.clock)

    @property
    def occupied(self) -> Tensor:
        """(M,) bool: which slots hold an identity."""
        return self.identities >= 0

    def __len__(self) -> int:
        """Return the number of identities in the memory, over several ranks in this one's; on a GPU it synchronises."""
        return int(self.occupied.sum())

    def __bool__(self) -> bool:
        """Return True: an empty memory is still a memory."""
        return True

    def extra_repr(self) -> str:
        """Return the settings and how full the memory is."""
        filled = "?" if self.identities.is_meta else len(self)
        where = "" if self.ranks.alone else f" on {self.ranks!r}, capacity={self.capacity}"
        return (
            f"{filled}/{self.shard_size} identities{where}, embedding_dim={self.embedding_dim}, "
            f"refresh_ratio={self.refresh_ratio:g}, policy={self.policy!r}, dtype={self.prototypes.dtype}"
        )

    def check(self, embeddings: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Check a batch against the memory, and the memory if something else has written it; return labels as a tensor.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        self._validate_foreign_state()
        if not self._met_ranks:
            self._meet_ranks()
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

        Over several ranks: those that this rank owns of the batch of all ranks, whose samples come rank by rank.

        Args:
            embeddings: (B, D) floating.
            labels: (B,) integers; negative: the sample takes no part.
            weights: (B,) floating >= 0. Default: all 1.

        Raises:
            ValueError: also if the batch holds more identities than the memory has slots (CPU tensors), or more of one
                owner than that one has.
        """
        return self.aggregate_owned(self._shared(embeddings, labels, weights))

    def aggregate_owned(self, batch: Batch) -> AggregatedPrototypes:
        """Do what ``aggregate`` does with a batch that was checked and brought together."""
        rows = min(batch.embeddings.shape[0], self.slots_in_use)
        self._refuse_more_than_fit(batch.labels)
        return aggregate_prototypes(batch.embeddings, self.owned(batch.labels), batch.weights, max_identities=rows)

    def owned(self, labels: Tensor) -> Tensor:
        """Return the labels (N,) of all ranks' samples with -1 in place of those that other ranks own."""
        if self.ranks.alone:
            return labels
        return torch.where(owners(labels, self.ranks.size) == self.ranks.rank, labels, -1)

    def enqueue(self, aggregated: AggregatedPrototypes) -> EnqueueResult:
        """Refresh or enqueue the batch's prototypes; over several ranks, those that this one owns, and not collective.

        Raises:
            TypeError, ValueError: as ``enqueue_`` does; on the CPU also an identity that another rank owns.
        """
        if not self.ranks.alone and values_can_be_read(aggregated.identities):
            self._refuse_others_identities("aggregated.", aggregated.identities)
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
                self.ring,
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
        batch = self._shared(embeddings, labels, weights)
        made = self.aggregate_owned(batch)
        slots, _, _, _ = self.enqueue_keeping_previous(made, keep_previous=False)
        return self._told_by_owners(sample_slots(slots, made.index), batch.rows)

    @torch.no_grad()
    def lookup(self, labels: Tensor) -> Tensor:
        """Return the slot of each label (B,) int64, -1 where it is not in the memory or negative."""
        labels, rows = self._shared_labels(labels, "lookup")
        return self._told_by_owners(find_slots(self.identities, labels), rows)

    @torch.no_grad()
    def prototypes_of(self, labels: Tensor) -> Tensor:
        """Return the prototype of each label (N,): (N, D), zeros where it is not in the memory."""
        labels, rows = self._shared_labels(labels, "prototypes_of")
        slots = find_slots(self.identities, labels)
        known, found = slots >= 0, self.prototypes.index_select(0, slots.clamp(min=0))
        if not self.ranks.alone:
            known, found = self._queries_of_owners(known, found)
        return rows.own(torch.where(known[:, None], found, 0)).to(self.prototypes.dtype)

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
        if self.ranks.alone:
            check_int("k", k, at_least=1)
        labels, rows = self._shared_labels(labels, "doppelgangers", k)
        slots = find_slots(self.identities, labels)
        known, queries = slots >= 0, self.prototypes.index_select(0, slots.clamp(min=0))
        if not self.ranks.alone:
            known, queries = self._queries_of_owners(known, queries)
        cosines, found = hardest_negatives(queries, self.prototypes, slots, k=k, occupied=self.occupied)
        identities = torch.where(found >= 0, self.identities[found.clamp(min=0)], -1)
        cosines, identities = (rows.own(value) for value in largest(self.ranks, cosines, identities))
        known = rows.own(known)[:, None] & (identities >= 0)
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
        self._refuse_others_identities("", loaded.identities)

    def shards(self) -> dict[str, Shard]:
        """Return the five tensors as this rank's part of all ranks': of ``cursor`` and ``clock``, one number each."""
        rank, size = self.ranks.rank, self.ranks.size
        rows = ("prototypes", "identities", "stamps")
        return {
            **{name: Shard(getattr(self, name), rank * self.shard_size, size * self.shard_size) for name in rows},
            **{name: Shard(getattr(self, name).reshape(1), rank, size) for name in ("cursor", "clock")},
        }

    def from_saved(self, saved: Saved, beside: Iterable[str] = ()) -> dict[str, Tensor]:
        """Return the five tensors of a memory that any number of ranks saved, and what lies ``beside`` its prototypes.

        As many ranks with as many slots each: as they were. Otherwise the rows that this rank owns, laid from slot 0 on
        in the order in which they would be overwritten, and the cursor after the last.

        Raises:
            ValueError: what was saved is of another embedding size.
        """
        total, embedding_dim = saved.shape("prototypes")
        if embedding_dim != self.embedding_dim:
            raise ValueError(f"prototypes must have embedding_dim {self.embedding_dim}, got {embedding_dim}")
        (ranks,) = saved.shape("cursor")
        if (ranks, total // ranks) == (self.ranks.size, self.shard_size):
            loaded = super().from_saved(saved, beside)
            return loaded | {name: loaded[name].reshape(()) for name in ("cursor", "clock")}
        identities, stamps = saved.read("identities"), saved.read("stamps")
        order = (
            oldest_first(saved.read("cursor"), total // ranks)
            if self.policy == "fifo"
            else stamps.argsort(stable=True)  # between equals the lower slot comes first, as it would be overwritten
        )
        order = order[identities[order] >= 0]
        mine, dropped = laid(identities[order], self.ranks.size, self.ranks.rank, self.shard_size)
        if dropped and self.ranks.rank == 0:
            _LOG.warning(
                "%d of %d identities were dropped, the oldest of those that %d x %d slots have no place for",
                dropped,
                len(order),
                self.ranks.size,
                self.shard_size,
            )
        slots = order[mine]
        state = MemoryState.empty(self.shard_size, embedding_dim, dtype=self.prototypes.dtype)
        state.identities[: len(slots)], state.stamps[: len(slots)] = identities[slots], stamps[slots]
        state.cursor.fill_(len(slots) % self.shard_size)
        state.clock.copy_(saved.read("clock").max())
        rows = {name: torch.zeros(self.shard_size, *saved.shape(name)[1:], dtype=saved.dtype(name)) for name in beside}
        rows["prototypes"] = state.prototypes
        places = torch.full((total,), -1).index_copy_(0, slots, torch.arange(len(slots)))  # of every saved row
        start = 0
        for into in places.split(AT_A_TIME // embedding_dim + 1):
            taken = into >= 0
            for name, own in rows.items():
                own[into[taken]] = saved.read(name, start, len(into))[taken]
            start += len(into)
        return state._asdict() | rows

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        value = state_dict.get(prefix + "prototypes")
        if isinstance(value, Tensor):
            self._rescale_rows_from(value.dtype)
            if self.slots_in_use < self.shard_size and not self._fits():
                self._capacity_in_use = self.capacity
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
            self._refuse_others_identities("memory.", self.identities)
            self._note_identities()

    def owned_by_rank(self) -> Iterator[str]:
        """Return the names of the five tensors."""
        yield from MemoryState._fields

    def _meet_ranks(self) -> None:
        """At the first batch: say what a memory without a process group means where there are other processes."""
        if not torch.compiler.is_compiling():
            self._met_ranks = True
            if self.ranks.alone:
                warn_of_own_memory()

    def _refuse_others_identities(self, of: str, identities: Tensor) -> None:
        """Raise if an identity stands here that another rank owns; reads values."""
        if self.ranks.alone:
            return
        owner = torch.where(identities >= 0, owners(identities, self.ranks.size), self.ranks.rank)
        if bool((owner != self.ranks.rank).any()):
            at = int((owner != self.ranks.rank).int().argmax())
            raise ValueError(
                f"{of}identities must be those that {self.ranks!r} owns, got {int(identities[at])} at index {at}, "
                f"which rank {int(owner[at])} owns: is this the shard of another rank, or of another number of ranks? "
                "What protomem_kernels.distributed.save has saved, load gives to any number of ranks"
            )

    def _refuse_more_than_fit(self, labels: Tensor) -> None:
        """Raise on every rank alike if there are more identities of one owner than it has slots."""
        if self.ranks.alone or labels.shape[0] <= self.slots_in_use:  # values are read back only where it may happen
            return
        most = owners(labels[labels >= 0].unique(), self.ranks.size).bincount(minlength=self.ranks.size)
        if int(most.max()) > self.slots_in_use:
            raise ValueError(
                f"labels must hold at most {self.slots_in_use} identities of one owner, the slots of its shard "
                f"(capacity {self.capacity_in_use} over {self.ranks.size} ranks), got {int(most.max())} that rank "
                f"{int(most.argmax())} owns"
            )

    def settings(self) -> dict[str, object]:
        """Return what has to be alike on all ranks, by name."""
        return {
            "capacity": self.capacity,
            "capacity_in_use": self.capacity_in_use,
            "embedding_dim": self.embedding_dim,
            "the memory's dtype": self.prototypes.dtype,
            "refresh_ratio": self.refresh_ratio,
            "policy": self.policy,
        }

    def _shared(self, embeddings: Tensor, labels: Tensor, weights: Tensor | None) -> Batch:
        """Check a batch and bring it together with the other ranks'."""
        if self.ranks.alone:
            return Batch(embeddings, self.check(embeddings, labels, weights), weights, ONE_RANK)
        labels, sizes = self._agree(
            self.identities.device,
            lambda: self.check(embeddings, labels, weights),
            len,
            lambda _: {"the call": "update", **self.settings(), **batch_options(embeddings, weights)},
        )
        rows = SharedRows(self.ranks, sizes)
        return gather_batch(rows, widened(embeddings), labels, weights, wire=embeddings.dtype, factor=1.0)

    def _shared_labels(self, labels: Tensor, call: str, k: int | None = None) -> tuple[Tensor, Rows]:
        """Check labels (B,), and ``k``, and return them (N,) with the other ranks'."""

        def check() -> Tensor:
            self._validate_foreign_state()
            if k is not None:
                check_int("k", k, at_least=1)
            return as_labels("labels", labels, "(B,)", self.identities)

        if self.ranks.alone:
            return check(), ONE_RANK
        checked, sizes = self._agree(
            self.identities.device,
            lambda: _on_device(check(), self.identities),
            len,
            lambda _: {"the call": call, **self.settings(), "k": k},
        )
        rows = SharedRows(self.ranks, sizes)
        return rows.gather(checked.long()), rows

    def _told_by_owners(self, slots: Tensor, rows: Rows) -> Tensor:
        """Return this rank's samples' slots (B,) through all shards, of each shard's slots (N,); -1 is none."""
        if self.ranks.alone:
            return slots
        first = self.ranks.rank * self.shard_size
        return rows.own(self.ranks.sum_(torch.where(slots >= 0, first + slots + 1, 0)) - 1)

    def _queries_of_owners(self, known: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Return which of N identities any rank knows, and their prototypes (N, D), of what each rank knows."""
        mine = known[:, None].to(accumulation_dtype(queries.dtype))
        told = self.ranks.sum_(torch.cat([mine, mine * queries], dim=1))
        return told[:, 0] > 0, told[:, 1:]

    def __getstate__(self) -> dict[str, Any]:
        """Have copies and pickles validate their state once: a copy may be written by what averages weights."""
        return self.__dict__ | {"_known": None}


def _on_device(labels: Tensor, identities: Tensor) -> Tensor:
    check_device("labels", labels, "the memory", identities)
    return labels


def sample_slots(slots: Tensor, index: Tensor) -> Tensor:
    """Return each sample's slot (B,) from its identity's (P,) and the row of its identity (B,); -1 is none."""
    padded = torch.cat([slots, slots.new_full((1,), -1)])
    return padded[torch.where(index < 0, slots.shape[0], index)]
