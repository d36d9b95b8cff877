"""Warnings that point at the line of the user's which brought them about, not into this package."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

# Where the frames lie that are on the way from the user's line to ours: both packages, and Python's own imports.
_PASSED_THROUGH = (*(f"{Path(file).parent}{os.sep}" for file in (__file__, torch.__file__)), "<frozen importlib")


def warn_caller(message: str) -> None:
    """Warn (UserWarning) at the innermost line on the stack that is neither this package's nor PyTorch's."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PASSED_THROUGH):
        frame = frame.f_back
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    name = frame.f_globals.get("__name__")
    warnings.warn_explicit(message, UserWarning, frame.f_code.co_filename, frame.f_lineno, name, registry)
