"""What the two compiled backends, ``cpu`` and ``cuda``, have in common: an object beside this package, loaded or not.

An object implements operators in a namespace of its own, ``protomem_cpu`` or ``protomem_cuda``, and says nothing about
their schemas: those are the public operators', which are defined there when a kernel is first asked for.
PROTOMEM_DISABLE_COMPILED=1, read at import, does without both objects.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from protomem_kernels import _torch
from protomem_kernels._switches import is_on
from protomem_kernels.backends.protocol import Backend, Kernel

FOLDER = Path(__file__).parents[1]  # where the objects are, and notes on why they are not
SWITCHED_OFF = "switched off by PROTOMEM_DISABLE_COMPILED=1"


class NativeBackend(Backend):
    """Kernels in a compiled object.

    Args:
        name: of the backend.
        namespace: in which the object registers its kernels.
        device: that they are registered for: "CPU" or "CUDA".
        load: loads the object, and returns why that cannot be, or None.
    """

    def __init__(self, name: str, namespace: str, device: str, load: Callable[[], str | None]) -> None:
        super().__init__(name)
        self.namespace, self.device = namespace, device
        self.missing = reason_not_to_load() or load()

    def find(self, operator: str) -> Kernel | None:
        """Return the object's kernel, if it was loaded and has one."""
        return None if self.missing else registered(self.namespace, operator, self.device)

    def unavailable(self) -> str | None:
        """Return why the object cannot be used, or None if it can."""
        return self.missing


def reason_not_to_load() -> str | None:
    """Return why no object can be used here, whichever, or None."""
    return SWITCHED_OFF if is_on("PROTOMEM_DISABLE_COMPILED") else _torch.too_old()


def why_not_built(name: str) -> str:
    """Return what setup.py noted about an object that it has not built: ``_C`` or ``_C_cuda``."""
    note = FOLDER / f"{name}.missing.txt"
    return f"it was not built: {note.read_text()}" if note.exists() else "it was not built"


def registered(namespace: str, operator: str, device: str) -> Kernel | None:
    """Return what an object has registered for an operator in its namespace, under the public operator's schema."""
    schema = str(getattr(torch.ops.protomem, operator).default._schema)
    if not hasattr(getattr(torch.ops, namespace), operator):
        _torch.library_of_process(namespace).library.define(schema.removeprefix("protomem::"))
    overload = getattr(getattr(torch.ops, namespace), operator).default
    kernel: Kernel | None = _torch.unwrapped(overload) if _torch.has_kernel(overload, device) else None
    return kernel
