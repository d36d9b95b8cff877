"""The errors of a data set that its user can mend."""

from __future__ import annotations


class DatasetError(ValueError):
    """The files of a data set are missing or unusable. The message names the path, what was expected and what came."""


class ImageError(DatasetError):
    """One image cannot be read.

    Attributes:
        reason: what came, without the image's name.
    """

    reason = ""

    @classmethod
    def of(cls, name: str, expected: str, reason: str) -> ImageError:
        """Return the error of the image of that name; ``expected`` begins with "expected"."""
        error = cls(f"{name}: {expected}, got {reason}")
        error.reason = reason
        return error
