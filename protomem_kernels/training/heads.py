"""The prototype-memory loss that a configuration describes."""

from __future__ import annotations

from torch import Tensor

from protomem_kernels.distributed.owners import owners
from protomem_kernels.distributed.ranks import ALONE, Group, Ranks
from protomem_kernels.losses import PrototypeMemoryLoss
from protomem_kernels.margins import Margin
from protomem_kernels.training import parts
from protomem_kernels.training.config import TrainConfig
from protomem_kernels.training.errors import RunError

MOST_SLOTS = 100_000  # of a memory whose capacity the configuration leaves open


def build_loss(config: TrainConfig, identities: Tensor, ranks: Ranks = ALONE) -> PrototypeMemoryLoss:
    """Return the loss, its memory still empty.

    Args:
        config: the run.
        identities: (C,) int64, the labels to train on. Where the configuration leaves the capacity open, each of the
            ranks has a slot for every one that it owns, so that there are some more over several of them.
        ranks: over which the memory is spread.

    Raises:
        RunError: a part of it cannot be built, or the memory is smaller than a batch or larger than the machine's.

    """
    owned = int(owners(identities, ranks.size).bincount().max())
    needed = min(owned, config.identities_per_batch)  # at worst a batch is of one owner's identities
    capacity = config.capacity or ranks.size * max(needed, min(owned, MOST_SLOTS // ranks.size))
    if -(-capacity // ranks.size) < needed:
        batch = min(config.identities_per_batch, len(identities))
        over = "" if ranks.alone else f", {needed} in each of {ranks.size} processes"
        raise RunError(f"capacity must be at least the identities of a batch ({batch}{over}), got {capacity}")
    margin, mining, quality = (
        parts.build(kind, getattr(config, kind), embedding_dim=config.embedding_dim)
        for kind in ("margin", "mining", "quality")
    )
    try:
        return PrototypeMemoryLoss(
            config.embedding_dim,
            capacity,
            margin=margin or Margin(),
            scale=config.scale,
            mining=mining,
            quality=quality,
            refresh_ratio=config.refresh_ratio,
            policy=config.policy,
            prototype_gradient=config.prototype_gradient,
            process_group=ranks.group if isinstance(ranks, Group) else None,
        )
    except (RuntimeError, TypeError, OverflowError) as error:  # torch has no error of its own for a CPU without memory
        if not any(word in str(error).lower() for word in ("memory", "overflow", "too large")):
            raise
        raise RunError(
            f"capacity must be one that memory holds, {config.embedding_dim} numbers a slot, got {capacity}"
        ) from error
