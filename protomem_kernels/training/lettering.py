"""Names in pictures: as they are where an installed font has their letters, else spelled by their escapes."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

PLAIN = "DejaVu Sans"  # comes with matplotlib


class Lettering(NamedTuple):
    """How to write some texts.

    Attributes:
        families: of fonts, in the order in which a letter is looked for.
        missing: the letters that none of them has.
    """

    families: list[str]
    missing: frozenset[str]

    def spell(self, text: str) -> str:
        r"""Return the text with what cannot be drawn as escapes: ``caf\xe9`` of a byte, ``\u4eba`` of a letter.

        >>> Lettering([PLAIN], frozenset("人")).spell("人 ann")
        '\\u4eba ann'
        """
        # A name that is no UTF-8 comes from the file system with its bytes as lone surrogates.
        whole = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        return "".join(
            letter.encode("unicode_escape").decode()
            if letter in self.missing or not (letter.isprintable() or letter == "\n")
            else letter
            for letter in whole
        )


def lettering(texts: Iterable[str]) -> Lettering:
    """Return how to write all of these texts with the fonts that are installed."""
    from matplotlib.font_manager import fontManager

    missing = {letter for letter in "".join(texts) if letter.isprintable() and not _has(PLAIN, letter)}
    families = [PLAIN]
    # Only where matplotlib's own font does not do: opening all that are installed takes a while.
    for family in sorted({font.name for font in fontManager.ttflist}) if missing else ():
        found = {letter for letter in missing if _has(family, letter)}
        if found:
            families.append(family)
            missing -= found
    return Lettering(families, frozenset(missing))


@cache
def _letters(family: str) -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    if family.startswith("Last Resort"):  # has a box for every letter
        return frozenset()
    try:
        return frozenset(get_font(findfont(FontProperties(family=[family]))).get_charmap())
    except (OSError, RuntimeError):  # a font of pictures, or a broken one
        return frozenset()


def _has(family: str, letter: str) -> bool:
    return ord(letter) in _letters(family)
