"""CUDA kernels compiled for the CPU with g++, in three modes, as programs or as libraries that Python calls.

    kernels = build.load("wrappers.cpp", "race")     # tests/cuda_host/wrappers.cpp
    kernels.seed(3)
    kernels.call("warp_functions_int32", x, sums, maxima, before)

A test takes its mode from the fixture ``mode`` (modes.py). "plain" and "race" run in this process. "sanitized" needs
a process that starts with AddressSanitizer's runtime: test_sanitized.py runs the folder's files once more in such.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RUNTIME_SOURCES = ROOT / "csrc" / "cuda_host"
FOLDER = ROOT / "build" / "cuda_host"
COMPILER = os.environ.get("CXX", "").split(" ")[0] or "g++"
FLAGS = ["-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-fno-omit-frame-pointer", "-fPIC"]
# Hidden and unshared, so that several libraries, each with its runtime, live in one process.
FLAGS += ["-fvisibility=hidden", "-fno-gnu-unique", "-DPROTOMEM_HOST"]
# Calls instead of code at each access, and no second opinion on what is out of bounds: half the time to compile.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-sanitize=object-size,null,vptr"]
SANITIZE += ["--param=asan-instrumentation-with-call-threshold=0"]

# For all files, for the kernels alone, for the linker. The race check links no ThreadSanitizer: race.cpp stands in.
MODES: dict[str, tuple[list[str], list[str], list[str]]] = {
    "plain": ([], [], []),
    "sanitized": (SANITIZE, [], SANITIZE),
    "race": (["-DCUDA_HOST_RACE"], ["-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"], []),
}
RUNTIME = {mode: ["runtime.cpp", "where.cpp", *(["race.cpp"] if mode == "race" else [])] for mode in MODES}


def unavailable() -> str | None:
    """Return why nothing can be built here, or None."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"fibers are written for x86-64, this is {platform.machine()}"
    if shutil.which(COMPILER) is None:
        return f"there is no {COMPILER}"
    return None


def digest(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if Path(path).exists() else ""


def run(command: list[str]) -> None:
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode != 0 or process.stderr:  # warnings are errors
        raise RuntimeError(f"{' '.join(command)}\n{process.stderr}")


def record_of(target: Path) -> Path:
    return target.with_name(target.name + ".json")


def up_to_date(target: Path, command: list[str]) -> bool:
    record = record_of(target)
    if not target.exists() or not record.exists():
        return False
    known = json.loads(record.read_text())
    return known["command"] == command and all(digest(path) == known["files"][path] for path in known["files"])


def make(target: Path, command: list[str], files: list[str] | None = None) -> Path:
    """Run a command that makes `target` of `files` (default: what the compiler says it has read), if need be."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(target.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be making the same
        if not up_to_date(target, command):
            _make(target, command, files)
    return target


def _make(target: Path, command: list[str], files: list[str] | None) -> None:
    work = target.with_name(target.name + ".new")
    listed = work.with_name(work.name + ".d")
    dependencies = [] if files else ["-MMD", "-MF", str(listed)]
    run([*command, *dependencies, "-o", str(work)])
    if not files:
        files = listed.read_text().split(":", 1)[1].replace("\\\n", " ").split()
        listed.unlink()
    record_of(target).write_text(json.dumps({"command": command, "files": {path: digest(path) for path in files}}))
    work.replace(target)


def make_all(jobs: list[tuple[Path, list[str]]]) -> list[str]:
    """Make targets with their commands, as many at once as there are processors; return their names."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [str(target) for target in pool.map(lambda job: make(*job), jobs)]


def build(source: str, mode: str, *, program: bool = False) -> Path:
    """Compile tests/cuda_host/<source> and the runtime into a shared library or a program."""
    everywhere, kernels_alone, linker = MODES[mode]
    jobs = []
    for name in [source, *RUNTIME[mode]]:
        extra = kernels_alone if name == source else []
        command = [
            COMPILER,
            *FLAGS,
            *everywhere,
            *extra,
            "-c",
            str((RUNTIME_SOURCES if name in RUNTIME[mode] else HERE) / name),
        ]
        jobs.append((FOLDER / mode / f"{Path(name).stem}.o", command))
    objects = make_all(jobs)
    suffix, kind = (".exe", []) if program else (".so", ["-shared", "-Wl,-z,defs"])
    command = [COMPILER, *kind, *linker, *objects, "-ldl"]
    return make(FOLDER / mode / f"{Path(source).stem}{suffix}", command, objects)


class KernelError(RuntimeError):
    """What the runtime or the race check found wrong in a kernel."""


class Kernels:
    """The exported functions of a library."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))

    def seed(self, seed: int) -> None:
        """Shuffle the order of blocks and threads in later launches; 0 is the natural order."""
        self._library.cuda_host_seed(ctypes.c_uint64(seed))

    def call(self, name: str, *arguments: torch.Tensor | float | None) -> None:
        """Call a function with tensors as pointers (None: null), integers as int64_t and floats as double."""
        function = getattr(self._library, name)
        function.restype = ctypes.c_char_p
        fault = function(*[_convert(argument) for argument in arguments])
        if fault is not None:
            raise KernelError(fault.decode())


def _convert(argument: torch.Tensor | float | None) -> Any:
    if argument is None or isinstance(argument, torch.Tensor):
        if argument is not None and argument.device.type != "cpu":
            raise ValueError(f"tensors must be on the CPU, got one on {argument.device}")
        return ctypes.c_void_p(None if argument is None else argument.data_ptr())
    return ctypes.c_double(argument) if isinstance(argument, float) else ctypes.c_int64(argument)


@cache
def load(source: str, mode: str) -> Kernels:
    return Kernels(build(source, mode))
