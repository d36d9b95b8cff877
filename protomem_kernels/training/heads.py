"""The prototype-memory loss that a configuration describes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from protomem_kernels.losses import PrototypeMemoryLoss
from protomem_kernels.margins import AdaFace, ArcFace, CosFace
from protomem_kernels.mining import CurricularFace, HardestNegatives, HardSamples, MVSoftmax, NoisyNegativeFilter
from protomem_kernels.quality import CenterQuality, NormQuality
from protomem_kernels.training.config import TrainConfig
from protomem_kernels.training.errors import RunError

MOST_SLOTS = 100_000  # of a memory whose capacity the configuration leaves open

MARGINS: dict[str, Callable[[float], Any]] = {"arcface": ArcFace, "cosface": CosFace, "adaface": AdaFace}
MINING: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "mv-softmax": MVSoftmax,
    "curricular": CurricularFace,
    "hardest-negatives": HardestNegatives,
    "noisy-negatives": NoisyNegativeFilter,
    "hard-samples": HardSamples,
}
QUALITY: dict[str, Callable[[], Any]] = {"none": lambda: None, "norm": NormQuality, "center": CenterQuality}


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
    return PrototypeMemoryLoss(
        config.embedding_dim,
        capacity,
        margin=MARGINS[config.margin](config.margin_size),
        scale=config.scale,
        mining=MINING[config.mining](),
        quality=QUALITY[config.quality](),
        refresh_ratio=config.refresh_ratio,
        policy=config.policy,
        prototype_gradient=config.prototype_gradient,
    )
