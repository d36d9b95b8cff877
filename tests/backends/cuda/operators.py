"""The operators of csrc/cuda, launch code included, built so that they serve tensors on the CPU.

    operators = load("race")
    operators.seed(3)
    operators.kernels["enqueue_"](*state, ...)

``install(mode)`` makes them the backend "cuda" of this process, for the contract suites: tests/ops/cases.py does so if
PROTOMEM_CUDA_HOST_BACKEND names a mode.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from protomem_kernels.backends import cuda
from protomem_kernels.backends.choice import BACKENDS
from protomem_kernels.backends.native import registered
from protomem_kernels.backends.operators import OPERATORS
from protomem_kernels.backends.protocol import Backend
from tests.cuda_host import build

SOURCES = build.ROOT / "csrc" / "cuda"
TORCH = Path(torch.__file__).parent


def build_library(
    mode: str, sources: Path = SOURCES, folder: Path = build.FOLDER, namespace: str = "", flags: Sequence[str] = ()
) -> Path:
    """Compile every .cu file of a folder and the runtime into one library; its namespace is protomem_cuda_<mode>."""
    everywhere, kernels_alone, linker = build.MODES[mode]
    glue = ["-x", "c++", "-std=c++20", "-isystem", str(TORCH / "include"), "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    glue += [f"-DPROTOMEM_OPERATORS={namespace or f'protomem_cuda_{mode}'}"]
    jobs = []
    for source in sorted(sources.glob("*.cu")):
        command = [build.COMPILER, *build.FLAGS, *everywhere, *kernels_alone, *glue, *flags, "-c", str(source)]
        jobs.append((folder / mode / f"{source.stem}.cu.o", command))
    for name in build.RUNTIME[mode]:
        command = [build.COMPILER, *build.FLAGS, *everywhere, "-c", str(build.RUNTIME_SOURCES / name)]
        jobs.append((build.FOLDER / mode / f"{Path(name).stem}.o", command))
    objects = build.make_all(jobs)
    command = [build.COMPILER, "-shared", *linker, *objects, "-ldl", f"-L{TORCH / 'lib'}", "-ltorch_cpu"]
    return build.make(folder / mode / "operators.so", command, objects)


Kernels = dict[str, Callable[..., Any]]


class Operators(NamedTuple):
    """``kernels`` maps an operator's name to its function; ``seed`` sets the order of blocks and threads.

    ``launches`` is how many there have been.
    """

    kernels: Kernels
    seed: Callable[[int], None]
    launches: Callable[[], int]


def open_library(path: Path, namespace: str) -> Operators:
    torch.ops.load_library(path)
    library = ctypes.CDLL(str(path))
    library.cuda_host_launches.restype = ctypes.c_int64
    found = {name: registered(namespace, name, "CPU") for name in OPERATORS}
    kernels = {name: kernel for name, kernel in found.items() if kernel is not None}
    return Operators(
        kernels, lambda number: library.cuda_host_seed(ctypes.c_uint64(number)), library.cuda_host_launches
    )


@cache
def load(mode: str) -> Operators:
    return open_library(build_library(mode), f"protomem_cuda_{mode}")


class HostBackend(Backend):
    """These operators in the place of the backend "cuda"."""

    def refuses(self, operator: str, tensors: Sequence[torch.Tensor]) -> str | None:
        return cuda.exceeds(operator, tensors) if operator else None


def install(mode: str) -> None:
    """Have this process's backend "cuda" be these operators."""
    BACKENDS["cuda"] = HostBackend("cuda", load(mode).kernels)
