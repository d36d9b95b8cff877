"""Training heads: ``PrototypeMemoryLoss``, ``MarginSoftmaxLoss`` and ``DSoftmaxLoss``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from protomem_kernels._checks import check_batch, check_choice, check_device, check_int, check_number
from protomem_kernels._torch import without_autocast
from protomem_kernels.backends.choice import launches_are_dear
from protomem_kernels.distributed.agreement import described
from protomem_kernels.distributed.batch import Batch, largest, overflow_shared
from protomem_kernels.distributed.ranks import ranks_of
from protomem_kernels.distributed.resharding import KeptInShards, Shard
from protomem_kernels.head import Head
from protomem_kernels.health import Health, Watched, health_of, refresh_drift
from protomem_kernels.identities import find_slots
from protomem_kernels.margins import AnyMargin, ArcFace, DSoftmax, Margin, as_margin
from protomem_kernels.memory import PrototypeMemory, sample_slots
from protomem_kernels.mining import MiningRule
from protomem_kernels.objective import REDUCTIONS, Bank, Banks, check_objective, loss_over_banks, margin_softmax_loss
from protomem_kernels.ops import hardest_negatives, negative_logsumexp, prepare_samples, reduce_losses
from protomem_kernels.ops.register import values_can_be_read
from protomem_kernels.optimizers import clear_rows
from protomem_kernels.quality import QualityEstimator
from protomem_kernels.rows import normalize_rows_, refreshed_rows
from protomem_kernels.types import AggregatedPrototypes, MarginSoftmaxStats, MemoryState

PROTOTYPE_GRADIENTS = ("none", "fresh", "memory")


class PrototypeMemoryStats(NamedTuple):
    """What one step of ``PrototypeMemoryLoss`` saw, for this rank's ``B`` samples; detached, nothing is read back.

    Attributes:
        target_cosine: (B,) cosine to the sample's own prototype, 0 if ignored.
        target_probability: (B,) softmax probability of the target, margin included, 0 if ignored.
        hardest_cosine: (B,) cosine to the nearest other prototype, -inf if there is none.
        hardest_identity: (B,) int64, whose it is, -1 if there is none.
        entered: () int64, identities enqueued in this step, on all ranks.
        refreshed: () int64, identities refreshed.
        left: () int64, identities dequeued.
    """

    target_cosine: Tensor
    target_probability: Tensor
    hardest_cosine: Tensor
    hardest_identity: Tensor
    entered: Tensor
    refreshed: Tensor
    left: Tensor


class PrototypeMemoryLoss(Head):
    """Margin softmax against a circular memory of prototypes: one training head, no class count anywhere.

    A step in training mode: quality weights, aggregation, enqueue or refresh, loss against the whole memory; so every
    identity of the batch has its target column. In ``eval()`` mode the memory is only read, and samples whose identity
    is not in it are ignored; where that leaves none, the mean of their losses is NaN, as a mean over nothing is in
    PyTorch (in training mode it is 0: a step without labels moves nothing). All state is in ``state_dict()``.

    Args:
        embedding_dim: D.
        capacity: M, the number of prototypes kept.
        margin: see ``protomem_kernels.margins``; ``DSoftmax`` for that loss.
        scale: s > 0.
        mining: see ``protomem_kernels.mining``.
        quality: see ``protomem_kernels.quality``; None: every image weighs the same (plain Prototype Memory).
        refresh_ratio: share of the new prototype when an identity returns, in [0, 1].
        policy: "fifo" or "lru".
        prototype_gradient: what the papers leave open.
            "none": the memory is a buffer and the loss moves the encoder through the embeddings alone.
            "fresh": rows written in this step keep their graph through refresh and aggregation; older rows are
            constants. No (M, D) gradient exists.
            "memory": rows are also a parameter that the optimiser steps; call ``attach_optimizer`` once.
        reduction: "mean" over the samples that are not ignored, "sum" or "none".
        dtype: of the memory.
        device: of the memory.
        process_group: of ``torch.distributed``: one memory over its ranks, and the loss of the batch of all ranks
            (docs/distributed.md). Each rank calls with its own part, maybe an empty one, and gets the same global mean
            or sum, or its own samples' losses. Default: this process alone; with others in ``torch.distributed`` that
            is said in a warning, and nothing is told to them.
        average_gradients: the embeddings' gradient (and the weights', where they have one) is that of the global loss
            times the number of ranks, since ``DistributedDataParallel`` averages the encoder's gradients later. False:
            without that factor; a number: that of the ranks over which the encoder is averaged, if others than these.
            Nothing to this process alone.
        equal_batches: promise that every rank's batch has the same size in each step, so that no step waits for
            numbers of the other ranks: each size is agreed on once. What one rank refuses later, the others learn from
            the timeout of the group alone.

    Shapes:
        ``forward(embeddings (B, D) floating, labels (B,) int, weights (B,) or None) -> loss``; labels may be any
        int64, negative ones are ignored; other integers, NumPy arrays, pandas Series and lists are taken for tensors of
        them. Samples whose identity got no prototype (antipodal images) are ignored; a sample that is not finite makes
        the loss non-finite, and never enters the memory.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range; over several ranks on every rank alike,
            before anything is written, also where their settings differ.
        RuntimeError: from ``load_state_dict``, values that cannot be the state of a memory or of a running statistic;
            within a backward pass, when activation checkpointing runs a step again that is not the last one; within
            ``DistributedDataParallel``, a forgotten ``distributed.prepare_ddp``; a rank that does not come.

    Under ``torch.utils.checkpoint`` a forward pass that runs again gets what the step got, and moves nothing; encoder
    and head may share one region as long as backward follows before the next step.

    Example:
        >>> loss_fn = PrototypeMemoryLoss(embedding_dim=2, capacity=8, margin=ArcFace(0.3), scale=8.0)
        >>> embeddings = torch.tensor([[1.0, 0.2], [0.1, 2.0]], requires_grad=True)
        >>> loss = loss_fn(embeddings, torch.tensor([1001, 77]))
        >>> loss.backward()
        >>> round(loss.item(), 4), len(loss_fn.memory)
        (0.0034, 2)

    Source: Smirnov et al., arXiv 2105.02103 and 2311.07734.
    """

    def __init__(
        self,
        embedding_dim: int,
        capacity: int,
        *,
        margin: AnyMargin = ArcFace(0.5),
        scale: float = 64.0,
        mining: MiningRule | None = None,
        quality: QualityEstimator | None = None,
        refresh_ratio: float = 0.5,
        policy: str = "fifo",
        prototype_gradient: str = "none",
        reduction: str = "mean",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        process_group: dist.ProcessGroup | None = None,
        average_gradients: bool | int = True,
        equal_batches: bool = False,
    ) -> None:
        super().__init__()
        check_objective(margin, scale, mining)
        if quality is not None and (not callable(quality) or isinstance(quality, type)):
            raise TypeError(f"quality must be a quality estimator or None, got {quality!r}")
        check_choice("prototype_gradient", prototype_gradient, PROTOTYPE_GRADIENTS)
        check_choice("reduction", reduction, REDUCTIONS)
        self.margin, self.scale, self.mining, self.quality = margin, float(scale), mining, quality
        self.prototype_gradient, self.reduction = prototype_gradient, reduction
        self.memory = PrototypeMemory(
            capacity,
            embedding_dim,
            refresh_ratio=refresh_ratio,
            policy=policy,
            dtype=dtype,
            device=device,
            learnable=prototype_gradient == "memory",
            process_group=process_group,
        )
        self._share(self.memory.ranks, average_gradients, equal_batches, margin, mining, quality)
        self._optimizer: torch.optim.Optimizer | None = None
        self._watch = False
        self._watched: Watched | None = None

    def extra_repr(self) -> str:
        """Return the settings that are no modules."""
        plain = {"margin": self.margin, "mining": self.mining, "quality": self.quality}
        shown = [f"{name}={value!r}" for name, value in plain.items() if not isinstance(value, nn.Module)]
        return ", ".join([*shown, f"scale={self.scale:g}", f"prototype_gradient={self.prototype_gradient!r}"])

    def attach_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimiser that steps ``memory.prototypes`` keep the memory's rules (``prototype_gradient="memory"``).

        After each of its steps the rows are scaled back to unit length, and when a new identity takes a slot, the
        optimiser's state for that slot (momentum and the like) is cleared. 8-bit optimisers in bitsandbytes' form have
        it cleared to their code of zero; other state that is not floating point is refused at the first step.

        Raises:
            ValueError: the optimiser does not hold ``memory.prototypes``, or the prototypes are no parameter.
        """
        if self.prototype_gradient != "memory":
            raise ValueError(
                f"prototype_gradient must be 'memory' to attach an optimizer, got {self.prototype_gradient!r}"
            )
        if not any(p is self.memory.prototypes for group in optimizer.param_groups for p in group["params"]):
            raise ValueError("optimizer must hold memory.prototypes: pass it loss_fn.parameters() as well")
        self._optimizer = optimizer
        optimizer.register_step_post_hook(lambda *_: normalize_rows_(self.memory.prototypes.detach()))

    def watch(self) -> None:
        """Have the next step in training mode note what ``health`` tells of a step: it takes one more pass."""
        self._watch = True

    def health(self) -> Health:
        """Return how full and how old the memory is, and what the last watched step saw (``Health``).

        Reads values back, so call it now and then; over several ranks it is collective, as ``watch`` has to be.

        Example:
            >>> loss_fn = PrototypeMemoryLoss(embedding_dim=2, capacity=4)
            >>> loss_fn.watch()
            >>> _ = loss_fn(torch.eye(2), torch.tensor([7, 8]))
            >>> health = loss_fn.health()
            >>> health.occupancy, round(health.target_cosine, 3), health.age_histogram
            (0.5, 1.0, (2,))
        """
        return health_of(self.memory, self._watched)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the optimiser out of copies and pickles: the copy's prototypes are not the ones it steps."""
        return self.__dict__ | {"_optimizer": None}

    def forward(
        self, embeddings: Tensor, labels: Tensor, weights: Tensor | None = None, *, return_stats: bool = False
    ) -> Tensor | tuple[Tensor, PrototypeMemoryStats]:
        """Return the loss of a batch; with ``return_stats`` also ``PrototypeMemoryStats``, for one more pass."""
        watching = self._watch and self.training
        batch, passed = self._gathered(embeddings, labels, weights, return_stats or watching)
        if self._takes_few_launches(batch, return_stats or watching):
            return passed(self._loss_in_few_launches(batch))
        step = self._write(batch, watching) if self.training else self._read(batch)
        targets, banks, counts, _ = step
        result = loss_over_banks(
            batch.embeddings,
            banks,
            margin=as_margin(self.margin).for_labels(batch.labels),
            scale=self.scale,
            mining=self.mining,
            reduction=self.reduction,
            return_stats=return_stats or watching,
        )
        loss, seen = result if isinstance(result, tuple) else (result, None)
        loss = passed(loss)
        if self.reduction == "mean" and not self.training:
            loss = torch.where(banks.counts.any(), loss, torch.nan)
        if seen is None:
            return loss
        stats = self._stats(batch, targets, seen, counts)
        if step.refreshed is not None:
            self._note(batch, stats, *step.refreshed)
        return (loss, stats) if return_stats else loss

    def owned_by_rank(self) -> Iterator[str]:
        """Return the names of the memory's five tensors, and with a process group of all buffers."""
        yield from (f"memory.{name}" for name in self.memory.owned_by_rank())
        yield from super().owned_by_rank()

    def _sharded_parameters(self) -> Iterator[str]:
        yield "memory.prototypes"

    def _device(self) -> torch.device:
        return self.memory.identities.device

    def _slots(self) -> int:
        return self.ranks.size * self.memory.shard_size

    def _settings(self) -> dict[str, object]:
        mine = {"quality": described(self.quality), "prototype_gradient": self.prototype_gradient}
        return super()._settings() | self.memory.settings() | mine

    def _checked(self, embeddings: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        if self.training and self.prototype_gradient == "memory" and self._optimizer is None:
            raise RuntimeError("prototype_gradient='memory' needs attach_optimizer(optimizer) before the first step")
        return self.memory.check(embeddings, labels, weights)

    def _read(self, batch: Batch) -> _Step:
        """Look the batch's identities up; nothing is written."""
        ring = self.memory.ring
        targets = find_slots(ring.identities, batch.labels)
        targets = _show_broken(targets, batch.embeddings, self.memory.owned(batch.labels))
        banks = self._banks([self._whole(ring, targets)], batch)
        return _Step(targets, banks, torch.zeros(3, dtype=torch.int64, device=targets.device), None)

    def _takes_few_launches(self, batch: Batch, return_stats: bool) -> bool:
        """Say whether a training step has nothing to it but what operators do in a few launches, and these matter."""
        plain = self.training and self.ranks.alone and self.mining is None and not return_stats
        return (
            plain
            and self.prototype_gradient != "fresh"
            and self.reduction != "none"
            and isinstance(self.margin, Margin)
            and self.margin.kernel_form() is not None
            and launches_are_dear(batch.embeddings)
        )

    def _loss_in_few_launches(self, batch: Batch) -> Tensor:
        """Return the loss of a training step: ``_write`` and ``loss_over_banks`` in a launch or two each."""
        assert isinstance(self.margin, Margin)
        form = self.margin.kernel_form()
        assert form is not None
        made = self._made(batch)
        slots, _, known, _ = self.memory.enqueue_keeping_previous(made, keep_previous=False)
        if self.prototype_gradient == "memory":
            self._clear_optimizer_state(torch.where((slots >= 0) & ~known, slots, -1))
        ring = self.memory.ring
        capacity = len(ring.prototypes)
        x, _, targets = prepare_samples(batch.embeddings, batch.labels, made.index, slots, capacity)
        bank = self._whole(ring, targets)
        cosine, n = negative_logsumexp(x, bank.prototypes, targets, scale=self.scale, occupied=bank.occupied)
        return reduce_losses(cosine, n, targets, capacity, *form, self.scale, self.reduction == "mean")

    def _made(self, batch: Batch) -> AggregatedPrototypes:
        """Return the batch's prototypes, with their graph if it is wanted."""
        if batch.weights is None and self.quality is not None:
            with without_autocast(batch.embeddings):
                batch = batch._replace(weights=self.quality(batch.embeddings, batch.labels))
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.prototype_gradient == "fresh"):
            return self.memory.aggregate_owned(batch)

    def _write(self, batch: Batch, watching: bool) -> _Step:
        """Make the batch's prototypes, write them into the memory, and return what the loss runs over."""
        made = self._made(batch)
        slots, evicted, known, previous = self.memory.enqueue_keeping_previous(
            made, keep_previous=watching or self.prototype_gradient == "fresh"
        )
        refreshed = (known & (slots >= 0), self._drift(slots, previous)) if watching else None
        targets = sample_slots(slots, made.index)
        targets = _show_broken(targets, batch.embeddings, self.memory.owned(batch.labels))
        entered = (slots >= 0) & ~known
        counts = torch.stack([entered.sum(), known.sum(), (evicted >= 0).sum()])
        if self.prototype_gradient == "fresh":
            fresh = self._banks(self._fresh_banks(made, slots, known, previous, targets), batch)
            return _Step(targets, fresh, counts, refreshed)
        if self.prototype_gradient == "memory":
            self._clear_optimizer_state(torch.where(entered, slots, -1))
        banks = self._banks([self._whole(self.memory.ring, targets)], batch)
        return _Step(targets, banks, counts, refreshed)

    @torch.no_grad()
    def _drift(self, slots: Tensor, previous: Tensor) -> Tensor:
        """Return how far each row (P,) moved that stands in these slots."""
        return refresh_drift(previous, self.memory.prototypes.index_select(0, slots.clamp(min=0)))

    @torch.no_grad()
    def _note(self, batch: Batch, stats: PrototypeMemoryStats, refreshed: Tensor, drift: Tensor) -> None:
        """Keep what a watched step saw."""
        norm = torch.linalg.vector_norm(batch.rows.own(batch.embeddings.detach()), dim=1)
        labelled = batch.rows.own(batch.labels) >= 0
        self._watched = Watched(labelled, stats.target_cosine, stats.hardest_cosine, norm, refreshed, drift)
        self._watch = False

    def _whole(self, ring: MemoryState, targets: Tensor) -> Bank:
        """Return all prototypes as the bank of a loss."""
        return Bank(overflow_shared(ring.prototypes, self.ranks), targets, ring.identities >= 0)

    def _fresh_banks(
        self, made: AggregatedPrototypes, slots: Tensor, known: Tensor, previous: Tensor, targets: Tensor
    ) -> list[Bank]:
        """Return the memory without the slots written in this step, and the rows in them with their graph."""
        old = previous.to(made.prototypes.dtype)
        fresh = refreshed_rows(old, known, made.prototypes, self.memory.refresh_ratio)
        ring = self.memory.ring
        written = _slot_mask(slots, self.memory.slots_in_use)
        return [
            Bank(ring.prototypes, torch.full_like(targets, -1), (ring.identities >= 0) & ~written),
            Bank(fresh, torch.where(targets >= 0, made.index, -1), slots >= 0),
        ]

    def _clear_optimizer_state(self, slots: Tensor) -> None:
        """Zero the optimiser's memory of the slots (P,) that new identities took; -1 is none."""
        assert self._optimizer is not None
        clear_rows(self._optimizer, self.memory.prototypes, _slot_mask(slots, self.memory.shard_size))

    @torch.no_grad()
    def _stats(self, batch: Batch, targets: Tensor, seen: MarginSoftmaxStats, counts: Tensor) -> PrototypeMemoryStats:
        nearest, slots = hardest_negatives(
            batch.embeddings.detach(), self.memory.prototypes.detach(), targets, k=1, occupied=self.memory.occupied
        )
        identity = torch.where(slots >= 0, self.memory.identities[slots.clamp(min=0)], -1)
        nearest, identity = largest(self.ranks, nearest, identity)
        nearest, identity = batch.rows.own(nearest)[:, 0], batch.rows.own(identity)[:, 0]
        counts = self.ranks.sum_(counts)
        return PrototypeMemoryStats(seen.target_cosine, seen.target_probability, nearest, identity, *counts.unbind())


class _Step(NamedTuple):
    """What the loss runs over: samples' slots (B,), banks, and how many entered, were refreshed and left (3,).

    Of a watched step also which of its prototypes (P,) refreshed a row, and how far each moved (P,).
    """

    targets: Tensor
    banks: Banks
    counts: Tensor
    refreshed: tuple[Tensor, Tensor] | None


def _slot_mask(slots: Tensor, capacity: int) -> Tensor:
    """Return (M,) bool: the slots listed in (P,); -1 is none."""
    mask = torch.zeros(capacity + 1, dtype=torch.bool, device=slots.device)
    return mask.index_fill_(0, torch.where(slots < 0, capacity, slots), True)[:capacity]


def _show_broken(targets: Tensor, embeddings: Tensor, labels: Tensor) -> Tensor:
    """Give samples with a label, no slot and a non-finite embedding the target 0, whatever stands there.

    Such an embedding keeps its identity out of the memory; ignoring it as well would hide a diverged encoder (and keep
    a gradient scaler from backing off). With a target its loss is non-finite, and only its own.
    """
    broken = (labels >= 0) & (targets < 0) & ~torch.isfinite(embeddings.detach()).all(dim=1)
    return torch.where(broken, 0, targets)


class MarginSoftmaxLoss(Head, KeptInShards):
    """Margin softmax over learnable class weights: what an ArcFace head is, with the (B, C) logits never materialised.

    Args:
        num_classes: C.
        embedding_dim: D.
        margin, scale, mining, reduction: as in ``margin_softmax_loss``.
        dtype, device: of the weights.
        process_group: of ``torch.distributed``: the classes are spread over its ranks, in order and as evenly as can
            be, and the loss is that of the batch of all ranks (docs/distributed.md); every rank calls with its own
            part. Default: this process alone.
        sample_rate: in (0, 1]: below 1 a training step runs over the classes of its batch and others drawn at random
            from PyTorch's generator, on each rank this share of its classes, and at least as many as there are samples
            in the batch of all ranks. The others' rows get a gradient of 0. In ``eval()`` mode all count.
        average_gradients, equal_batches: as in ``PrototypeMemoryLoss``.

    Parameter: ``weight`` (C, D), drawn from N(0, 0.01); its rows are scaled to unit length inside the loss. Of several
    ranks each holds ``num_classes // W`` classes, or one more, from its ``first_class`` on; their gradient is that of
    the global loss, without a factor. Ranks draw different rows from generators in the same state.

    Shapes:
        ``forward(embeddings (B, D) floating, labels (B,) int in [0, C), negative: ignored) -> loss``.

    Example:
        >>> head = MarginSoftmaxLoss(num_classes=10, embedding_dim=4)
        >>> head(torch.randn(2, 4), torch.tensor([3, 9])).shape
        torch.Size([])

    Source: Deng et al., ArcFace, arXiv 1801.07698; sampling: An et al., Partial FC, arXiv 2203.15565.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        margin: AnyMargin = ArcFace(0.5),
        scale: float = 64.0,
        mining: MiningRule | None = None,
        reduction: str = "mean",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        process_group: dist.ProcessGroup | None = None,
        sample_rate: float = 1.0,
        average_gradients: bool | int = True,
        equal_batches: bool = False,
    ) -> None:
        super().__init__()
        check_int("num_classes", num_classes, at_least=1)
        check_int("embedding_dim", embedding_dim, at_least=1)
        check_objective(margin, scale, mining)
        check_choice("reduction", reduction, REDUCTIONS)
        check_number("sample_rate", sample_rate, low=0, high=1, open_low=True)
        ranks = ranks_of(process_group)
        if num_classes < ranks.size:
            raise ValueError(
                f"num_classes must be at least {ranks.size}, the ranks of process_group, got {num_classes}"
            )
        self.margin, self.scale, self.mining, self.reduction = margin, float(scale), mining, reduction
        self.num_classes, self.sample_rate = num_classes, float(sample_rate)
        some, more = divmod(num_classes, ranks.size)
        self.first_class = some * ranks.rank + min(more, ranks.rank)
        rows = some + (ranks.rank < more)
        self.weight = nn.Parameter(torch.empty(rows, embedding_dim, dtype=dtype, device=device))
        self._share(ranks, average_gradients, equal_batches, margin, mining)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the class weights anew."""
        if self.ranks.alone or self.weight.is_meta:
            nn.init.normal_(self.weight, std=0.01)
            return
        # Equal states of the ranks' generators must not make their shards equal.
        seed = int(torch.randint(2**62, ())) + self.ranks.rank
        nn.init.normal_(self.weight, std=0.01, generator=torch.Generator(self.weight.device).manual_seed(seed))

    def extra_repr(self) -> str:
        """Return the settings for ``repr``."""
        embedding_dim = self.weight.shape[1]
        sampled = "" if self.sample_rate == 1 else f", sample_rate={self.sample_rate:g}"
        where = "" if self.ranks.alone else f", {len(self.weight)} of them on {self.ranks!r}"
        return (
            f"num_classes={self.num_classes}{where}, embedding_dim={embedding_dim}, margin={self.margin!r}, "
            f"scale={self.scale:g}{sampled}"
        )

    def forward(self, embeddings: Tensor, labels: Tensor, *, return_stats: bool = False) -> Any:
        """Return the loss of a batch; with ``return_stats`` also ``MarginSoftmaxStats``, of this rank's samples."""
        options: dict[str, Any] = {
            "margin": self.margin,
            "scale": self.scale,
            "mining": self.mining,
            "reduction": self.reduction,
            "return_stats": return_stats,
        }
        if self.ranks.alone and self.sample_rate == 1:
            return margin_softmax_loss(embeddings, self.weight, labels, normalize_prototypes=True, **options)
        batch, passed = self._gathered(embeddings, labels, None, return_stats)
        targets = batch.labels.long() - self.first_class
        targets = torch.where((batch.labels >= 0) & (targets >= 0) & (targets < len(self.weight)), targets, -1)
        weight = overflow_shared(self.weight, self.ranks)
        if self.sample_rate < 1 and self.training:
            sampled = self.sampled_classes(targets)
            weight, targets = weight.index_select(0, sampled), find_slots(sampled, targets)
        options["margin"] = as_margin(self.margin).for_labels(batch.labels)
        banks = self._banks([Bank(weight, targets, None)], batch, normalize_prototypes=True)
        result = loss_over_banks(batch.embeddings, banks, **options)
        return (passed(result[0]), result[1]) if isinstance(result, tuple) else passed(result)

    def sampled_classes(self, targets: Tensor) -> Tensor:
        """Draw the rows of ``weight`` that a step runs over: (K,) ascending, with all targets among them.

        Args:
            targets: (N,) int64 rows of ``weight`` that must be among them; -1 is none.
        """
        rows = len(self.weight)
        count = min(rows, max(round(self.sample_rate * rows), targets.shape[0], 1))
        order = torch.rand(rows + 1, device=targets.device)
        order = order.index_fill_(0, torch.where(targets < 0, rows, targets), 2.0)[:rows]
        return order.topk(count).indices.sort().values

    def shards(self) -> dict[str, Shard]:
        """Return the class weights as this rank's rows of all."""
        return {"weight": Shard(self.weight, self.first_class, self.num_classes)}

    def _sharded_parameters(self) -> Iterator[str]:
        yield "weight"

    def _device(self) -> torch.device:
        return self.weight.device

    def _slots(self) -> int:
        return self.num_classes

    def _settings(self) -> dict[str, object]:
        mine = {
            "num_classes": self.num_classes,
            "embedding_dim": self.weight.shape[1],
            "the weights' dtype": self.weight.dtype,
            "sample_rate": self.sample_rate,
        }
        return super()._settings() | mine

    def _checked(self, embeddings: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        labels = check_batch(embeddings, labels)
        if embeddings.shape[1] != self.weight.shape[1]:
            raise ValueError(
                f"embeddings must have shape (B, {self.weight.shape[1]}) to match embedding_dim, "
                f"got {tuple(embeddings.shape)}"
            )
        check_device("embeddings", embeddings, "the weights", self.weight)
        if values_can_be_read(labels) and labels.numel() and int(labels.max()) >= self.num_classes:
            raise ValueError(f"labels must be below {self.num_classes}, the number of classes, got {int(labels.max())}")
        return labels


class DSoftmaxLoss(MarginSoftmaxLoss):
    """D-Softmax over learnable class weights: softplus(s (d - c)) + softplus(n), pull and push apart.

    Args:
        num_classes: C.
        embedding_dim: D.
        d: the target cosine that counts as reached.
        scale: s > 0.
        mining, reduction, dtype, device, process_group, sample_rate, average_gradients, equal_batches: as in
            ``MarginSoftmaxLoss``.

    Against a memory instead of class weights: ``PrototypeMemoryLoss(..., margin=DSoftmax(0.9), scale=30.0)``.

    Source: He et al., Softmax Dissection, arXiv 1908.01281.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        d: float = 0.9,
        scale: float = 30.0,
        mining: MiningRule | None = None,
        reduction: str = "mean",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        process_group: dist.ProcessGroup | None = None,
        sample_rate: float = 1.0,
        average_gradients: bool | int = True,
        equal_batches: bool = False,
    ) -> None:
        super().__init__(
            num_classes,
            embedding_dim,
            margin=DSoftmax(d),
            scale=scale,
            mining=mining,
            reduction=reduction,
            dtype=dtype,
            device=device,
            process_group=process_group,
            sample_rate=sample_rate,
            average_gradients=average_gradients,
            equal_batches=equal_batches,
        )
