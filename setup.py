"""Builds the compiled CPU part with CMake; everything else about the package is in pyproject.toml.

PROTOMEM_BUILD_CPU=auto (the default) builds it if that is possible here, and else installs without it and says why;
with 1 (the default of ``setup.py build_ext``) a failure is an error, with 0 it is left out.
PROTOMEM_BUILD_SANITIZE=address,undefined builds it with these sanitizers, in a build folder of its own.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import distributions
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

MODE = os.environ.get("PROTOMEM_BUILD_CPU", "1" if "build_ext" in sys.argv else "auto")
if MODE not in ("auto", "0", "1"):
    raise SystemExit(f"PROTOMEM_BUILD_CPU must be auto, 0 or 1, got {MODE}")
SANITIZE = os.environ.get("PROTOMEM_BUILD_SANITIZE", "")
NOTE = "_C.missing.txt"  # why there is no object, for protomem_kernels/compiled.py


class CannotBuildError(Exception):
    """Why the compiled part cannot be built here."""


def find_torch() -> tuple[Path, str]:
    """Return torch's folder and version, without importing it.

    pip hides the installed packages from an isolated build, but not where they are, and headers and library are all
    that is needed: by the stable ABI it does not matter which torch it is.
    """
    paths = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    for torch in distributions(name="torch", path=paths):
        folder = Path(str(torch.locate_file("torch")))
        if tuple(int(part) for part in torch.version.split(".")[:2]) < (2, 10):
            raise CannotBuildError(f"torch {torch.version} is older than 2.10, whose stable ABI it needs")
        if (folder / "include/torch/csrc/stable").is_dir():
            return folder, torch.version
    raise CannotBuildError("there was no torch; install torch first, and with uv or build use --no-build-isolation")


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


class BuildCpu(build_ext):
    """Runs CMake for the one extension; where that cannot be, leaves a note in place of the object."""

    def run(self) -> None:
        extension, inplace, reason = self.extensions[0], self.inplace, None
        try:
            super().run()
        except CannotBuildError as problem:
            if MODE == "1":
                raise SystemExit(f"the compiled CPU part cannot be built: {problem}") from problem
            reason = str(problem)
            print(f"protomem_kernels installs without its compiled CPU part: {reason}", file=sys.stderr)
        # Neither the object nor the note of an earlier build may stay.
        self.inplace = inplace  # which a failing super().run() leaves changed
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        note = target.with_name(NOTE)
        if reason is None:
            note.unlink(missing_ok=True)
        else:
            target.unlink(missing_ok=True)
            note.write_text(reason)
            self.distribution.ext_modules = []  # the wheel is a pure one

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        built = self.compile() / target.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # a process may have the old file mapped: never write into it
        shutil.copyfile(built, target)

    def compile(self) -> Path:
        """Run CMake in a folder that stays, so that the next build is incremental; return the folder."""
        if MODE == "0":
            raise CannotBuildError("PROTOMEM_BUILD_CPU=0 was set")
        torch, version = find_torch()
        cmake, ninja = find_tool("cmake", "CMAKE_BIN_DIR"), find_tool("ninja", "BIN_DIR")
        compilers = [os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++"]
        if not any(map(shutil.which, filter(None, compilers))):
            raise CannotBuildError("there was no C++ compiler")
        try:
            import pybind11
        except ImportError:
            raise CannotBuildError("there was no pybind11 in the build environment") from None
        kind = "cpu-sanitize" if SANITIZE else "cpu"
        folder = Path(__file__).resolve().parent / "build" / f"{kind}-{sysconfig.get_config_var('SOABI')}"
        options = {
            "CMAKE_MAKE_PROGRAM": ninja,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "TORCH_DIR": torch,
            "PROTOMEM_TORCH_VERSION": version,
            "PROTOMEM_VERSION": self.distribution.get_version(),
            "PROTOMEM_SANITIZE": SANITIZE,
        }
        configure = [cmake, "-G", "Ninja", "-S", str(Path(__file__).resolve().parent), "-B", str(folder)]
        try:
            subprocess.run([*configure, *(f"-D{key}={value}" for key, value in options.items())], check=True)
            subprocess.run([cmake, "--build", str(folder)], check=True)
        except subprocess.CalledProcessError as failure:
            raise CannotBuildError(f"the build failed (exit code {failure.returncode} of cmake)") from None
        return folder


class Wheel(bdist_wheel):
    """Tags the wheel for this Python and platform if it holds the object, and for any if it does not."""

    def run(self) -> None:
        self.run_command("build")
        self.skip_build = True
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


setup(
    ext_modules=[Extension("protomem_kernels._C", sources=[])],
    cmdclass={"build_ext": BuildCpu, "bdist_wheel": Wheel},
)
