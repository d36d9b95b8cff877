"""Prototype Memory in Lightning, on any number of processes.

    python examples/lightning_loop.py [processes] [folder]

Shows: the head in the module. With several processes it is made where the process group is there already
(``configure_model``), and told to DistributedDataParallel, into which Lightning puts the module. A callback logs how
the memory is. The images are random vectors of twelve identities.
Needs: ``pip install protomem-kernels lightning``.
Takes: 10 seconds on two cores (14 of CPU time with two processes), nearly all of them imports.
Prints: the loss from 0.60 to 0.12 on each rank, and what the callback logged: 12 identities, refreshes that
move rows by 0.0004 ...
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import protomem_kernels as pmk
from protomem_kernels.compat.lightning import health_callback
from protomem_kernels.data.sampling import IdentityBatchSampler

IDENTITIES, DIM = 12, 8


class Faces(pl.LightningModule):
    """A linear encoder and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(16, DIM)
        self.loss_fn: pmk.PrototypeMemoryLoss | None = None
        self.losses: list[float] = []

    def configure_model(self) -> None:
        """Make the head, once."""
        if self.loss_fn is None:
            group = dist.group.WORLD if dist.is_initialized() else None
            self.loss_fn = pmk.PrototypeMemoryLoss(DIM, 40, scale=16.0, process_group=group)
            pmk.distributed.prepare_ddp(self)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the loss of a batch."""
        assert self.loss_fn is not None
        images, labels = batch
        loss = self.loss_fn(self.encoder(images), labels)
        assert isinstance(loss, Tensor)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        """Return SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.3)


def loader() -> DataLoader[Any]:
    """Return batches of four identities; the sampler knows the processes by itself."""
    torch.manual_seed(1)
    labels = torch.arange(IDENTITIES).repeat_interleave(8)
    images = torch.randn(IDENTITIES, 16)[labels] + 0.2 * torch.randn(len(labels), 16)
    sampler = IdentityBatchSampler(labels, identities_per_batch=4, images_per_identity=2)
    return DataLoader(TensorDataset(images, labels), batch_sampler=sampler)


def train(processes: int, folder: Path) -> tuple[pl.Trainer, Faces]:
    """Train for some epochs and return the trainer and the module."""
    torch.manual_seed(0)
    module = Faces()
    trainer = pl.Trainer(
        accelerator="cpu",
        strategy="ddp" if processes > 1 else "auto",
        devices=processes,
        max_epochs=6,
        use_distributed_sampler=False,  # ours is one
        callbacks=[health_callback(every=2)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
    )
    trainer.fit(module, loader())
    return trainer, module


if __name__ == "__main__":
    given = dict(enumerate(sys.argv))
    trainer, module = train(int(given.get(1, 1)), Path(given.get(2, "runs/lightning")))
    figures = {name: float(value) for name, value in trainer.logged_metrics.items()}
    print(f"\nrank {trainer.global_rank}: {module.losses[0]:.4f} to {module.losses[-1]:.4f}, {figures}", flush=True)
