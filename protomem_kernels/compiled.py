"""Loads the compiled CPU part, or says why it is not there: the reference then serves the CPU, only slower.

The object ``_C`` registers its operators with PyTorch as ``protomem_cpu::<name>``, with the schemas of
``protomem::<name>``; ``CPU_KERNELS`` is what the dispatch sees of them. Two environment variables are read at import:
PROTOMEM_DISABLE_COMPILED=1 does without the object, and PROTOMEM_CPU_CAPABILITY=default|avx2|avx512 has it use these
instructions instead of the best ones that the machine has.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from protomem_kernels import reference

SWITCHED_OFF = "switched off by PROTOMEM_DISABLE_COMPILED=1"
OLDEST_TORCH = (2, 10)  # whose stable ABI the object is compiled for (TORCH_TARGET_VERSION)
BUILD_IT = (
    "to build it, install again where there are torch and a C++ compiler: "
    "pip install --force-reinstall --no-deps --no-cache-dir protomem-kernels (or the path of its checkout)"
)


def torch_is_too_old() -> bool:
    """Say whether this torch is older than the stable ABI that the compiled parts use."""
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH


def _load() -> tuple[ModuleType | None, str | None]:
    """Return the object, or None and the reason."""
    if os.environ.get("PROTOMEM_DISABLE_COMPILED") == "1":
        return None, SWITCHED_OFF
    if torch_is_too_old():
        return None, f"it needs torch 2.10 or newer, and this is torch {torch.__version__}"
    folder = Path(__file__).parent
    if not any((folder / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        return None, f"{_why_not_built(folder)}; {BUILD_IT}"
    try:
        return importlib.import_module("protomem_kernels._C"), None
    except Exception as problem:  # whatever it is, the reference works
        return None, f"it does not load: {problem}; {BUILD_IT}"


def _why_not_built(folder: Path) -> str:
    others = sorted(path.name for path in folder.glob("_C.*") if path.suffix in (".so", ".pyd"))
    if others:
        return f"it was built for another Python: {others[0]} is there, this one loads _C{EXTENSION_SUFFIXES[0]}"
    note = folder / "_C.missing.txt"  # setup.py leaves it
    return f"it was not built: {note.read_text()}" if note.exists() else "it was not built"


def _registered_kernels() -> dict[str, Callable[..., Any]]:
    operators = torch.ops.protomem_cpu
    overloads = {name: getattr(operators, name).default for name in reference.KERNELS if hasattr(operators, name)}
    return {name: getattr(overload, "_op", overload) for name, overload in overloads.items()}  # one call less each


def _choose_capability(module: ModuleType, wanted: str) -> None:
    if wanted in module.capabilities():
        module.set_capability(wanted)
    else:
        offered = ", ".join(module.capabilities())
        warnings.warn(
            f"PROTOMEM_CPU_CAPABILITY={wanted} is ignored: this machine and build offer {offered}", stacklevel=2
        )


MODULE, _REASON = _load()
CPU_KERNELS = {} if MODULE is None else _registered_kernels()
if MODULE is not None and os.environ.get("PROTOMEM_CPU_CAPABILITY"):
    _choose_capability(MODULE, os.environ["PROTOMEM_CPU_CAPABILITY"])


def unavailable() -> str | None:
    """Return why the compiled part cannot be used, or None if it can."""
    return _REASON


def refuses(operator: str, tensors: Sequence[Tensor]) -> str | None:
    """Return why it cannot serve these tensors, or None if it can."""
    for tensor in tensors:
        if not tensor.is_cpu:
            return f"serves tensors on the CPU, got one on {tensor.device}"
    return None


def on_gpu(operator: str, tensors: Sequence[Tensor], architecture: int) -> str | None:
    """Return why it cannot serve a GPU."""
    return "serves tensors on the CPU"


_warned = False


def warn_once(tensors: Sequence[Tensor]) -> None:
    """Say, once in a process, that a call on CPU tensors is slower than it need be; silent if that was asked for."""
    global _warned
    if _warned or _REASON in (None, SWITCHED_OFF) or refuses("", tensors) is not None:
        return
    _warned = True
    warnings.warn(
        "protomem_kernels computes on the CPU without its compiled part, by the slower reference: "
        f"{_REASON} (PROTOMEM_DISABLE_COMPILED=1 silences this warning)",
        stacklevel=2,
    )
