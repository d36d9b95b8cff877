"""Libraries that only some commands need: asked for when they are needed, in one line if they are not there."""

from __future__ import annotations

import importlib
from typing import Any

from protomem_kernels.training.errors import RunError


def needed(module: str, *, what: str, extra: str) -> Any:
    """Return a module that is not part of every installation.

    Args:
        module: its name.
        what: what needs it, as an error says it.
        extra: the extra of this package that brings it.

    Raises:
        RunError: it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RunError(
            f"{what} needs {module.split('.')[0]}, which cannot be imported ({error}): "
            f"pip install 'protomem-kernels[{extra}]'"
        ) from error
