"""What nobody could recognise, for estimators that weigh an image by how little it looks like that."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from protomem_kernels.data.degradations import degrade
from protomem_kernels.quality import RecognizabilityQuality
from protomem_kernels.training.augmentation import standardise


@torch.no_grad()
def show_unrecognizable(loss: nn.Module, encoder: nn.Module, images: Tensor, generator: torch.Generator) -> None:
    """Feed every ``RecognizabilityQuality`` in ``loss`` with a batch of images that are damaged beyond recognition.

    Nothing is done where there is none. The encoder runs in ``eval()`` mode, so that no statistic of its own sees them.

    Args:
        loss: the head.
        encoder: maps standardised (B, C, H, W) images to (B, D).
        images: (B, C, H, W) float32 in [0, 1], as they are in the data.
        generator: of the damage.

    """
    estimators = [module for module in loss.modules() if isinstance(module, RecognizabilityQuality)]
    if estimators:
        encoder.eval()
        embeddings = encoder(standardise(degrade(images, 1.0, generator=generator))).float()
        for estimator in estimators:
            estimator.update_unrecognizable(embeddings)
