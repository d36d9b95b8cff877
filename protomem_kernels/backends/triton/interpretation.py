"""Whether Triton's kernels run in its interpreter, on CPU tensors too, instead of on a GPU."""

from __future__ import annotations

import functools
import os


@functools.cache
def interpreted() -> bool:
    """Say whether kernels run in Triton's interpreter instead of on a GPU; settled at the first call."""
    return os.environ.get("TRITON_INTERPRET") == "1"
