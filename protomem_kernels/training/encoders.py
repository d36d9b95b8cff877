"""Encoders: images in, embeddings out. A small residual CNN of our own, or any timm model by name."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from protomem_kernels.training.errors import RunError


def build_encoder(
    name: str,
    *,
    channels: int,
    image_size: tuple[int, int],
    embedding_dim: int,
    width: int = 16,
    dropout: float = 0.0,
    pretrained: bool = False,
) -> nn.Module:
    """Return a module that maps (B, ``channels``, *``image_size``) float32 images to (B, ``embedding_dim``) embeddings.

    Args:
        name: ``residual`` for ``ResidualEncoder``, ``residual-pooled`` for it with global average pooling; anything
            else is a timm model (no ``width``, no ``dropout``).
        channels: 1 for grey images, 3 for colour.
        image_size: height and width in pixels.
        embedding_dim: size of an embedding.
        width: channels of the residual CNN's first stage.
        dropout: in front of the residual CNN's last layer.
        pretrained: begin with the weights that timm has for its model.

    Raises:
        RunError: there is no such model, no weights for it, or it cannot take such images.

    """
    if name in ("residual", "residual-pooled"):
        if pretrained:
            raise RunError(
                f"pretrained weights are timm's; encoder {name!r} has none: take a timm model, or leave it out"
            )
        pooled = name == "residual-pooled"
        return ResidualEncoder(channels, image_size, embedding_dim, width=width, dropout=dropout, pooled=pooled)
    encoder = TimmEncoder(name, channels, embedding_dim, pretrained=pretrained)
    _try_out(encoder, name, torch.zeros(1, channels, *image_size))
    return encoder


class ResidualEncoder(nn.Module):
    """Three stages of pre-normalised residual blocks, then one fully connected layer over all positions.

    Faces come aligned, so *where* a feature stands says as much as what it is: a fully connected layer keeps the place,
    global average pooling (``pooled``, for images that are not aligned) throws it away (docs/notes/training.md has the
    figures).
    """

    def __init__(
        self,
        channels: int,
        image_size: tuple[int, int],
        embedding_dim: int,
        *,
        width: int = 16,
        dropout: float = 0.0,
        pooled: bool = False,
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.PReLU(width),
            ResidualBlock(width, width, stride=1),
            ResidualBlock(width, 2 * width, stride=2),
            ResidualBlock(2 * width, 4 * width, stride=2),
            nn.BatchNorm2d(4 * width),
        )
        # Three halvings, rounded up, leave this many positions.
        height, breadth = (1, 1) if pooled else (-(-size // 8) for size in image_size)
        self.embed = nn.Sequential(
            nn.AdaptiveAvgPool2d(1) if pooled else nn.Identity(),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(4 * width * height * breadth, embedding_dim, bias=False),
            nn.BatchNorm1d(embedding_dim),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=0.25)  # PReLU starts with slope 0.25
            elif isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, embedding_dim) embeddings of (B, channels, H, W) images."""
        embeddings: Tensor = self.embed(self.features(images))
        return embeddings


class ResidualBlock(nn.Module):
    """Norm, convolution, norm, PReLU, convolution, norm beside a shortcut; starts as a mild change of the shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.change = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.PReLU(outputs),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, outputs, H / stride, W / stride) features of (B, inputs, H, W) ones."""
        result: Tensor = self.change(features) + self.shortcut(features)
        return result


class TimmEncoder(nn.Module):
    """A timm model without its classifier, then one linear layer; grey images become three channels."""

    def __init__(self, name: str, channels: int, embedding_dim: int, *, pretrained: bool = False) -> None:
        super().__init__()
        self.backbone = _timm_model(name, pretrained)
        self.copies = 3 if channels == 1 else 1
        # What is left without the classifier may end in a hidden layer of its own (MobileNetV3).
        features = getattr(self.backbone, "head_hidden_size", None) or self.backbone.num_features
        self.embed = nn.Sequential(nn.Linear(features, embedding_dim, bias=False), nn.BatchNorm1d(embedding_dim))

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, embedding_dim) embeddings of (B, 1 or 3, H, W) images."""
        embeddings: Tensor = self.embed(self.backbone(images.repeat(1, self.copies, 1, 1)))
        return embeddings


@torch.no_grad()
def _try_out(encoder: nn.Module, name: str, images: Tensor) -> None:
    """Find out now, and not in the first step, whether a model takes images of this size."""
    encoder.eval()
    try:
        encoder(images)
    except Exception as error:  # an assertion, a RuntimeError of a convolution ...
        height, width = images.shape[2:]
        raise RunError(f"encoder {name!r} cannot take images of {height} x {width} pixels: {error}") from error


def _timm_model(name: str, pretrained: bool) -> Any:
    try:
        timm = importlib.import_module("timm")
    except Exception as error:  # a torchvision of another torch raises what it likes, an AttributeError, a RuntimeError
        raise RunError(
            f"encoder {name!r} is a timm model and timm cannot be imported ({error}): pip install "
            "'protomem-kernels[timm]', or take --encoder residual"
        ) from error
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0)
    except Exception as error:  # RuntimeError, ValueError or types of its own: an unknown name, no weights, no network
        what = f"the encoder {name!r}{' with pretrained weights' if pretrained else ''}"
        raise RunError(f"timm cannot create {what}: {error}") from error
