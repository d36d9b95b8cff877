"""Warnings that point at the line of the user's which brought them about, not into this package."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

# Frames in these folders are on the way from the user's line to ours.
_PASSED_THROUGH = tuple(f"{Path(file).parent}{os.sep}" for file in (__file__, torch.__file__))


def warn_caller(message: str) -> None:
    """Warn (UserWarning) at the innermost line on the stack that is neither this package's nor PyTorch's."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PASSED_THROUGH):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
