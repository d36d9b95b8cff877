"""What a call launches in Triton's interpreter, and what it asks of PyTorch besides."""

from __future__ import annotations

import pytest
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

# What reads and moves nothing.
ALLOCATIONS = {"empty", "new_empty", "select", "unbind", "split_with_sizes", "split", "detach"}


class Launches(TorchDispatchMode):
    """Lists the kernels that are launched, and whatever PyTorch is asked for between them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.interpreter import GridExecutor

        super().__init__()
        self.kernels: list[str] = []
        self.operators: set[str] = set()
        launch = GridExecutor.__call__

        def counted(executor, *args, **kwargs):
            self.kernels.append(executor.fn.__name__)
            with _disable_current_modes():
                return launch(executor, *args, **kwargs)

        monkeypatch.setattr(GridExecutor, "__call__", counted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
