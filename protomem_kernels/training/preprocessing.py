"""What a trained encoder is given: an image as its run saw it, decoded, resized and standardised."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from protomem_kernels.data.decoding import as_pixels, crop_box, decode
from protomem_kernels.training.augmentation import standardise

Source: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | Tensor

GREY = (0.299, 0.587, 0.114)  # of red, green and blue in Pillow's "L"


class Transform:
    """Makes an encoder's input of an image, exactly as training and verification of its run did.

    Args:
        mode: "L" (grey, C = 1) or "RGB" (C = 3).
        image_size: (height, width) in pixels.

    Example:
        >>> transform = Transform("RGB", (56, 46))
        >>> transform(Image.new("L", (92, 112), 7)).shape
        torch.Size([3, 56, 46])
        >>> transform(torch.rand(10, 3, 112, 92)).shape
        torch.Size([10, 3, 56, 46])

    """

    def __init__(self, mode: str, image_size: Sequence[int]) -> None:
        height, width = image_size
        if mode not in ("L", "RGB"):
            raise ValueError(f'mode must be "L" or "RGB", got {mode!r}')
        self.mode, self.image_size = mode, (height, width)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.mode!r}, {self.image_size})"

    def as_dict(self) -> dict[str, Any]:
        """Return the arguments, for a file: ``Transform(**transform.as_dict())`` is the same."""
        return {"mode": self.mode, "image_size": list(self.image_size)}

    def __call__(self, source: Source | list[Source] | tuple[Source, ...]) -> Tensor:
        """Return the float32 input of the encoder, mean 0 and standard deviation 1 over each image.

        Args:
            source: one image, or a list of them: a path, the bytes of a file, an image of Pillow's, or a (C, H, W)
                tensor, grey or colour, uint8, or floating in [0, 1]. A (B, C, H, W) tensor is B images.

        Returns:
            (C, H, W) of one image, (B, C, H, W) of several.

        Raises:
            DatasetError: a file that cannot be read.
            TypeError, ValueError: none of what ``source`` may be.

        """
        pixels = self.pixels(source)
        return standardise(pixels) if pixels.ndim == 4 else standardise(pixels[None])[0]

    def pixels(self, source: Source | list[Source] | tuple[Source, ...]) -> Tensor:
        """Return what :meth:`__call__` standardises: float32 in [0, 1], of the encoder's mode and size."""
        if isinstance(source, Tensor):
            return self._of_tensor(source)
        if isinstance(source, (str, os.PathLike, bytes)):
            return decode(source, mode=self.mode, image_size=self.image_size).float() / 255
        if isinstance(source, Image.Image):
            return as_pixels(source, mode=self.mode, image_size=self.image_size).float() / 255
        if isinstance(source, (list, tuple)) and source:
            images = [self.pixels(one) for one in source]
            if all(image.ndim == 3 for image in images):
                return torch.stack(images)
        count = f" of {len(source)}" if isinstance(source, (list, tuple)) else ""
        raise TypeError(
            "source must be a path, bytes, an image of Pillow's, a tensor, or a list of such images, got "
            f"{type(source).__name__}{count}"
        )

    def _of_tensor(self, images: Tensor) -> Tensor:
        if images.ndim not in (3, 4) or images.shape[-3] not in (1, 3) or 0 in images.shape:
            raise ValueError(
                f"source must be (C, H, W) or (B, C, H, W) with C = 1 or 3 if it is a tensor, got {tuple(images.shape)}"
            )
        if images.dtype == torch.uint8:
            pictures = [
                as_pixels(_picture(image), mode=self.mode, image_size=self.image_size)
                for image in images.reshape(-1, *images.shape[-3:]).cpu()
            ]
            return (torch.stack(pictures).float() / 255).view(*images.shape[:-3], *pictures[0].shape)
        if not images.is_floating_point():
            raise TypeError(f"source must be uint8, or floating in [0, 1], if it is a tensor, got {images.dtype}")
        low, high = images.min().item(), images.max().item()
        if not (low >= 0 and high <= 1):
            raise ValueError(f"source must be in [0, 1] if it is a floating tensor, got {low:g} to {high:g}")
        images = images.float()
        if self.mode == "L" and images.shape[-3] == 3:
            images = (images * images.new_tensor(GREY)[:, None, None]).sum(-3, keepdim=True)
        images = images.expand(*images.shape[:-3], len(self.mode), *images.shape[-2:])
        if images.shape[-2:] != self.image_size:
            left, top, right, bottom = crop_box((images.shape[-2], images.shape[-1]), self.image_size)
            batch = images[..., top:bottom, left:right].reshape(-1, *images.shape[-3:-2], bottom - top, right - left)
            resized = F.interpolate(batch, self.image_size, mode="bilinear", antialias=True, align_corners=False)
            images = resized.clamp(0, 1).view(*images.shape[:-2], *self.image_size)
        return images.contiguous()


def _picture(image: Tensor) -> Image.Image:
    """Return a (C, H, W) uint8 tensor as an image of Pillow's."""
    rows = image.movedim(0, 2).contiguous().numpy()
    return Image.fromarray(rows[:, :, 0] if rows.shape[2] == 1 else rows)
