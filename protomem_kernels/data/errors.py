"""The error of a data set that its user can mend."""

from __future__ import annotations


class DatasetError(ValueError):
    """The files of a data set are missing or unusable. The message names the path, what was expected and what came."""
