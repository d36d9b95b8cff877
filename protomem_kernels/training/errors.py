"""The error of a run that its user can mend."""

from __future__ import annotations


class RunError(Exception):
    """Something a run cannot go on with, for a reason that its user can read and mend: one line that says it."""
