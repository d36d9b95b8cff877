"""Batch samplers that walk a labelled data set identity by identity.

A prototype is the mean of an identity's images in the batch, so a batch has to bring several images of each of its
identities. Both samplers here work in the same two steps:

1. **Grouping** (:func:`_deal_groups`, vectorised). Each identity's shuffled images are cut into groups of
   ``images_per_identity``; the last, short group is topped up with other images of the same identity.
2. **Scheduling** (:func:`_schedule`, linear in the number of groups). The groups are handed out, each exactly once, to
   batches of equal size (they differ by at most one group). An identity stands twice in a batch only where it has more
   groups than there are batches.

:class:`IdentityBatchSampler` hands the groups out at random. :class:`DoppelgangerBatchSampler` hands them out so that
look-alikes meet in one batch.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Sampler

from protomem_kernels._checks import tensor_of, way_to_one_dimension
from protomem_kernels._warnings import warn_caller
from protomem_kernels.data.sharing import Sharing, shared_out_by_caller

__all__ = ["DoppelgangerBatchSampler", "DoppelgangerSource", "IdentityBatchSampler"]

Labels: TypeAlias = Any  # a tensor, an array, a Series or a list of integers

_LOOKUP_CHUNK = 4096  # identities per call to the memory: bounds the (chunk, M) work of one look-up


class DoppelgangerSource(Protocol):
    """What :class:`DoppelgangerBatchSampler` asks of a memory; :class:`~protomem_kernels.PrototypeMemory` has it."""

    def doppelgangers(self, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Nearest identities of each label: cosines (N, k) and identities (N, k) int64, -1 where there is none."""
        ...


class _Catalogue(NamedTuple):
    """The images that have an identity, seen identity by identity. C identities, n images."""

    identities: Tensor  # (C,) int64, ascending, distinct: the labels
    images: Tensor  # (n,) int64: positions in the data set
    owners: Tensor  # (n,) int64: row of `identities` that each image belongs to
    sizes: Tensor  # (C,) int64: images per identity


def _catalogue(labels: Labels) -> _Catalogue:
    labels = tensor_of("labels", labels, "(N,)").detach().cpu()
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels must be integers, got {labels.dtype}; labels.long() makes it so")
    if labels.dim() != 1:
        way = way_to_one_dimension("labels", labels.shape)
        raise ValueError(f"labels must have shape (N,), got {tuple(labels.shape)}{way}")
    # 64-bit hashes are identities all of them; beyond int64 they are known by the same bits, below zero.
    unsigned = labels.dtype == torch.uint64
    labels = labels.view(torch.int64) if unsigned else labels.long()
    images = torch.arange(len(labels)) if unsigned else torch.nonzero(labels >= 0).squeeze(1)
    if not len(images):
        raise ValueError(f"labels must hold at least one identity (a label >= 0), got none in {len(labels)} labels")
    identities, owners, sizes = torch.unique(labels[images], return_inverse=True, return_counts=True)
    return _Catalogue(identities, images, owners, sizes)


def _deal_groups(catalogue: _Catalogue, size: int, generator: torch.Generator) -> Tensor:
    """Cut every identity's shuffled images into groups: (G, size) positions, ordered by identity.

    Position p = t * size + s of group t is image p modulo n of the identity's n shuffled images. That one rule tops a
    short group up with images from the front, which are in other groups as long as n >= size, and repeats images
    evenly where n < size.
    """
    shuffle = torch.randperm(len(catalogue.images), generator=generator)
    shuffled = catalogue.images[shuffle][torch.argsort(catalogue.owners[shuffle], stable=True)]
    counts = _group_counts(catalogue, size)
    owners = torch.repeat_interleave(counts)
    positions = (_nth(counts)[:, None] * size + torch.arange(size)) % catalogue.sizes[owners, None]
    return shuffled[_starts(catalogue.sizes)[owners, None] + positions]


def _group_counts(catalogue: _Catalogue, size: int) -> Tensor:
    return (catalogue.sizes + size - 1) // size


def _starts(counts: Tensor) -> Tensor:
    """Where each run begins if run c has ``counts[c]`` items: (3, 1, 2) -> (0, 3, 4)."""
    return counts.cumsum(0) - counts


def _nth(counts: Tensor) -> Tensor:
    """The position of each item in its run: (3, 1, 2) -> (0, 1, 2, 0, 0, 1)."""
    owners = torch.repeat_interleave(counts)
    return torch.arange(len(owners)) - _starts(counts)[owners]


def _schedule(
    turns: list[int], counts: list[int], sizes: list[int], tables: Iterable[Tensor | None]
) -> Iterator[list[int]]:
    """Hand out every group to one batch; yield the batches, lists of identities (rows), one entry per group.

    ``turns`` is the wanted order: identity c stands in it ``counts[c]`` times. ``sizes`` are the batch sizes, falling,
    differing by at most one, with the same sum. ``tables`` has the neighbours for each batch, or None: (C, K), -1 for
    none, which are pulled in behind each identity. The next one is asked for when the next batch is.

    An identity whose turn comes while it is already in the batch waits for the next one. One that has as many groups
    left as there are batches left goes in at once: with that, distinct identities are always found as long as no
    identity has more groups than there are batches (c identities with R groups each fill at most c <= T / R of the
    T groups that R batches still take). Cost: O(G log C + G K), whatever the distribution of the counts.
    """
    left = list(counts)
    early = [0] * len(counts)  # groups handed out before their turn: these turns are skipped when they come
    waiting: dict[int, int] = {}  # turns that have come and are not served yet; at most about two batches' worth
    fullest = [(-count, c) for c, count in enumerate(counts)]  # heap; entries may be stale, never too small
    heapq.heapify(fullest)
    coming = iter(turns)
    batch: list[int] = []
    present: set[int] = set()

    def take(c: int) -> None:
        left[c] -= 1
        batch.append(c)
        present.add(c)
        if c not in waiting:
            early[c] += 1
        elif waiting[c] == 1:
            del waiting[c]
        else:
            waiting[c] -= 1

    def next_in_turn() -> int:
        for c in postponed:
            if c not in present:
                return c
        for c in coming:
            if early[c]:
                early[c] -= 1
                continue
            waiting[c] = waiting.get(c, 0) + 1
            if c not in present:
                return c
        # Only identities of this batch are left: they have more groups than there are batches.
        return max(waiting, key=waiting.__getitem__)

    for batches_left, size, neighbours in zip(range(len(sizes), 0, -1), sizes, tables, strict=False):
        batch, present = [], set()
        due = []
        while fullest and -fullest[0][0] >= batches_left:
            due.append(heapq.heappop(fullest)[1])
        for c in due:
            for _ in range(left[c] // batches_left):
                take(c)
            if left[c]:
                heapq.heappush(fullest, (-left[c], c))

        postponed = iter([c for c in waiting if c not in present])
        anchors = list(present)
        while True:
            if neighbours is not None:
                for c in (c for anchor in anchors for c in neighbours[anchor].tolist()):
                    if len(batch) < size and c >= 0 and left[c] and c not in present:
                        take(c)
            if len(batch) == size:
                break
            anchors = [next_in_turn()]
            take(anchors[0])
        yield batch


class IdentityBatchSampler(Sampler[list[int]]):
    """Batches of ``identities_per_batch`` identities with ``images_per_identity`` images each, for ``batch_sampler=``.

    An epoch walks every image at least once. Identities whose number of images is no multiple of
    ``images_per_identity`` are topped up with other images of the same identity, and an image is repeated inside a
    group only where the identity has fewer images than ``images_per_identity``. The identities of a batch are distinct
    wherever that is possible. Batches have the same size up to one group (so there is no tiny last batch), never more
    than ``identities_per_batch`` groups. The batches of an epoch are a function of ``(seed, epoch)`` alone.

    Lightning and accelerate find ``set_epoch`` by themselves (through ``sampler``). Each image goes to one rank: a
    loader that accelerate prepares is shared out by accelerate, any other by the sampler. Lightning wants to be told by
    ``Trainer(use_distributed_sampler=False)`` that the sampler does it, and raises otherwise.

    Args:
        labels: (N,) integers, the identity of each image, as a tensor, array, pandas Series (by position) or list;
            negative means "none", and that image is left out. uint64 (hashes of names) have no such.
        identities_per_batch: groups in a batch, at least 1. More than there are identities counts as that many, after a
            warning.
        images_per_identity: images in a group, at least 1.
        seed: seed of the shuffles.
        num_replicas: ranks that share an epoch; default: the world size of ``torch.distributed``, 1 without it, asked
            for at the start of each epoch.
            Every rank gets the same number of batches, and no group goes to two ranks (unless there are fewer groups
            than ranks: then groups are repeated).
        rank: this rank, from 0; default: the rank in ``torch.distributed``, 0 without it.
        drop_last: leave out the groups that do not fill a batch on every rank, other ones each epoch. All batches then
            have exactly ``identities_per_batch`` groups, and there may be no batch at all.

    Raises:
        TypeError: ``labels`` are not integers.
        ValueError: ``labels`` are not one-dimensional or hold no identity; a count is below 1; ``rank`` is not below
            ``num_replicas``; in iteration: accelerate shares out among another number of processes.

    Example:
        >>> labels = [7, 7, 7, 7, 3, 3, -1]
        >>> sampler = IdentityBatchSampler(labels, identities_per_batch=2, images_per_identity=2)
        >>> len(sampler)
        2
        >>> sampler.set_epoch(1)
        >>> sorted(set(index for batch in sampler for index in batch))
        [0, 1, 2, 3, 4, 5]

    """

    _stretch: int | None = None  # batches of a rank that are planned, and shuffled, together; None: an epoch's

    def __init__(
        self,
        labels: Labels,
        identities_per_batch: int,
        images_per_identity: int,
        *,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
        drop_last: bool = False,
    ) -> None:
        _at_least(1, identities_per_batch=identities_per_batch, images_per_identity=images_per_identity)
        self._num_replicas, self._rank = num_replicas, rank
        _at_least(1, num_replicas=self.num_replicas)
        if not 0 <= self.rank < self.num_replicas:
            raise ValueError(
                f"rank must be in [0, {self.num_replicas}) for num_replicas = {self.num_replicas}, got {self.rank}"
            )

        self._catalogue = _catalogue(labels)
        self._counts = _group_counts(self._catalogue, images_per_identity)
        if identities_per_batch > len(self._counts):
            warn_caller(
                f"identities_per_batch is {identities_per_batch}, and there are {len(self._counts)} identities: "
                "a batch holds no more of them than that"
            )
        self.identities_per_batch = min(identities_per_batch, len(self._counts))
        self.images_per_identity = images_per_identity
        self.seed, self.epoch = seed, 0
        self.drop_last = drop_last
        self._groups = int(self._counts.sum())

    @property
    def num_replicas(self) -> int:
        """Ranks that share an epoch."""
        if self._num_replicas is not None:
            return self._num_replicas
        return dist.get_world_size() if _distributed() else 1

    @property
    def rank(self) -> int:
        """This rank."""
        if self._rank is not None:
            return self._rank
        return dist.get_rank() if _distributed() else 0

    @property
    def sampler(self) -> Sampler[int]:
        """The positions, batch after batch, as ``torch.utils.data.BatchSampler`` has it; its ``set_epoch`` is ours."""
        return _Positions(self)

    def __len__(self) -> int:
        """Batches of one epoch on one rank; on all of them for a wrapper that shares them out."""
        sharing = shared_out_by_caller()
        replicas = self._replicas(sharing)
        return self._batches_per_rank(replicas) * (replicas if sharing else 1)

    def _replicas(self, sharing: Sharing | None) -> int:
        if sharing is None:
            return self.num_replicas
        if self._num_replicas not in (None, 1, sharing.processes):
            raise ValueError(
                f"num_replicas must be {sharing.processes}, or left out, to be shared out by accelerate among "
                f"{sharing.processes} processes, got {self._num_replicas}"
            )
        return sharing.processes

    def _batches_per_rank(self, replicas: int) -> int:
        per_round = self.identities_per_batch * replicas  # groups that fill one batch on every rank
        return self._groups // per_round if self.drop_last else -(-self._groups // per_round)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches the next iteration yields; call it before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this rank's batches of the epoch: lists of positions, the images of one identity side by side.

        A wrapper that shares them out gets those of all ranks, in turn.
        """
        return self._walk(shared_out_by_caller())

    def _walk(self, sharing: Sharing | None) -> Iterator[list[int]]:
        replicas = self._replicas(sharing)
        batches = self._batches_per_rank(replicas) * replicas
        if not batches:
            return
        generator = torch.Generator().manual_seed(_mix(self.seed, self.epoch))
        groups = _deal_groups(self._catalogue, self.images_per_identity, generator)
        turns = self._turns(batches, generator)
        counts = torch.bincount(turns, minlength=len(self._counts))
        share, rest = divmod(len(turns), batches)
        sizes = [share + 1] * rest + [share] * (batches - rest)
        in_step = replicas if sharing is None or sharing.everywhere else 1
        stretch = batches if self._stretch is None else self._stretch * replicas
        looked_up = (itertools.repeat(self._neighbours(in_step), stretch) for _ in itertools.count())
        tables = itertools.chain.from_iterable(looked_up)
        schedule = _schedule(turns.tolist(), counts.tolist(), sizes, tables)
        brought = torch.zeros_like(self._counts)
        while batch_owners := list(itertools.islice(schedule, stretch)):
            # The t-th time that an identity stands in the schedule, it brings its t-th group.
            owners = torch.tensor([c for batch in batch_owners for c in batch])
            here = torch.bincount(owners, minlength=len(self._counts))
            nth = torch.empty_like(owners)
            nth[torch.argsort(owners, stable=True)] = _nth(here)
            dealt = groups[_starts(self._counts)[owners] + (brought[owners] + nth) % self._counts[owners]]
            brought += here
            rows = torch.tensor_split(dealt, torch.tensor([len(batch) for batch in batch_owners]).cumsum(0)[:-1])
            order = torch.randperm(len(rows), generator=generator)
            for index in (order[self.rank :: replicas] if sharing is None else order).tolist():
                yield rows[index].flatten().tolist()

    def _turns(self, batches: int, generator: torch.Generator) -> Tensor:
        """The identities (rows) in the order in which their groups are to be handed out: (groups of this epoch,)."""
        owners = torch.repeat_interleave(self._counts)
        order = torch.randperm(len(owners), generator=generator)
        if self.drop_last:  # leave out first what an identity has beyond one group per batch, then at random
            order = order[torch.argsort((_nth(self._counts)[order] >= batches).int(), stable=True)]
            order = order[: batches * self.identities_per_batch]
        elif len(order) < batches:  # fewer groups than ranks
            order = order.repeat(-(-batches // len(order)))[:batches]
        return owners[order]

    def _neighbours(self, in_step: int) -> Tensor | None:
        """Neighbours of each identity (rows) for the next stretch, for so many ranks that begin it together."""
        return None


class _Positions(Sampler[int]):
    """What is in the batches of a batch sampler, one position after another."""

    def __init__(self, batches: IdentityBatchSampler) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[int]:
        """Yield the positions."""
        for batch in self._batches:
            yield from batch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the batches."""
        self._batches.set_epoch(epoch)


class DoppelgangerBatchSampler(IdentityBatchSampler):
    """The batches of :class:`IdentityBatchSampler`, filled with identities that look alike (hard examples).

    A batch takes an identity at random (the anchor), then its nearest neighbours in the memory that have images left in
    this epoch, then the next anchor, until it is full. Coverage, group sizes, distinctness and the shares of the ranks
    are those of :class:`IdentityBatchSampler`. An identity that the memory does not hold has no neighbours, so with an
    empty memory the batches are random. The batches are a function of ``(seed, epoch)`` and of the memory.

    The neighbours are looked up anew at the start of each epoch and every ``refresh_every`` batches:
    on a large data set the first epoch is most of a training, and begins with an empty memory. Where ``num_replicas``
    is the world size of ``torch.distributed``, the list of rank 0 holds for all ranks, so that their shares stay
    disjoint whatever the rounding on each of them; all ranks have to draw their batches in step.

    Source: Smirnov et al., "Doppelganger Mining for Face Representation Learning" (ICCV Workshops 2017), which keeps a
    list of the most similar identity of each; here the prototypes of the memory say who is similar.

    Args:
        labels: as in :class:`IdentityBatchSampler`.
        memory: a :class:`~protomem_kernels.PrototypeMemory`, or whatever has its ``doppelgangers(labels, k)``.
        identities_per_batch: as in :class:`IdentityBatchSampler`.
        images_per_identity: as in :class:`IdentityBatchSampler`.
        neighbours: how many nearest neighbours of each anchor to look up, at least 1. 1 makes pairs of look-alikes,
            more makes a batch harder and less varied.
        refresh_every: batches of a rank between two look-ups, at least 1. One costs as much as all cosines of the
            memory with itself, as much as a step's loss with a batch of M samples.
        seed: as in :class:`IdentityBatchSampler`.
        num_replicas: as in :class:`IdentityBatchSampler`.
        rank: as in :class:`IdentityBatchSampler`.
        drop_last: as in :class:`IdentityBatchSampler`.

    Example:
        >>> class Pairs:  # 0 looks like 1, 2 looks like 3
        ...     def doppelgangers(self, labels, k):
        ...         return torch.ones(len(labels), 1), (labels ^ 1)[:, None]
        >>> labels = [0, 0, 1, 1, 2, 2, 3, 3]
        >>> sampler = DoppelgangerBatchSampler(labels, Pairs(), 2, 2, neighbours=1)
        >>> sorted(sorted(batch) for batch in sampler)
        [[0, 1, 2, 3], [4, 5, 6, 7]]

    """

    def __init__(
        self,
        labels: Labels,
        memory: DoppelgangerSource,
        identities_per_batch: int,
        images_per_identity: int,
        *,
        neighbours: int = 3,
        refresh_every: int = 1000,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
        drop_last: bool = False,
    ) -> None:
        super().__init__(
            labels,
            identities_per_batch,
            images_per_identity,
            seed=seed,
            num_replicas=num_replicas,
            rank=rank,
            drop_last=drop_last,
        )
        _at_least(1, neighbours=neighbours, refresh_every=refresh_every)
        self.memory, self._stretch = memory, refresh_every
        self.neighbours = neighbours

    def _neighbours(self, in_step: int) -> Tensor:
        known = self._catalogue.identities
        device = _device_of(self.memory)
        with torch.no_grad():
            chunks = [
                self.memory.doppelgangers(chunk.to(device), self.neighbours)[1].cpu()
                for chunk in torch.split(known, _LOOKUP_CHUNK)
            ]
        found = torch.cat(chunks)
        if found.dim() != 2 or len(found) != len(known):
            raise ValueError(
                f"memory.doppelgangers must return identities of shape ({len(known)}, k), got {tuple(found.shape)}"
            )
        # From labels to rows; what the memory holds and this data set does not is no neighbour.
        rows = torch.searchsorted(known, found).clamp(max=len(known) - 1)
        table = torch.where((found >= 0) & (known[rows] == found), rows, -1)
        if in_step > 1 and _distributed() and dist.get_world_size() == in_step:
            where = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
            table = table.to(where)
            dist.broadcast(table, src=0)
        return table.cpu()


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _device_of(memory: DoppelgangerSource) -> torch.device:
    tensors = [*memory.parameters(), *memory.buffers()] if isinstance(memory, nn.Module) else []
    return tensors[0].device if tensors else torch.device("cpu")


def _mix(seed: int, epoch: int) -> int:
    """One seed from two numbers: PyTorch's CPU generator looks at 32 bits; odd factors keep all epochs apart."""
    return (seed * 0x9E3779B1 + epoch * 0x85EBCA6B) % 2**32


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
