"""Random changes of a batch of face images: what a camera, a light or a pose could have done, and no more.

Every random number is drawn on the CPU from the generator that the caller passes, a few per image, so that one seed
gives one batch, on a CPU as on a GPU.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def standardise(images: Tensor) -> Tensor:
    """Return (B, C, H, W) images with mean 0 and standard deviation 1 each (an even image becomes 0)."""
    centred = images - images.mean((1, 2, 3), keepdim=True)
    return centred / (centred.square().mean((1, 2, 3), keepdim=True).sqrt() + 1e-3)


def augment(images: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Return a random variant of each image: mirrored, moved, relit, blurred, standardised, partly covered.

    Args:
        images: (B, C, H, W) float32 in [0, 1].
        generator: a CPU generator; the only source of randomness.
        strength: scales every range of change; 0 leaves nothing but the mirroring and the standardisation.

    Returns:
        (B, C, H, W) float32, standardised as ``standardise`` does.

    """
    images = warp(images, generator, strength)
    images = relight(images, generator, strength)
    images = blur(images, generator, probability=min(0.3 * strength, 1.0))
    return cover(standardise(images), generator, probability=min(0.5 * strength, 1.0))


def uniform(like: Tensor, generator: torch.Generator, limit: float, *shape: int) -> Tensor:
    """Return numbers in [-limit, limit), one per image and broadcastable to it unless ``shape`` says otherwise."""
    size = shape or (like.shape[0], 1, 1, 1)
    return ((torch.rand(size, generator=generator) * 2 - 1) * limit).to(like.device)


def warp(images: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """Mirror half of the images; rotate, scale, stretch, shear and shift all of them. Borders repeat."""
    B, _, H, W = images.shape
    angle, size, stretch, shear, down, right = (
        uniform(images, generator, limit * strength, B) for limit in (math.radians(12), 0.12, 0.06, 0.08, 0.12, 0.10)
    )
    mirror = torch.where(uniform(images, generator, 1.0, B) < 0, -1.0, 1.0)
    cos, sin, aspect = angle.cos(), angle.sin(), H / W
    rows = (
        torch.stack((mirror * cos * (size + stretch).exp(), (shear - sin) * aspect * size.exp(), right), dim=1),
        torch.stack((sin / aspect * (size - stretch).exp(), cos * (size - stretch).exp(), down), dim=1),
    )
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def relight(images: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """Change gamma, contrast and brightness, and let light fall in from one side."""
    H, W = images.shape[2:]
    gamma, contrast, brightness, from_right, from_below = (
        uniform(images, generator, limit * strength) for limit in (0.4, 0.3, 0.15, 0.15, 0.15)
    )
    images = (images.clamp(0, 1) ** gamma.exp() - 0.5) * contrast.exp() + 0.5 + brightness
    across = torch.linspace(-1, 1, W, device=images.device)
    along = torch.linspace(-1, 1, H, device=images.device)[:, None]
    return images + from_right * across + from_below * along


def blur(images: Tensor, generator: torch.Generator, probability: float) -> Tensor:
    """Blur some of the images with a 3 x 3 binomial kernel."""
    C = images.shape[1]
    line = images.new_tensor([0.25, 0.5, 0.25])
    kernel = torch.outer(line, line).expand(C, 1, 3, 3)
    blurred = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernel, groups=C)
    return torch.where(chosen(images, generator, probability), blurred, images)


def cover(images: Tensor, generator: torch.Generator, probability: float) -> Tensor:
    """Put a grey (0) rectangle of 15 to 50 % of each side over some of the images, anywhere."""
    H, W = images.shape[2:]
    half_height, half_width = (0.1625 + uniform(images, generator, 0.0875) for _ in range(2))
    top, left = (0.5 + uniform(images, generator, 0.5) for _ in range(2))
    along = (torch.arange(H, device=images.device)[:, None] + 0.5) / H
    across = (torch.arange(W, device=images.device) + 0.5) / W
    covered = ((along - top).abs() < half_height) & ((across - left).abs() < half_width)
    return images.masked_fill(covered & chosen(images, generator, probability), 0.0)


def chosen(images: Tensor, generator: torch.Generator, probability: float) -> Tensor:
    """Return a (B, 1, 1, 1) mask, true with ``probability``."""
    return (torch.rand((images.shape[0], 1, 1, 1), generator=generator) < probability).to(images.device)
