"""The syllables that one font draws: on bitmaps, since a font's character map may name glyphs that are not there.

A font is scaled and placed once, such that the ink of a sample of its syllables fills the image but for a margin of one
pixel; within it every syllable stands where the font puts it.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from protomem_kernels.data.arrays import Ints

FIRST, LAST = 0xAC00, 0xD7A3  # the Unicode block of the composed syllables
SYLLABLES = LAST - FIRST + 1
MARGIN = 1  # pixels
NO_CHARACTER = "\U0010ffff"  # stands for nothing, in any font: what is drawn says that there is no glyph
MEASURED, MEASURED_PIXELS = 200, 128  # syllables that say how large a font draws, and at which size they are looked at


class Drawn(NamedTuple):
    """What one font draws of the syllables it was asked for. K of them are kept.

    Attributes:
        images: (K, size, size) uint8, the ink 255.
        syllables: (K,) int64, their places after U+AC00.
        blank: how many have no ink.
        missing: how many show the font's sign for a glyph that it has not.
        repeated: how many look, to the last bit, like another one of the same font. None of these is kept.
    """

    images: npt.NDArray[np.uint8]
    syllables: Ints
    blank: int
    missing: int
    repeated: int


def draw(font: Path, syllables: Ints, size: int) -> Drawn:
    """Draw syllables (S,), given as places after U+AC00, as (size, size) images, and keep what shows one.

    Raises:
        OSError: the file is no font that FreeType reads.
    """
    characters = [chr(FIRST + place) for place in syllables.tolist()]
    pixels, x, y = _fitted(font, characters[:: max(1, len(characters) // MEASURED)], size)
    face = _face(font, pixels)
    *bitmaps, no_glyph = (_picture(face, character, x, y, size) for character in [*characters, NO_CHARACTER])
    counts = Counter(bitmaps)
    blank, missing = counts.pop(bytes(size * size), 0), counts.pop(no_glyph, 0)
    kept = np.array([counts[bitmap] == 1 for bitmap in bitmaps], bool)
    images = np.frombuffer(b"".join(bitmaps), np.uint8).reshape(-1, size, size)[kept]
    return Drawn(images, syllables[kept], blank, missing, len(bitmaps) - blank - missing - len(images))


def _face(font: Path, pixels: float) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(font), pixels, layout_engine=ImageFont.Layout.BASIC)


def _picture(face: ImageFont.FreeTypeFont, character: str, x: float, y: float, size: int) -> bytes:
    image = Image.new("L", (size, size))
    # By the baseline: the height above it, which would say where it is, comes rounded to whole pixels.
    ImageDraw.Draw(image).text((x, y), character, fill=255, font=face, anchor="ls")
    return image.tobytes()


def _fitted(font: Path, sample: list[str], size: int) -> tuple[float, float, float]:
    """Return the size in pixels at which a sample's ink fills an image, and where its baseline then begins: x and y."""
    face, wide = _face(font, MEASURED_PIXELS), 3 * MEASURED_PIXELS
    ink = np.zeros((wide, wide), np.uint8)
    for character in sample:
        picture = _picture(face, character, MEASURED_PIXELS, 2 * MEASURED_PIXELS, wide)
        np.maximum(ink, np.frombuffer(picture, np.uint8).reshape(wide, wide), out=ink)
    box = Image.fromarray(ink).getbbox()
    if box is None:  # a font without any: every size does
        return float(size), 0.0, 0.0
    left, right = (edge - MEASURED_PIXELS for edge in box[::2])
    top, bottom = (edge - 2 * MEASURED_PIXELS for edge in box[1::2])
    scale = (size - 2 * MARGIN) / max(right - left, bottom - top)
    return MEASURED_PIXELS * scale, size / 2 - scale * (left + right) / 2, size / 2 - scale * (top + bottom) / 2
