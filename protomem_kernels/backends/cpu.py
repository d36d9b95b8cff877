"""The compiled C++ kernels for CPUs. Where they are not there, the reference serves the CPU, only slower.

The object is the Python module ``_C``. PROTOMEM_CPU_CAPABILITY=default|avx2|avx512, read at import, has it use these
instructions instead of the best ones that the machine has; one that it has not is an error.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from types import ModuleType

from torch import Tensor

from protomem_kernels._switches import value_of
from protomem_kernels._warnings import warn_caller
from protomem_kernels.backends.native import FOLDER, SWITCHED_OFF, NativeBackend, why_not_built

BUILD_IT = (
    "to build it, install again where there are torch and a C++ compiler: "
    "pip install --force-reinstall --no-deps --no-cache-dir protomem-kernels (or the path of its checkout)"
)
MODULE: ModuleType | None = None  # the object, if it was loaded


def _load() -> str | None:
    """Import the object; return why that cannot be, or None."""
    global MODULE
    if not any((FOLDER / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        others = sorted(path.name for path in FOLDER.glob("_C.*") if path.suffix in (".so", ".pyd"))
        reason = (
            f"it was built for another Python: {others[0]} is there, this one loads _C{EXTENSION_SUFFIXES[0]}"
            if others
            else why_not_built("_C")
        )
        return f"{reason}; {BUILD_IT}"
    try:
        MODULE = importlib.import_module("protomem_kernels._C")
    except Exception as problem:  # whatever it is, the reference works
        return f"it does not load: {problem}; {BUILD_IT}"
    offered = MODULE.capabilities()
    if wanted := value_of("PROTOMEM_CPU_CAPABILITY", offered, " (what this machine and build offer)"):
        MODULE.set_capability(wanted)
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
        if MODULE is None:
            return None
        return (
            f"{MODULE.capability()} (of {', '.join(MODULE.capabilities())}), by {MODULE.compiler} {MODULE.flags}, "
            f"against torch {MODULE.torch_version}, for {'.'.join(map(str, MODULE.target_abi))} and later"
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
