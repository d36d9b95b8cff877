"""The prototype-memory loss that a configuration describes."""

from __future__ import annotations

from protomem_kernels.losses import PrototypeMemoryLoss
from protomem_kernels.margins import Margin
from protomem_kernels.training import parts
from protomem_kernels.training.config import TrainConfig
from protomem_kernels.training.errors import RunError

MOST_SLOTS = 100_000  # of a memory whose capacity the configuration leaves open


def build_loss(config: TrainConfig, identities: int) -> PrototypeMemoryLoss:
    """Return the loss, its memory still empty.

    Args:
        config: the run.
        identities: how many there are to train on; the capacity where the configuration leaves it open.

    """
    capacity = config.capacity or min(identities, MOST_SLOTS)
    if capacity < min(identities, config.identities_per_batch):
        raise RunError(
            f"capacity must be at least identities_per_batch ({config.identities_per_batch}), got {capacity}"
        )
    margin, mining, quality = (
        parts.build(kind, getattr(config, kind), embedding_dim=config.embedding_dim)
        for kind in ("margin", "mining", "quality")
    )
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
    )
