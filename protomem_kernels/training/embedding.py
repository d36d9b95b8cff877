"""Embeddings of images for verification: the mean over ten views of an image, because a face is never quite centred."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protomem_kernels.training.augmentation import standardise


@torch.no_grad()
def embed(encoder: nn.Module, batches: Iterable[Tensor], device: torch.device) -> Tensor:
    """Return (N, D) float32 embeddings on the CPU: the mean of the unit embeddings of each image's views.

    Args:
        encoder: maps standardised (B, C, H, W) images to (B, D); put into ``eval()`` mode.
        batches: (B, C, H, W) float32 images in [0, 1].
        device: where the encoder is.

    """
    encoder.eval()
    rows = []
    for images in batches:
        embeddings = [F.normalize(encoder(standardise(view)).float()) for view in views(images.to(device))]
        rows.append(torch.stack(embeddings).mean(0).cpu())
    return torch.cat(rows)


def views(images: Tensor) -> list[Tensor]:
    """Return the ten views of (B, C, H, W) images, each of that shape.

    As they are, and moved by a twenty-fourth of a side (at least one pixel) to each of the four sides, borders
    repeated; and the mirror image of all that.
    """
    H, W = images.shape[2:]
    down, right = max(1, round(H / 24)), max(1, round(W / 24))
    padded = F.pad(images, (right, right, down, down), mode="replicate")
    corners = ((down, right), (0, right), (2 * down, right), (down, 0), (down, 2 * right))
    moved = [padded[:, :, top : top + H, left : left + W] for top, left in corners]
    return moved + [view.flip(3) for view in moved]


class VerifiedEncoder(nn.Module):
    """An encoder with all that its run verified it with: pixels in, unit embeddings out, one pass for all views.

    Args:
        encoder: maps standardised (B, C, H, W) images to (B, D).
        all_views: the mean over the ten views, as ``embed`` has it, whose thresholds a run measures; False: the image
            as it is alone, at a tenth of the cost.

    """

    def __init__(self, encoder: nn.Module, all_views: bool = True) -> None:
        super().__init__()
        self.encoder, self.all_views = encoder, all_views

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, D) float32 embeddings of length 1 for (B, C, H, W) float32 images in [0, 1]."""
        seen = views(images) if self.all_views else [images]
        rows = F.normalize(self.encoder(standardise(torch.cat(seen))).float())
        return F.normalize(rows.view(len(seen), images.shape[0], rows.shape[1]).mean(0))
