"""What stands between the encoder and the loss: a prototype memory, or class weights, all of them or a sample.

Class weights are stepped by Adam, row by row: a row that a step did not use keeps its weights and its moments, as in
Partial FC, whose optimiser knows the sampled rows alone. Rows that every step uses get plain Adam.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from protomem_kernels import MarginSoftmaxLoss
from protomem_kernels.data.sampling import DoppelgangerBatchSampler, IdentityBatchSampler
from protomem_kernels.experiments.trial import Trial
from protomem_kernels.losses import PrototypeMemoryLoss
from protomem_kernels.margins import Margin
from protomem_kernels.training import parts
from protomem_kernels.training.errors import RunError
from protomem_kernels.training.heads import build_loss
from protomem_kernels.training.steps import BETAS, parameter_groups

LOOK_UP_EVERY = 50  # steps between two look-ups of look-alikes: a trial is about one epoch


class TrialHead:
    """A loss with prototypes, and the optimisers of a trial.

    Attributes:
        loss: takes embeddings and labels in [0, identities).
        optimizers: the encoder's first.
    """

    loss: nn.Module

    def __init__(self, trial: Trial, encoder: nn.Module, loss: nn.Module, dense: nn.Module) -> None:
        config = trial.train
        self.loss = loss
        groups = parameter_groups(encoder, dense, config)
        self.optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=config.learning_rate, betas=BETAS)]

    def __call__(self, embeddings: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        """Return the loss of a batch."""
        raise NotImplementedError

    def before_step(self) -> None:
        """Prepare the gradients for the optimisers."""

    def prototypes(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the stored prototypes of some labels, (n, D), and which labels have one, (n,) bool."""
        raise NotImplementedError

    def sampler(self, trial: Trial, labels: Tensor, seed: int) -> IdentityBatchSampler:
        """Return the batches."""
        if trial.sampler == "doppelgangers":
            raise RunError(f"sampler doppelgangers needs the head memory, got {trial.head}")
        return IdentityBatchSampler(
            labels, trial.train.identities_per_batch, trial.train.images_per_identity, seed=seed
        )

    @property
    def held_bytes(self) -> int:
        """Bytes that the head keeps: its prototypes, and what the optimisers keep for them."""
        held = [*self.loss.parameters(), *self.loss.buffers()]
        kept = [
            value
            for optimizer in self.optimizers
            for parameter in self.loss.parameters()
            for value in optimizer.state.get(parameter, {}).values()
            if isinstance(value, Tensor)
        ]
        return sum(tensor.numel() * tensor.element_size() for tensor in [*held, *kept])


class MemoryHead(TrialHead):
    """A prototype memory of ``trial.slots`` slots."""

    loss: PrototypeMemoryLoss

    def __init__(self, trial: Trial, encoder: nn.Module, identities: Tensor) -> None:
        loss = build_loss(trial.train.model_copy(update={"capacity": trial.slots}), identities)
        super().__init__(trial, encoder, loss, loss)
        if trial.train.prototype_gradient == "memory":
            loss.attach_optimizer(self.optimizers[0])

    def __call__(self, embeddings: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        """Return the loss; the memory moves on."""
        loss: Tensor = self.loss(embeddings, labels, weights)
        return loss

    def prototypes(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of the memory."""
        slots = self.loss.memory.lookup(labels)
        return self.loss.memory.prototypes.detach()[slots.clamp(min=0)], slots >= 0

    def sampler(self, trial: Trial, labels: Tensor, seed: int) -> IdentityBatchSampler:
        """Return the batches; those of look-alikes ask the memory who they are."""
        if trial.sampler == "random":
            return super().sampler(trial, labels, seed)
        each = trial.train.identities_per_batch, trial.train.images_per_identity
        return DoppelgangerBatchSampler(labels, self.loss.memory, *each, refresh_every=LOOK_UP_EVERY, seed=seed)


class ClassWeights(TrialHead):
    """A class weight for every identity. A step uses all, or ``trial.slots``: those of its batch and others."""

    loss: MarginSoftmaxLoss

    def __init__(self, trial: Trial, encoder: nn.Module, identities: Tensor) -> None:
        config = trial.train
        for option, unused in (("quality", "none"), ("weights", "none"), ("prototype_gradient", "none")):
            chosen = getattr(trial if option == "weights" else config, option)
            if chosen != unused:
                raise RunError(f"{option} {chosen} needs the head memory, got {trial.head}")
        margin, mining = (
            parts.build(kind, getattr(config, kind), embedding_dim=config.embedding_dim)
            for kind in ("margin", "mining")
        )
        loss = MarginSoftmaxLoss(
            len(identities),
            config.embedding_dim,
            margin=margin or Margin(),
            scale=config.scale,
            mining=mining,
            sample_rate=1.0 if trial.head == "full" else trial.slots / len(identities),
        )
        super().__init__(trial, encoder, loss, nn.Identity())
        self.optimizers.append(torch.optim.SparseAdam([loss.weight], lr=trial.head_learning_rate, betas=BETAS))

    def __call__(self, embeddings: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        """Return the loss; weights are no business of class weights."""
        loss: Tensor = self.loss(embeddings, labels)
        return loss

    def before_step(self) -> None:
        """Leave the rows that the step used."""
        gradient = self.loss.weight.grad
        assert gradient is not None
        rows = gradient.any(dim=1).nonzero()
        self.loss.weight.grad = torch.sparse_coo_tensor(
            rows.T, gradient[rows[:, 0]], gradient.shape, is_coalesced=True, check_invariants=False
        )

    def prototypes(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the class weights."""
        return self.loss.weight.detach()[labels], torch.ones_like(labels, dtype=torch.bool)


def build_head(trial: Trial, encoder: nn.Module, identities: Tensor) -> TrialHead:
    """Return the head of a trial on identities 0 to C - 1."""
    kinds: dict[str, Any] = {"memory": MemoryHead, "full": ClassWeights, "sampled": ClassWeights}
    head: TrialHead = kinds[trial.head](trial, encoder, identities)
    return head
