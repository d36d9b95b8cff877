"""The trained encoder on its own: the file that a run leaves of it, and the way back to a module and its transform.

``encoder.pt`` holds the averaged encoder's weights, how it was built, and what its images are made into: no optimiser,
no memory, none of the training images. It is read without executing any of it, as a checkpoint is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from protomem_kernels.training import runs
from protomem_kernels.training.checkpoints import load_checkpoint, save_checkpoint
from protomem_kernels.training.encoders import build_encoder
from protomem_kernels.training.errors import RunError
from protomem_kernels.training.preprocessing import Transform

if TYPE_CHECKING:
    from protomem_kernels.training.steps import Training

AVERAGED = "module."  # begins the names of the weights in the state of an AveragedModel


def save_encoder(path: Path, training: Training, transform: Transform) -> None:
    """Write the averaged encoder of a run and what its images are made into, in one piece."""
    weights = training.average.module.state_dict()
    save_checkpoint(path, {"built": training.built, "images": transform.as_dict(), "weights": weights})


def load_encoder(run: str | os.PathLike[str], device: str | torch.device = "cpu") -> tuple[nn.Module, Transform]:
    """Return the encoder that a run has trained, and the transform that makes its input of an image.

    The encoder is the moving average of the weights, which the run verified, in ``eval()`` mode: it maps the
    transform's (B, C, H, W) float32 images to (B, D) embeddings, whose cosine says how alike two images are. The run's
    own figures and thresholds are of the mean over ten views, ``embedding.VerifiedEncoder(encoder)``. A run that has
    not come to its end, or comes from before there was ``encoder.pt``, is read from its last checkpoint.

    Args:
        run: the run's folder, such as ``runs/orl``.
        device: where the encoder is to be; the transform works on the CPU.

    Raises:
        RunError: there is no such run, it has neither file, or the file cannot be used.

    Example:
        The two lines, of which the second embeds two files::

            encoder, transform = load_encoder("runs/orl")
            embeddings = encoder(transform(["ann.jpg", "bob.jpg"]))  # (2, 128)

    """
    encoder, transform = encoder_of(read_encoder(run), run)
    return encoder.to(device), transform


def encoder_of(content: Mapping[str, Any], run: str | os.PathLike[str]) -> tuple[nn.Module, Transform]:
    """Return the encoder and the transform of what ``read_encoder`` has read of a run.

    Raises:
        RunError: it holds none.
    """
    try:
        encoder, transform = build_encoder(**content["built"]), Transform(**content["images"])
        encoder.load_state_dict(content["weights"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise RunError(f"{run} does not hold an encoder of this protomem: {error}") from error
    return encoder.eval(), transform


def read_encoder(run: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what ``save_encoder`` wrote of a run: ``built``, ``images`` and ``weights``.

    Raises:
        RunError: as ``load_encoder``.
    """
    folder = Path(run)
    if not folder.is_dir():
        came = "a file" if folder.exists() else "not there"
        raise RunError(f"run must be the folder of a run, such as runs/orl, got {run}, which is {came}")
    file = next((file for name in (runs.ENCODER, runs.CHECKPOINT) if (file := folder / name).exists()), None)
    if file is None:
        raise RunError(f"{folder} has no trained encoder: neither {runs.ENCODER} nor {runs.CHECKPOINT} is there")
    content = load_checkpoint(file)
    if file.name == runs.ENCODER:
        return content
    try:
        return _from_checkpoint(content)
    except (AttributeError, KeyError, TypeError) as error:
        raise RunError(f"{file} does not hold an encoder of this protomem: {error}") from error


def _from_checkpoint(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``save_encoder`` would have written at a checkpoint."""
    config, average = content["config"], content["average"]
    mode = "RGB" if config["data"] else "L"
    options = {key: config[key] for key in ("image_size", "embedding_dim", "width", "dropout")}
    return {
        "built": {"name": config["encoder"], "channels": len(mode), **options},
        "images": {"mode": mode, "image_size": config["image_size"]},
        "weights": {name.removeprefix(AVERAGED): row for name, row in average.items() if name.startswith(AVERAGED)},
    }
