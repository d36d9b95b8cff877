"""Lightning's callback: what it refuses. That it logs is seen in tests/examples/test_lightning_loop.py."""

from __future__ import annotations

import importlib.util

import pytest

from protomem_kernels.compat.lightning import health_callback


def test_the_callback_wants_lightning_and_a_number() -> None:
    with pytest.raises(ValueError, match="every must be at least 1"):
        health_callback(0)
    if importlib.util.find_spec("lightning") is None and importlib.util.find_spec("pytorch_lightning") is None:
        with pytest.raises(ImportError, match="pip install lightning"):
            health_callback()
