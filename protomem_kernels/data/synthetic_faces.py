"""Synthetic faces: people who do not exist, as many as one likes, drawn from a mesh. No photograph of anybody.

An identity is a head: controls of shape, build, the tones of skin and hair. An image is that head with an expression, a
pose and a light of its own, in grey, aligned as detected faces are: the eyes and the mouth at about the same place.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from protomem_kernels import _files
from protomem_kernels._checks import check_int
from protomem_kernels.data.face_model import FaceModel, build_weights, read_face_model
from protomem_kernels.data.image_store import Writer, kept_images
from protomem_kernels.data.rasterizer import seen

__all__ = ["FaceSet", "synthetic_faces"]

DRAWING = 1  # raised with every change of what is drawn
SMALLEST = 16  # pixels
FINER = 2  # rows and columns that are drawn for each that is kept
AT_ONCE = 32  # images that are drawn together

SHAPE, ASYMMETRY = 0.3, 0.15  # standard deviations of the controls, which end at -1 and 1
EXPRESSION = 0.45  # of a control, once it is drawn beyond QUIET
QUIET = 0.8
TURN, NOD, TILT = 20.0, 8.0, 4.0  # standard deviations in degrees, of yaw, pitch and roll
SHIFT, ZOOM = 0.015, 0.03  # standard deviations of the alignment's errors, in images and in scale
EYES_TO_MOUTH = 0.42  # in images
NECK_BEHIND = 0.7  # decimetres from the face back to the axis that the head turns about
GAMMA = 1.8


@dataclass(frozen=True)
class FaceSet:
    """N synthetic images.

    Attributes:
        images: (N, 1, size, size) uint8, memory-mapped.
        labels: (N,) int64, ascending from 0.
        angles: (N, 3) float32 in degrees: yaw (positive: to the image's right), pitch, roll.
        names: of each identity.
        notes: lines on what happened to the file that keeps the images.
    """

    images: Tensor
    labels: Tensor
    angles: Tensor
    names: list[str]
    notes: list[str]

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.labels)

    def __repr__(self) -> str:
        return f"FaceSet({len(self)} synthetic images of {len(self.names)} identities)"


def synthetic_faces(
    identities: int = 1000,
    images_per_identity: int = 20,
    *,
    size: int = 64,
    seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> FaceSet:
    """Draw synthetic faces, or map the file in which an earlier call kept them.

    An identity and its images depend on ``seed`` and its number alone: the first ones of a larger set are those of a
    smaller one. On another processor a few pixels may differ by a grey level, as matrix products round there.

    A file that is damaged, cut short or of another version is drawn again, and ``notes`` says so. An interrupted call
    leaves no file. All images are sharp; :func:`~protomem_kernels.data.degradations.degrade_share` damages some of them
    and tells their quality.

    Args:
        identities: how many people, at least 2.
        images_per_identity: at least 1.
        size: height and width in pixels, at least 16.
        seed: at least 0.
        cache: folder for the file. Default: ``PROTOMEM_CACHE_DIR``, or ``protomem_kernels`` in the user's cache folder.
        progress: called as ``progress(identities done, identities in all)`` while it draws; not when it maps.

    Returns:
        The images, identity by identity.

    Raises:
        DatasetError: the package ``anny`` is not installed (the ``faces`` extra), or the file cannot be written.
        TypeError, ValueError: numbers that are none, or too small.

    Example:
        >>> synthetic_faces(1)
        Traceback (most recent call last):
        ValueError: identities must be at least 2, got 1

    """
    check_int("identities", identities, at_least=2)
    check_int("images_per_identity", images_per_identity, at_least=1)
    check_int("size", size, at_least=SMALLEST)
    check_int("seed", seed, at_least=0)
    made_of = {
        "drawing": DRAWING,
        "identities": identities,
        "images_per_identity": images_per_identity,
        "size": size,
        "seed": seed,
    }
    name = f"synthetic-faces-{size}-{identities}x{images_per_identity}-{seed}.images"

    def make(writer: Writer) -> None:
        model = read_face_model()
        together = max(1, AT_ONCE // images_per_identity)
        for first in range(0, identities, together):
            if progress:
                progress(first, identities)
            numbers = range(first, min(first + together, identities))
            draws = [_draw(model, seed, number, images_per_identity) for number in numbers]
            heads = Heads(*(torch.cat(parts) for parts in zip(*(head for head, _ in draws), strict=True)))
            views = Views(*(torch.cat(parts) for parts in zip(*(view for _, view in draws), strict=True)))
            grey = render(model, heads, views, size)
            writer.add(
                (grey * 255).round().to(torch.uint8).numpy(),
                labels=np.repeat(np.array(numbers, np.int64), images_per_identity),
                **{angle: views.angles[:, place].numpy() for place, angle in enumerate(("yaw", "pitch", "roll"))},
            )
        if progress:
            progress(identities, identities)

    stored, notes = kept_images(Path(cache or _files.cache_folder()) / name, made_of, (1, size, size), make)
    angles = np.stack([stored.columns[angle] for angle in ("yaw", "pitch", "roll")], axis=1)
    return FaceSet(
        images=stored.images,
        labels=torch.from_numpy(stored.columns["labels"].copy()),
        angles=torch.from_numpy(angles),
        names=[f"synthetic {number}" for number in range(identities)],
        notes=notes,
    )


class Heads(NamedTuple):
    """H heads.

    Attributes:
        shape: (H, controls) in [-1, 1].
        build: (H, 24), of :func:`~protomem_kernels.data.face_model.build_weights`.
        tones: (H, 3), reflectance of skin, of hair, and 1.
    """

    shape: Tensor
    build: Tensor
    tones: Tensor


class Views(NamedTuple):
    """N views, the same number of each head in turn.

    Attributes:
        expression: (N, controls) in [0, 1].
        angles: (N, 3), yaw, pitch and roll in degrees.
        offset: (N, 3), of the alignment: x and y in images, and the scale's logarithm.
        light: (N, 3), a unit vector towards the light.
        levels: (N, 3): the share of light that comes from everywhere, exposure, background.
    """

    expression: Tensor
    angles: Tensor
    offset: Tensor
    light: Tensor
    levels: Tensor


def _draw(model: FaceModel, seed: int, number: int, views: int) -> tuple[Heads, Views]:
    """Draw one head and its views by chance."""
    random = np.random.default_rng([seed, number])

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(random.standard_normal(shape, np.float32))

    def even(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.from_numpy(random.random(shape, np.float32))

    spread = torch.tensor([ASYMMETRY if name.startswith("asym") else SHAPE for name in model.shape.names])
    people = -even(1e-6, 1, 1, 3).log()
    heads = Heads(
        shape=(spread * normal(1, len(spread))).clamp(-1, 1),
        build=build_weights(
            even(-0.3, 1.3, 1).clamp(0, 1), even(0, 1, 1).square(), people / people.sum(), even(-1, 1, 1)
        ),
        tones=torch.cat([even(0.35, 0.85, 1, 1), even(0.03, 0.4, 1, 1), torch.ones(1, 1)], 1),
    )
    light = normal(views, 3) * torch.tensor([0.7, 0.4, 0.0]) + torch.tensor([0.0, 0.3, 1.0])
    return heads, Views(
        expression=(EXPRESSION * (normal(views, len(model.expression.names)) - QUIET)).clamp(0, 1),
        angles=(normal(views, 3) * torch.tensor([TURN, NOD, TILT])).clamp(-60, 60),
        offset=normal(views, 3) * torch.tensor([SHIFT, SHIFT, ZOOM]),
        light=F.normalize(light, dim=1),
        levels=torch.cat([even(0.15, 0.45, views, 1), even(0.8, 1.25, views, 1), even(0, 1, views, 1)], 1),
    )


def render(model: FaceModel, heads: Heads, views: Views, size: int) -> Tensor:
    """Draw views of heads: (N, 1, size, size) float32 in [0, 1]."""
    count, times, fine = len(views.angles), len(views.angles) // len(heads.shape), FINER * size
    head = model.vertices + model.shape.moved(heads.shape) + (heads.build @ model.build).view(len(heads.shape), -1, 3)
    eyes, mouth = (model.eyes @ head).mean(1), model.lips @ head  # (H, 3)
    scale = EYES_TO_MOUTH * fine / (eyes - mouth).norm(dim=1).repeat_interleave(times) * views.offset[:, 2].exp()
    face = head - (0.55 * eyes + 0.45 * mouth)[:, None]
    face = (face.repeat_interleave(times, 0) + model.expression.moved(views.expression)) * scale[:, None, None]
    axis = torch.tensor([0.0, 0.0, -NECK_BEHIND]) * scale[:, None, None]
    face = (face - axis) @ _rotations(views.angles).transpose(1, 2) + axis
    normals = _normals(face, model.triangles)
    middle = F.pad(fine * (0.5 + views.offset[:, :2]), (0, 1))
    hit = seen(face * torch.tensor([1.0, -1.0, 1.0]) + middle[:, None], model.triangles, fine)

    image, corners = hit.pixels // fine**2, model.triangles[hit.triangles]
    normal = F.normalize((normals[image[:, None], corners] * hit.weights[:, :, None]).sum(1), dim=1)
    reflectance = ((heads.tones @ model.paint)[(image // times)[:, None], corners] * hit.weights).sum(1)
    ambient, exposure, background = views.levels.unbind(1)
    lit = (normal * views.light[image]).sum(1).relu()
    grey = background.repeat_interleave(fine**2)
    grey[hit.pixels] = exposure[image] * reflectance * (ambient[image] + (1 - ambient[image]) * lit)
    return F.avg_pool2d(grey.clamp(0, 1).pow(1 / GAMMA).view(count, 1, fine, fine), FINER)


def _normals(vertices: Tensor, triangles: Tensor) -> Tensor:
    """Return the mean direction of the triangles at each vertex, by area: (B, V, 3), not of length 1."""
    first, second, third = vertices[:, triangles].unbind(2)
    across = torch.linalg.cross(second - first, third - first)
    normals = torch.zeros_like(vertices)
    for corner in triangles.unbind(1):
        normals.index_add_(1, corner, across)
    return normals


def _rotations(degrees: Tensor) -> Tensor:
    """Return the turn by yaw about y, then by pitch about x, then by roll about z, as matrices: (N, 3, 3)."""
    matrices = []
    for place, (one, other) in enumerate([(2, 0), (1, 2), (0, 1)]):
        angle = degrees[:, place] * (math.pi / 180)
        matrix = torch.eye(3).repeat(len(degrees), 1, 1)
        matrix[:, one, one] = matrix[:, other, other] = angle.cos()
        matrix[:, other, one] = angle.sin()
        matrix[:, one, other] = -angle.sin()
        matrices.append(matrix)
    yaw, pitch, roll = matrices
    return roll @ pitch @ yaw
