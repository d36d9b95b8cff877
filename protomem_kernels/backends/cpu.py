"""The compiled C++ kernels for CPUs. Where they are not there, the reference serves the CPU, only slower.

The object is the plain library ``_C.so``, the same for every Python. PROTOMEM_CPU_CAPABILITY=default|avx2|avx512, read
at import, has it use these instructions instead of the best ones that the machine has; one that it has not is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from protomem_kernels import _torch
from protomem_kernels._switches import value_of
from protomem_kernels._warnings import warn_caller
from protomem_kernels.backends.native import FOLDER, SWITCHED_OFF, NativeBackend, why_not_built

LIBRARY = FOLDER / "_C.so"
BUILD_IT = (
    "to build it, install again where there are torch and a C++ compiler: "
    "pip install --force-reinstall --no-deps --no-cache-dir protomem-kernels (or the path of its checkout)"
)


class Object:
    """The library in this process: how it was built, and which instruction set is in use.

    Args:
        path: of the library, which is loaded into torch.

    Attributes:
        version: of this package, when it was built.
        compiler: that built it.
        flags: what the compiler was told.
        torch_version: whose headers it saw.
        oldest_torch: "2.10": the oldest one that it loads into.
    """

    def __init__(self, path: Path) -> None:
        torch.ops.load_library(path)
        self.path = path
        self.version, self.compiler, self.flags, self.torch_version, self.oldest_torch = _ask(
            "build() -> (str, str, str, str, str)"
        )

    def capabilities(self) -> list[str]:
        """Return the instruction sets that this machine can run, slowest first."""
        return str(_ask("capabilities() -> str")).split()

    def capability(self) -> str:
        """Return the instruction set in use."""
        return str(_ask("capability() -> str"))

    def set_capability(self, name: str) -> None:
        """Use another one of ``capabilities()``, in every thread."""
        if name not in self.capabilities():
            raise ValueError(f"capability must be one of {', '.join(self.capabilities())}, got {name}")
        _ask("set_capability(str name) -> ()", name)


OBJECT: Object | None = None  # if it was loaded


def _ask(schema: str, *arguments: str) -> Any:
    """Call one of the library's functions that are no operators; like them it has its schema from here."""
    functions, name = torch.ops.protomem_cpu, schema.partition("(")[0]
    if not hasattr(functions, name):
        _torch.library_of_process("protomem_cpu").library.define(schema)
    return getattr(functions, name)(*arguments)


def _load() -> str | None:
    """Load the library; return why that cannot be, or None."""
    global OBJECT
    if not LIBRARY.exists():
        return f"{why_not_built('_C')}; {BUILD_IT}"
    try:
        OBJECT = Object(LIBRARY)
    except Exception as problem:  # whatever it is, the reference works
        return f"it does not load: {problem}; {BUILD_IT}"
    if wanted := value_of("PROTOMEM_CPU_CAPABILITY", OBJECT.capabilities(), " (what this machine and build offer)"):
        OBJECT.set_capability(wanted)
    return None


class CpuBackend(NativeBackend):
    """The kernels of csrc/cpu."""

    def __init__(self) -> None:
        super().__init__("cpu", "protomem_cpu", "CPU", _load)
        self._has_warned = False

    def refuses(self, operator: str, tensors: Sequence[Tensor]) -> str | None:
        """Return why these tensors cannot be served, or None if they can."""
        for tensor in tensors:
            if not tensor.is_cpu:
                return f"serves tensors on the CPU, got one on {tensor.device}"
        return None

    def on_gpu(self, operator: str, tensors: Sequence[Tensor], architecture: int) -> str | None:
        """Return why no GPU can be served."""
        return "serves tensors on the CPU"

    def built(self) -> str | None:
        """Return the instruction sets, the compiler and the torch of the object, if it was loaded."""
        if OBJECT is None:
            return None
        return (
            f"{OBJECT.capability()} (of {', '.join(OBJECT.capabilities())}), by {OBJECT.compiler} {OBJECT.flags}, "
            f"against torch {OBJECT.torch_version}, for {OBJECT.oldest_torch} and later"
        )

    def passed_over(self, tensors: Sequence[Tensor]) -> None:
        """Say, once in a process, that a call on the CPU is slower than it need be; silent if that was asked for."""
        if self._has_warned or self.missing in (None, SWITCHED_OFF) or self.refuses("", tensors) is not None:
            return
        self._has_warned = True
        warn_caller(
            "protomem_kernels computes on the CPU without its compiled part, by the slower reference: "
            f"{self.missing} (PROTOMEM_DISABLE_COMPILED=1 silences this warning)"
        )


BACKEND = CpuBackend()
