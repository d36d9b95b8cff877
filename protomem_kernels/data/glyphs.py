"""Hangul glyphs: a large set with many look-alikes and nobody's photograph. An identity is a syllable, a style a font.

The 11,172 composed syllables of Unicode in the fonts of five Debian packages give half a million images. They are
drawn once and kept in a file (:mod:`~protomem_kernels.data.image_store`), from which they are memory-mapped. What does
not show its syllable is left out, and so are fonts that mostly fail or repeat another one; ``tally`` counts them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import features
from torch import Tensor

from protomem_kernels import _files
from protomem_kernels._checks import check_int
from protomem_kernels.data.arrays import Ints
from protomem_kernels.data.errors import DatasetError
from protomem_kernels.data.hangul_drawing import FIRST, SYLLABLES, draw
from protomem_kernels.data.hangul_fonts import fonts_of, installed_fonts
from protomem_kernels.data.image_store import Writer, kept_images

__all__ = ["FontTally", "GlyphSet", "glyph_images"]

DRAWING = 2  # raised with every change of what is drawn or left out
LEAST_KEPT = 0.5  # of its syllables, that a font has to show
# Mean cosine of two fonts' images of the same syllable. One drawing under two names has 0.98 to 1.00, the two lightest
# weights of one family 0.95.
SAME_FONT = 0.97
COMPARED = 256  # syllables that say whether two fonts are the same
SMALLEST = 8  # pixels


class FontTally(NamedTuple):
    """What became of one font's syllables.

    Attributes:
        font: the file's name.
        kept, blank, missing, repeated: how many; see :class:`~protomem_kernels.data.hangul_drawing.Drawn`.
        left_out: why the whole font is; empty: it is not.
    """

    font: str
    kept: int
    blank: int
    missing: int
    repeated: int
    left_out: str

    def __str__(self) -> str:
        """One line for people."""
        failed = {"blank": self.blank, "without a glyph": self.missing, "like another": self.repeated}
        of_which = "".join(f", {number} {what}" for what, number in failed.items() if number)
        return f"{self.font}: {self.kept} kept{of_which}" + (f"; left out, {self.left_out}" if self.left_out else "")


@dataclass(frozen=True)
class GlyphSet:
    """N images of syllables. Labels are places after U+AC00, so that they mean the same in every set.

    Attributes:
        images: (N, 1, size, size) uint8, ink 255 on 0, memory-mapped.
        labels: (N,) int64 in [0, 11172).
        styles: (N,) int64, an index into ``fonts``.
        names: of each identity, the syllable: ``names[label]``.
        fonts: of each style, the file's name.
        tally: of each font that was looked at.
        notes: lines on what happened to the file that keeps the images.
    """

    images: Tensor
    labels: Tensor
    styles: Tensor
    names: list[str]
    fonts: list[str]
    tally: list[FontTally]
    notes: list[str]

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.labels)

    def __repr__(self) -> str:
        identities = len(torch.unique(self.labels))
        return f"GlyphSet({len(self)} images of {identities} syllables in {len(self.fonts)} fonts)"


def glyph_images(
    fonts: str | os.PathLike[str] | None = None,
    *,
    size: int = 32,
    syllables: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> GlyphSet:
    """Draw Hangul syllables in many fonts, or map the file in which an earlier call kept them.

    Of each font a syllable is left out where it is blank, shows the font's sign for a missing glyph, or looks to the
    last bit like another one. A whole font is left out that shows fewer than half of the syllables, or whose images are
    those of a font before it (the same file, or a mean cosine of at least 0.97 over 256 syllables).

    A file that is damaged, cut short, or was made of other fonts, by another FreeType or another version of this
    package is drawn again, and ``notes`` says so. An interrupted call leaves no file.

    Args:
        fonts: a folder with font files, in it or in its folders. None: the Debian packages fonts-nanum,
            fonts-nanum-extra, fonts-baekmuk, fonts-unfonts-core and fonts-unfonts-extra; all must be installed.
        size: height and width in pixels, at least 8.
        syllables: how many of the 11,172, at least 2. The same ones at every call, spread by chance over the alphabet,
            and those of a smaller number are among those of a larger. None: all.
        cache: folder for the file. Default: ``PROTOMEM_CACHE_DIR``, or ``protomem_kernels`` in the user's cache folder.
        progress: called as ``progress(fonts done, fonts in all)`` while it draws, from (0, all) on; not when it maps.

    Returns:
        The images in the order of fonts, then of syllables.

    Raises:
        DatasetError: no fonts, none that shows its syllables, or the file cannot be written.
        TypeError, ValueError: ``size`` or ``syllables`` are no such numbers.

    Example:
        >>> from protomem_kernels.data.errors import DatasetError
        >>> try:
        ...     glyph_images("no/such/folder")
        ... except DatasetError as error:
        ...     print(error)
        no/such/folder: expected font files (.otf, .ttc, .ttf), got none

    """
    check_int("size", size, at_least=SMALLEST)
    chosen = _chosen(syllables)
    files = installed_fonts() if fonts is None else fonts_of(fonts)
    digests = [_digest(file) for file in files]
    made_of = {
        "drawing": DRAWING,
        "FreeType": features.version_module("freetype2"),
        "size": size,
        "syllables": len(chosen),
        "fonts": [[file.name, digest] for file, digest in zip(files, digests, strict=True)],
    }
    where = "" if fonts is None else "-" + hashlib.sha256(os.fsencode(Path(fonts).resolve())).hexdigest()[:8]
    path = Path(cache or _files.cache_folder()) / f"hangul-{size}-{len(chosen)}{where}.images"

    def make(writer: Writer) -> list[FontTally]:
        return _draw_all(files, digests, chosen, size, writer, progress)

    stored, notes = kept_images(path, made_of, (1, size, size), make)
    tally = [FontTally(*row) for row in stored.notes]
    used = [row.font for row in tally if not row.left_out]
    return GlyphSet(
        images=stored.images,
        labels=torch.from_numpy(stored.columns["labels"].copy()),
        styles=torch.from_numpy(stored.columns["styles"].copy()),
        names=[chr(FIRST + place) for place in range(SYLLABLES)],
        fonts=used,
        tally=tally,
        notes=notes,
    )


def _chosen(syllables: int | None) -> Ints:
    """Return the syllables that are asked for, as places after U+AC00, ascending."""
    if syllables is None:
        return np.arange(SYLLABLES)
    check_int("syllables", syllables, at_least=2)
    if syllables > SYLLABLES:
        raise ValueError(f"syllables must be at most {SYLLABLES}, got {syllables}")
    shuffled = torch.randperm(SYLLABLES, generator=torch.Generator().manual_seed(0))
    return np.sort(shuffled[:syllables].numpy())


def _digest(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise DatasetError(f"{file}: expected a font file, got: {error.strerror or error}") from error


def _draw_all(
    files: list[Path],
    digests: list[str],
    chosen: Ints,
    size: int,
    writer: Writer,
    progress: Callable[[int, int], object] | None,
) -> list[FontTally]:
    """Draw the syllables in each font, write what is kept, and return what became of each font."""
    tally: list[FontTally] = []
    looks: dict[str, npt.NDArray[np.float32]] = {}  # of the fonts that are used
    compared = chosen[:: max(1, len(chosen) // COMPARED)]
    twins: dict[str, str] = {}
    for done, (file, digest) in enumerate(zip(files, digests, strict=True)):
        if progress:
            progress(done, len(files))
        if digest in twins:
            tally.append(FontTally(file.name, 0, 0, 0, 0, f"the same file as {twins[digest]}"))
            continue
        twins[digest] = file.name
        try:
            drawn = draw(file, chosen, size)
        except OSError as error:
            tally.append(FontTally(file.name, 0, 0, 0, 0, f"no font: {error}"))
            continue
        kept, reason = len(drawn.syllables), ""
        look = _look(drawn.images, drawn.syllables, compared)
        if kept < LEAST_KEPT * len(chosen):
            reason = f"shows only {kept / len(chosen):.0%} of the syllables"
        else:
            reason = next((f"looks like {name}" for name, other in looks.items() if _alike(look, other)), "")
        if not reason:
            styles = np.full(kept, len(looks), np.int64)
            writer.add(drawn.images[:, None], labels=drawn.syllables, styles=styles)
            looks[file.name] = look
        tally.append(FontTally(file.name, kept, drawn.blank, drawn.missing, drawn.repeated, reason))
    if progress:
        progress(len(files), len(files))
    if not looks:
        raise DatasetError(
            f"{files[0].parent}: expected fonts that show Hangul syllables, got {len(files)} that do not: {tally[0]}"
        )
    return tally


def _look(images: npt.NDArray[np.uint8], syllables: Ints, compared: Ints) -> npt.NDArray[np.float32]:
    """Return the pictures of some syllables as unit rows (S, pixels); a row of zeros where there is none."""
    pixels = images.shape[1] * images.shape[2]
    look = np.zeros((len(compared), pixels), np.float32)
    _, here, there = np.intersect1d(syllables, compared, return_indices=True)
    rows = images[here].reshape(len(here), pixels).astype(np.float32)
    look[there] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return look


def _alike(look: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> bool:
    """Say whether two fonts draw the syllables that both have alike."""
    both = look.any(axis=1) & other.any(axis=1)
    return bool(both.any() and (look[both] * other[both]).sum(axis=1).mean() >= SAME_FONT)
