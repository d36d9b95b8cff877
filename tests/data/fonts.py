"""Font files for tests: made up, so that nothing has to be installed and it is known what each of them gets wrong.

A syllable is drawn as some squares of a 6 x 6 board, the same ones in every font; a font has its own size of squares.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

EM, BOARD = 1000, 6


def make_font(
    path: Path,
    syllables: Sequence[int],
    *,
    square: int = 120,
    ascent: int = EM,
    missing: Collection[int] = (),
    blank: Collection[int] = (),
    like_the_first: Collection[int] = (),
) -> Path:
    """Write a TrueType font.

    Args:
        path: the file; its folder is made.
        syllables: places after U+AC00 that its character map names, but for those of ``missing``.
        square: width of a square, of at most 150 thousandths of the font's size.
        ascent: how high it says that it rises above its baseline; nothing is drawn otherwise.
        missing: syllables that it does not name, so that the sign for a missing glyph is drawn.
        blank: syllables that it names without drawing any.
        like_the_first: syllables that it draws as it does the first one.
    """
    named = [place for place in syllables if place not in missing]
    glyphs = {".notdef": _board(np.eye(BOARD, dtype=bool), square)}
    for place in named:
        drawn = named[0] if place in like_the_first else place
        squares = np.random.default_rng(drawn).random((BOARD, BOARD)) < 0.4
        glyphs[f"s{place}"] = _board(squares & (place not in blank), square)
    builder = FontBuilder(EM, isTTF=True)
    builder.setupGlyphOrder(list(glyphs))
    builder.setupCharacterMap({0xAC00 + place: f"s{place}" for place in named})
    builder.setupGlyf(glyphs)
    for glyph in glyphs.values():
        glyph.recalcBounds(None)
    builder.setupHorizontalMetrics({name: (EM, glyph.xMin) for name, glyph in glyphs.items()})
    builder.setupHorizontalHeader(ascent=ascent, descent=0)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    path.parent.mkdir(parents=True, exist_ok=True)
    builder.save(path)
    return path


def _board(squares: np.ndarray, square: int):
    pen = TTGlyphPen(None)
    for row, column in np.argwhere(squares).tolist():
        left, bottom = 50 + 150 * column, 50 + 150 * row
        pen.moveTo((left, bottom))
        pen.lineTo((left, bottom + square))
        pen.lineTo((left + square, bottom + square))
        pen.lineTo((left + square, bottom))
        pen.closePath()
    return pen.glyph()
