"""An encoder and a head on their way through a trial, one step at a time, and what a step costs."""

from __future__ import annotations

import math
import resource
import statistics
import sys
import time
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from protomem_kernels.experiments.heads import build_head
from protomem_kernels.experiments.images import Images
from protomem_kernels.experiments.trial import Trial
from protomem_kernels.training.augmentation import augment, standardise
from protomem_kernels.training.encoders import build_encoder
from protomem_kernels.training.errors import RunError
from protomem_kernels.training.steps import LONGEST_GRADIENT, rate_factor, stream
from protomem_kernels.training.unrecognizable import show_unrecognizable

WARM_UP = 5  # steps that are not timed
EMBED_BATCH = 512  # images
MIB = 2**20


class TrialBatch(NamedTuple):
    """The images of a step."""

    images: Tensor  # (B, C, H, W) float32 in [0, 1]
    labels: Tensor  # (B,) int64 in [0, identities)
    quality: Tensor  # (B,) float32 in [0, 1]


class Learner:
    """What a trial trains. All that is random is drawn from the seed and the step's number.

    Args:
        trial: with the number of identities.
        seed: of all that is random.
        channels: of the images.

    Attributes:
        encoder: on its way.
        average: the moving average of its weights, which is measured.
        head: prototypes, loss and optimisers.

    """

    def __init__(self, trial: Trial, seed: int, channels: int) -> None:
        self.trial, self.seed, self.steps = trial, seed, 0
        config = trial.train
        torch.manual_seed(stream(seed, "initialisation"))
        self.encoder = build_encoder(
            config.encoder,
            channels=channels,
            image_size=trial.image_size,
            embedding_dim=config.embedding_dim,
            width=config.width,
            dropout=config.dropout,
        )
        self.head = build_head(trial, self.encoder, torch.arange(trial.identities))
        decay = get_ema_multi_avg_fn(config.averaging)
        self.average = AveragedModel(self.encoder, multi_avg_fn=decay, use_buffers=True).eval()
        factor = partial(rate_factor, steps=config.steps)
        self._schedules = [LambdaLR(optimizer, factor) for optimizer in self.head.optimizers]
        self._spent: list[float] = []
        self._loss = math.nan

    def learn(self, batch: TrialBatch) -> None:
        """Take one step.

        Raises:
            RunError: its loss is not finite.
        """
        seen = self._augmented(batch.images)
        self.encoder.train()
        began = time.process_time()
        weights = batch.quality if self.trial.weights == "true" else None
        loss = self.head(self.encoder(seen), batch.labels, weights)
        for optimizer in self.head.optimizers:
            optimizer.zero_grad()
        loss.backward()
        self.head.before_step()
        nn.utils.clip_grad_norm_(self.encoder.parameters(), LONGEST_GRADIENT)
        for optimizer, schedule in zip(self.head.optimizers, self._schedules, strict=True):
            optimizer.step()
            schedule.step()
        self._spent.append(time.process_time() - began)
        self.average.update_parameters(self.encoder)
        self.steps += 1
        self._loss = float(loss.detach())
        if not math.isfinite(self._loss):
            raise RunError(f"the loss is {self._loss} in step {self.steps}")

    def _augmented(self, images: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(stream(self.seed, "augmentation", self.steps))
        torch.manual_seed(stream(self.seed, "step", self.steps))
        show_unrecognizable(self.head.loss, self.encoder, images, generator)
        strength = self.trial.train.augmentation
        return augment(images, generator, strength) if strength else standardise(images)

    def costs(self) -> dict[str, float]:
        """Return the last loss, the median CPU time of a step and what the head keeps."""
        return {
            "loss": self._loss,
            "ms_per_step": 1e3 * statistics.median(self._spent[WARM_UP:] or self._spent),
            "head_mib": self.head.held_bytes / MIB,
        }


@torch.no_grad()
def embed(encoder: nn.Module, images: Images) -> Tensor:
    """Return (N, D) unit embeddings of images as they are, by an encoder that is put into ``eval()`` mode."""
    encoder.eval()
    parts = torch.arange(len(images.labels)).split(EMBED_BATCH)
    return torch.cat([F.normalize(encoder(standardise(images.floats(part)))) for part in parts])


def peak_memory() -> float:
    """Return the most memory that this process has held so far, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB
