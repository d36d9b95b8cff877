"""Training steps: each is a function of the seed, the step's number and the state that a checkpoint holds.

Nothing random carries over from one step to the next (batches, augmentation and dropout are seeded by the step's
number), so a run that is killed and resumed from its last checkpoint computes what the undisturbed run computes, bit
for bit on the same machine with the same number of threads.
"""

from __future__ import annotations

import copy
import hashlib
import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from protomem_kernels.distributed.ranks import ALONE, Group, Ranks
from protomem_kernels.health import Health
from protomem_kernels.losses import PrototypeMemoryLoss
from protomem_kernels.training.augmentation import augment
from protomem_kernels.training.checkpoints import check_like
from protomem_kernels.training.config import TrainConfig
from protomem_kernels.training.encoders import TimmEncoder, build_encoder
from protomem_kernels.training.errors import RunError
from protomem_kernels.training.heads import build_loss
from protomem_kernels.training.precision import Precision
from protomem_kernels.training.processes import is_lost
from protomem_kernels.training.unrecognizable import show_unrecognizable

BETAS = (0.9, 0.99)  # of AdamW
LONGEST_GRADIENT = 5.0  # norm of the encoder's, which is clipped to it
HEALTH_EVERY = 50  # steps; the one that is looked at takes one more pass over the memory


class Step(NamedTuple):
    """What one step has to say."""

    number: int  # steps done, from 1
    loss: float
    learning_rate: float
    occupancy: float  # share of the memory's slots in use
    gradient_norm: float
    health: Health | None = None  # of the head, now and then


def stream(seed: int, purpose: str, step: int = 0) -> int:
    """Return a 32-bit seed of its own for each (seed, purpose, step): PyTorch's CPU generator uses no more bits."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {purpose} {step}".encode(), digest_size=4).digest(), "little")


def rate_factor(step: int, steps: int) -> float:
    """Return the share of the peak rate in a step (from 0): linear over the first twentieth, then a cosine to zero."""
    warm_up = max(1, steps // 20)
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))


def parameter_groups(encoder: nn.Module, loss: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Return what the optimiser steps: weight matrices decay, a backbone may have a rate of its own.

    Raises:
        RunError: a rate for the backbone of an encoder that has none.
    """
    backbone: set[Tensor] = set()
    if config.backbone_learning_rate is not None:
        if not isinstance(encoder, TimmEncoder):
            raise RunError(f"backbone_learning_rate is for timm models, got encoder {config.encoder!r}")
        backbone = set(encoder.backbone.parameters())
    groups = []
    for rate, inside in ((config.learning_rate, False), (config.backbone_learning_rate, True)):
        ours = [p for p in encoder.parameters() if (p in backbone) is inside]
        heads = [] if inside else [*loss.parameters()]
        groups.append(
            {"params": [p for p in ours if p.ndim > 1], "weight_decay": config.weight_decay, "lr": rate},
        )
        groups.append({"params": [p for p in ours if p.ndim <= 1] + heads, "weight_decay": 0.0, "lr": rate})
    return [group for group in groups if group["params"]]


class Training:
    """The encoder, its moving average, the loss with its memory and the optimiser, moved one step at a time."""

    def __init__(
        self, config: TrainConfig, *, channels: int, identities: Tensor, device: torch.device, ranks: Ranks = ALONE
    ) -> None:
        torch.manual_seed(stream(config.seed, "initialisation"))
        self.config, self.device, self.ranks, self.step = config, device, ranks, 0
        self.built: dict[str, Any] = {  # how, for whoever builds it again
            "name": config.encoder,
            "channels": channels,
            "image_size": list(config.image_size),
            "embedding_dim": config.embedding_dim,
            "width": config.width,
            "dropout": config.dropout,
        }
        self.encoder = build_encoder(**self.built, pretrained=config.pretrained).to(device)
        shared = self._shared(channels)
        self.forward = torch.compile(shared) if config.compile else shared
        self.loss: PrototypeMemoryLoss = build_loss(config, identities, ranks).to(device)
        decay = get_ema_multi_avg_fn(config.averaging)
        self.average = AveragedModel(self.encoder, multi_avg_fn=decay, use_buffers=True).eval()
        groups = parameter_groups(self.encoder, self.loss, config)
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=BETAS)
        self.schedule = self._schedule()
        if config.prototype_gradient == "memory":
            self.loss.attach_optimizer(self.optimizer)
        self.precision = Precision(config.precision, device)
        self.scaler = self.precision.scaler

    def _schedule(self) -> LambdaLR:
        """Return the schedule from this step on: it depends on the step's number alone."""
        return LambdaLR(self.optimizer, lambda step: rate_factor(step, self.config.steps), last_epoch=self.step - 1)

    def _shared(self, channels: int) -> nn.Module:
        """Return the encoder as the ranks train it together.

        DDP sums gradients in an order that it settles in its first step, as the graph has it. A first step that leaves
        nothing behind gives a run that goes on the same order as one that never stopped.
        """
        if isinstance(self.ranks, Group):
            before = copy.deepcopy(self.encoder.state_dict())
            where = [self.device.index] if self.device.type == "cuda" else None
            model = DistributedDataParallel(self.encoder, device_ids=where, process_group=self.ranks.group)
            model(torch.zeros(2, channels, *self.config.image_size, device=self.device)).sum().backward()
            model.zero_grad()
            self.encoder.load_state_dict(before)
            return model
        return self.encoder

    def _stream(self, purpose: str) -> int:
        """Return this rank's seed of the step; the first rank's are those of one process."""
        return stream(self.config.seed, f"{purpose} {self.ranks.rank}" if self.ranks.rank else purpose, self.step)

    def advance(self, images: Tensor, labels: Tensor) -> Step:
        """Take one step on (B, C, H, W) float32 images in [0, 1] with (B,) int64 labels, this rank's of the batch."""
        config = self.config
        torch.manual_seed(self._stream("step"))
        generator = torch.Generator().manual_seed(self._stream("augmentation"))
        rate = float(self.schedule.get_last_lr()[0])
        labels = labels.to(self.device)
        images = images.to(self.device)
        damage = torch.Generator().manual_seed(self._stream("unrecognizable"))
        show_unrecognizable(self.loss, self.encoder, images, damage)
        images = augment(images, generator, config.augmentation)
        self.encoder.train()
        with self.precision.autocast():
            embeddings = self._embeddings(images)
        looked_at = self.step % HEALTH_EVERY == 0
        if looked_at:
            self.loss.watch()
        loss = self.loss(embeddings.float(), labels)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.encoder.parameters(), LONGEST_GRADIENT)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a first step that the scaler left out
            self.schedule.step()
        self.average.update_parameters(self.encoder)
        self.step += 1
        health = self.loss.health() if looked_at else None
        return Step(self.step, loss.item(), rate, self.occupancy, norm.item(), health)

    def _embeddings(self, images: Tensor) -> Tensor:
        try:
            embeddings: Tensor = self.forward(images)
        except Exception as error:
            if not self.config.compile or is_lost(error):
                raise
            why = str(error).strip().splitlines() or [type(error).__name__]
            raise RunError(f"torch.compile cannot run the encoder ({why[0]}); leave out --compile") from error
        return embeddings

    @property
    def occupancy(self) -> float:
        """Share of the memory's slots in use, over all ranks."""
        memory = self.loss.memory
        return int(self.ranks.sum_(memory.occupied.sum())) / (self.ranks.size * memory.shard_size)

    @property
    def head_numbers(self) -> dict[str, int]:
        """The loss's parameters by name, and which ones of the optimiser's they are."""
        number = {id(p): n for n, p in enumerate(p for group in self.optimizer.param_groups for p in group["params"])}
        return {name: number[id(parameter)] for name, parameter in self.loss.named_parameters()}

    def state(self) -> dict[str, Any]:
        """Return everything that the next step depends on, for a checkpoint."""
        state = self.state_without_head()
        return state | {"loss": self.loss.state_dict(), "optimizer": self.optimizer.state_dict()}

    def state_without_head(self) -> dict[str, Any]:
        """Return all of it but the loss's, and what the optimiser keeps beside the loss's parameters."""
        optimizer = self.optimizer.state_dict()
        for number in self.head_numbers.values():
            optimizer["state"].pop(number, None)
        return {
            "step": self.step,
            "encoder": self.encoder.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what ``state`` returned.

        Raises:
            KeyError, ValueError, TypeError, RuntimeError: it is not the state of such a run.
        """
        self._restore(state, self.state(), state["optimizer"], ("encoder", "average", "loss", "scaler"))

    def restore_without_head(self, state: dict[str, Any]) -> None:
        """Continue from what ``state`` or ``state_without_head`` returned, the loss apart.

        Raises:
            KeyError, ValueError, TypeError, RuntimeError: it is not the state of such a run.
        """
        heads = self.head_numbers.values()
        kept = {number: moments for number, moments in state["optimizer"]["state"].items() if number not in heads}
        optimizer = {**state["optimizer"], "state": kept}
        self._restore(state, self.state_without_head(), optimizer, ("encoder", "average", "scaler"))

    def _restore(
        self, state: dict[str, Any], ours: dict[str, Any], optimizer: dict[str, Any], parts: tuple[str, ...]
    ) -> None:
        step = state["step"]
        if type(step) is not int or not 0 <= step <= self.config.steps:
            raise ValueError(f"step must be a whole number between 0 and {self.config.steps}, got {step!r}")
        for part in parts:
            check_like(ours[part], state[part], part)
        self._check_optimizer(ours["optimizer"], optimizer)
        for part in parts:
            getattr(self, part).load_state_dict(state[part])
        self.optimizer.load_state_dict(optimizer)
        self.step = step
        self.schedule = self._schedule()  # of an extended run it is another one

    def _check_optimizer(self, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
        """Check what AdamW itself takes as it comes: its options, and the moments of each parameter."""
        check_like(ours["param_groups"], theirs["param_groups"], "optimizer.param_groups")
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for number, moments in theirs["state"].items():
            if type(number) is not int or not 0 <= number < len(parameters):
                raise ValueError(f"optimizer.state must be of {len(parameters)} parameters, got one of {number!r}")
            like = parameters[number]
            made = {"step": torch.tensor(0.0), "exp_avg": like, "exp_avg_sq": like}
            check_like(made, moments, f"optimizer.state.{number}")
