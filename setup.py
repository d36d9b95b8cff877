"""Builds the two compiled parts with CMake; everything else about the package is in pyproject.toml.

The CPU part is ``_C``, the CUDA part ``_C_cuda``: plain libraries that know nothing of Python, so that one wheel serves
every version of it. PROTOMEM_BUILD_CPU and PROTOMEM_BUILD_CUDA are each one of

    auto   build it if that is possible here, and else install without it and say why (the default)
    1      build it, and a failure is an error (the default of ``setup.py build_ext`` for the CPU part)
    0      leave it out
    keep   leave it as an earlier build left it

The CUDA part needs nvcc (CUDACXX, the PyPI package nvidia-cuda-nvcc, or on the PATH), but no GPU. "auto" builds it only
where torch is a CUDA build, as no other can load it; "1" builds it in any case. PROTOMEM_CUDA_ARCH_LIST, such as
"80 90 100", are the compute capabilities that it gets machine code for; it gets PTX of the last one too, from which
drivers compile for newer GPUs. Unless set, "auto" takes those of the GPUs in this machine, and all three where there
are none, as "1" does.

What was not built leaves its reason in a note beside the package, which ``protomem env`` shows.
PROTOMEM_BUILD_SANITIZE=address,undefined builds the CPU part with these sanitizers, in a build folder of its own.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import Distribution, distributions
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SANITIZE = os.environ.get("PROTOMEM_BUILD_SANITIZE", "")
ARCHITECTURES = "80 90 100"
OLDEST_ARCHITECTURE = 80
# Where packages may be found that an isolated build does not see on its sys.path.
PATHS = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]


class CannotBuildError(Exception):
    """Why a compiled part cannot be built here."""


def mode(variable: str, default: str) -> str:
    value = os.environ.get(variable, default)
    if value not in ("auto", "0", "1", "keep"):
        raise SystemExit(f"{variable} must be auto, 0, 1 or keep, got {value}")
    return value


def find_torch() -> tuple[Path, str]:
    """Return torch's folder and version, without importing it.

    pip hides the installed packages from an isolated build, but not where they are, and headers and library are all
    that is needed: by the stable ABI it does not matter which torch it is.
    """
    for torch in distributions(name="torch", path=PATHS):
        folder = Path(str(torch.locate_file("torch")))
        if tuple(int(part) for part in torch.version.split(".")[:2]) < (2, 10):
            raise CannotBuildError(f"torch {torch.version} is older than 2.10, whose stable ABI it needs")
        if (folder / "include/torch/csrc/stable").is_dir():
            return folder, torch.version
    raise CannotBuildError("there was no torch; install torch first, and with uv or build use --no-build-isolation")


def cuda_of(torch: Path) -> str | None:
    """Return the CUDA version that torch was built with, without importing it; None: it is a build without CUDA."""
    found = re.search(r"^cuda\b[^=]*=\s*['\"]([^'\"]+)['\"]", (torch / "version.py").read_text(), re.MULTILINE)
    return found[1] if found else None


def find_architectures() -> str:
    """Return the compute capabilities of the GPUs here, ascending, or all that are served where there are none."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return ARCHITECTURES
    here = {int(line.replace(".", "")) for line in told.split() if re.fullmatch(r"\d+\.\d", line)}
    return " ".join(str(arch) for arch in sorted(here) if arch >= OLDEST_ARCHITECTURE) or ARCHITECTURES


def find_tool(name: str, folder_attribute: str) -> str:
    """Return the path of cmake or ninja: from this environment's PyPI package of that name, or on the PATH."""
    try:
        folder = getattr(importlib.import_module(name), folder_attribute, "")
    except ImportError:
        folder = ""
    found = shutil.which(os.path.join(folder, name))
    if found is None:
        raise CannotBuildError(f"there was no {name} in the build environment")
    return found


def require_compiler() -> None:
    compilers = [os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++"]
    if not any(map(shutil.which, filter(None, compilers))):
        raise CannotBuildError("there was no C++ compiler")


def files_of(package: Distribution) -> list[Path]:
    return [Path(str(package.locate_file(file))) for file in package.files or []]


def find_nvcc() -> Path:
    """Return the path of nvcc, all of whose parts can be run.

    The PyPI packages put their files into one common folder, which nvcc finds its way around in by itself; but some
    installers leave programs there that may not be executed.
    """
    if os.environ.get("CUDACXX"):
        return Path(os.environ["CUDACXX"])
    for package in distributions(name="nvidia-cuda-nvcc", path=PATHS):
        for nvcc in files_of(package):
            if nvcc.name in ("nvcc", "nvcc.exe") and nvcc.exists():
                for program in [*nvcc.parent.iterdir(), *(nvcc.parents[1] / "nvvm/bin").glob("*")]:
                    if program.is_file() and not os.access(program, os.X_OK):
                        program.chmod(program.stat().st_mode | 0o111)
                return nvcc
    found = shutil.which("nvcc")
    if found is None:
        raise CannotBuildError("there was no nvcc (pip install nvidia-cuda-nvcc, or a CUDA toolkit on the PATH)")
    return Path(found)


def run_cmake(sources: Path, folder: Path, options: dict[str, object]) -> None:
    """Configure and build in a folder that stays, so that the next build is incremental."""
    cmake, ninja = find_tool("cmake", "CMAKE_BIN_DIR"), find_tool("ninja", "BIN_DIR")
    require_compiler()
    configure = [cmake, "-G", "Ninja", "-S", str(sources), "-B", str(folder), f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    try:
        subprocess.run([*configure, *(f"-D{key}={value}" for key, value in options.items())], check=True)
        subprocess.run([cmake, "--build", str(folder)], check=True)
    except subprocess.CalledProcessError as failure:
        raise CannotBuildError(f"the build failed (exit code {failure.returncode} of cmake)") from None


class CpuPart(Extension):
    """``_C``: a plain library, loaded into torch."""

    label = "CPU"
    extras: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__("protomem_kernels._C", sources=[])
        self.mode = mode("PROTOMEM_BUILD_CPU", "1" if "build_ext" in sys.argv else "auto")

    def compile(self, version: str) -> Path:
        torch, torch_version = find_torch()
        kind = "cpu-sanitize" if SANITIZE else "cpu"
        folder = ROOT / "build" / f"{kind}-{sysconfig.get_platform()}"
        options = {
            "TORCH_DIR": torch,
            "PROTOMEM_TORCH_VERSION": torch_version,
            "PROTOMEM_VERSION": version,
            "PROTOMEM_SANITIZE": SANITIZE,
        }
        run_cmake(ROOT, folder, options)
        return folder


class CudaPart(Extension):
    """``_C_cuda``: another one, loaded into a torch that has CUDA; beside it how it was built."""

    label = "CUDA"
    extras = ("_C_cuda.json",)

    def __init__(self) -> None:
        super().__init__("protomem_kernels._C_cuda", sources=[])
        self.mode = mode("PROTOMEM_BUILD_CUDA", "auto")

    def compile(self, version: str) -> Path:
        torch, torch_version = find_torch()
        if self.mode == "auto" and cuda_of(torch) is None:
            raise CannotBuildError(
                f"torch {torch_version} is a build without CUDA, which cannot load it (PROTOMEM_BUILD_CUDA=1 builds it "
                "all the same)"
            )
        nvcc = find_nvcc()
        wanted = os.environ.get("PROTOMEM_CUDA_ARCH_LIST") or (
            find_architectures() if self.mode == "auto" else ARCHITECTURES
        )
        names = re.split(r"[\s,;]+", wanted.strip())
        if not all(re.fullmatch(r"\d+[af]?", name) for name in names):
            raise SystemExit(f'PROTOMEM_CUDA_ARCH_LIST must look like "80 90 100", got "{wanted}"')
        options = {
            "CMAKE_CUDA_COMPILER": nvcc,
            # The packages keep the runtime library in lib, and nvcc looks for it in lib64.
            "CMAKE_CUDA_FLAGS": f"-L{nvcc.resolve().parents[1] / 'lib'}",
            "CMAKE_CUDA_ARCHITECTURES": ";".join([*(f"{name}-real" for name in names[:-1]), names[-1]]),
            "TORCH_DIR": torch,
            "PROTOMEM_TORCH_VERSION": torch_version,
            "PROTOMEM_VERSION": version,
        }
        folder = ROOT / "build" / f"cuda-{sysconfig.get_platform()}"
        run_cmake(ROOT / "csrc/cuda", folder, options)
        return folder


class BuildParts(build_ext):
    """Runs CMake for each part; where one cannot be built, leaves a note in place of the object."""

    def run(self) -> None:
        built = [part for part in self.extensions if self.build_part(part)]
        self.distribution.ext_modules = built  # without any, the wheel is a pure one

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_part(self, part: CpuPart | CudaPart) -> bool:
        """Put the object, or the note, to where it belongs; neither that of an earlier build may stay."""
        target = Path(self.get_ext_fullpath(part.name))
        if part.mode == "keep":
            return target.exists()
        note = target.with_name(f"{part.name.split('.')[-1]}.missing.txt")  # backends/native.py reads it
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            if part.mode == "0":
                raise CannotBuildError(f"PROTOMEM_BUILD_{part.label}=0 was set for the build")
            folder = part.compile(self.distribution.get_version())
        except CannotBuildError as problem:
            if part.mode == "1":
                raise SystemExit(f"the compiled {part.label} part cannot be built: {problem}") from problem
            print(f"protomem_kernels installs without its compiled {part.label} part: {problem}", file=sys.stderr)
            for name in (target.name, *part.extras):
                target.with_name(name).unlink(missing_ok=True)
            note.write_text(str(problem))
            return False
        for name in (target.name, *part.extras):
            target.with_name(name).unlink(missing_ok=True)  # a process may have the old one mapped: never write into it
            shutil.copyfile(folder / name, target.with_name(name))
        note.unlink(missing_ok=True)
        return True


class Wheel(bdist_wheel):
    """Tags the wheel for this platform if it holds an object, for any if it holds none, and for every Python 3."""

    def run(self) -> None:
        self.run_command("build")
        self.skip_build = True
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


if __name__ == "__main__":  # as every installer runs it; the tests import it
    setup(
        ext_modules=[CpuPart(), CudaPart()],
        cmdclass={"build_ext": BuildParts, "bdist_wheel": Wheel},
    )
