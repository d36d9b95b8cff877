"""What of a data set is not used, and why: counted and named by kind, so that nothing vanishes without a word."""

from __future__ import annotations

from collections.abc import Iterable

from protomem_kernels.data.errors import DatasetError

NAMES_SHOWN = 3


class LeftOut:
    """Names of what is left out, by kind.

    Example:
        >>> left_out = LeftOut()
        >>> left_out.add("empty files", "ann/1.jpg", "bob/7.jpg", "bob/8.jpg", "eve/2.jpg")
        >>> left_out.lines()
        ['left out, empty files: 4 (ann/1.jpg, bob/7.jpg, bob/8.jpg, ...)']

    """

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}

    def __len__(self) -> int:
        """How many things, of all kinds."""
        return sum(map(len, self._names.values()))

    def add(self, kind: str, *names: str) -> None:
        """Note things of one kind, which is said in the plural."""
        if names:
            self._names.setdefault(kind, []).extend(names)

    def extend(self, other: LeftOut) -> None:
        """Note all that another one holds."""
        for kind, names in other._names.items():
            self.add(kind, *names)

    def names(self, kind: str) -> list[str]:
        """All of one kind, as they came."""
        return list(self._names.get(kind, ()))

    def lines(self) -> list[str]:
        """Return one line a kind: how many, and the first few names."""
        return [f"left out, {kind}: {len(names)} ({first_few(names)})" for kind, names in self._names.items()]

    def refuse(self, origin: str) -> None:
        """Raise DatasetError, one line, if there is anything at all."""
        if self:
            kinds = "; ".join(f"{kind}: {len(names)} ({first_few(names)})" for kind, names in self._names.items())
            raise DatasetError(f"{origin}: expected nothing to be left out (--strict), got {kinds}")


def first_few(names: Iterable[str], shown: int = NAMES_SHOWN) -> str:
    """Return the first few names, with dots for the rest."""
    names = list(names)
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")
