"""Building and installing: the compiled parts where they can be built, else a plain package; and what the sdist has."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")


def compile_kernels(compiler: str, to: Path) -> None:
    flags = ["-std=c++20", "-O2", "-fPIC", "-Wall", "-Wextra", "-Werror", "-DPROTOMEM_ISA=baseline"]
    process = subprocess.run(
        [compiler, *flags, "-c", ROOT / "csrc/cpu/isa.cpp", "-o", to / "isa.o"], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr


@needs_compiler
@pytest.mark.slow
def test_kernels_compile_without_any_instruction_set(tmp_path: Path) -> None:
    compile_kernels(COMPILER, tmp_path)


@pytest.mark.slow
def test_kernels_compile_for_arm(tmp_path: Path) -> None:
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("there is no aarch64-linux-gnu-g++")
    compile_kernels(compiler, tmp_path)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the sources, so that builds leave the tree alone."""
    copied = tmp_path_factory.mktemp("build") / "checkout"
    hidden = (".git", ".venv", ".*_cache", ".hypothesis", ".benchmarks", ".coverage*")
    leave = shutil.ignore_patterns(*hidden, "build", "dist", "runs", "shared", "*.egg-info", "__pycache__", "_C*")
    shutil.copytree(ROOT, copied, ignore=leave)
    return copied


def build(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a build, of the CPU part alone unless more is asked for: the CUDA part takes minutes."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PROTOMEM")}
    inherited["PROTOMEM_BUILD_CUDA"] = "0"
    return subprocess.run(
        [sys.executable, *arguments], cwd=checkout, env=inherited | environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"PATH": "/nowhere", "CXX": ""}, "there was no C++ compiler"),
        ({"PROTOMEM_BUILD_CPU": "0"}, "PROTOMEM_BUILD_CPU=0 was set for the build"),
        ({"CXX": "/bin/false"}, "the build failed"),
    ],
    ids=["no compiler", "not wanted", "failure"],
)
def test_a_pure_python_wheel_where_it_cannot_be_built(
    checkout: Path, tmp_path: Path, environment: dict[str, str], reason: str
) -> None:
    process = build(checkout, "setup.py", "-q", "bdist_wheel", "-d", str(tmp_path), **environment)
    assert process.returncode == 0, process.stderr
    assert f"installs without its compiled CPU part: {reason}" in process.stderr
    (wheel,) = tmp_path.iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("protomem_kernels/_C.missing.txt").decode().startswith(reason)
        assert not [name for name in archive.namelist() if name.endswith(".so")]


def test_the_plain_package_installs_and_says_what_it_lacks(checkout: Path, tmp_path: Path) -> None:
    """Two wheels' worth of reasons in one place: what pip does not say, ``protomem env`` does."""
    nowhere = {"PATH": "/nowhere", "CXX": ""}
    process = build(checkout, "setup.py", "-q", "bdist_wheel", "-d", str(tmp_path), **nowhere)
    assert process.returncode == 0, process.stderr
    (wheel,) = tmp_path.glob("*.whl")
    told = backends_shown_by_env(install(wheel, tmp_path))
    assert told["cpu"].startswith("no it was not built: there was no C++ compiler; to build it")
    assert told["cuda"].startswith("no it was not built: PROTOMEM_BUILD_CUDA=0 was set for the build; to build it")
    assert told["reference"] == "yes"


def test_a_build_that_was_asked_for_must_succeed(checkout: Path, tmp_path: Path) -> None:
    process = build(
        checkout, "setup.py", "bdist_wheel", "-d", str(tmp_path), PATH="/nowhere", CXX="", PROTOMEM_BUILD_CPU="1"
    )
    assert process.returncode != 0
    assert "the compiled CPU part cannot be built: there was no C++ compiler" in process.stderr


def test_the_cuda_part_is_left_out_where_it_cannot_be_built(checkout: Path, tmp_path: Path) -> None:
    nowhere = {"PATH": "/nowhere", "CXX": "", "CUDACXX": "/nowhere/nvcc"}
    process = build(
        checkout, "setup.py", "-q", "bdist_wheel", "-d", str(tmp_path), PROTOMEM_BUILD_CUDA="auto", **nowhere
    )
    assert process.returncode == 0, process.stderr
    reason = "there was no C++ compiler"
    if torch.version.cuda is None:
        reason = (
            f"torch {torch.__version__} is a build without CUDA, which cannot load it (PROTOMEM_BUILD_CUDA=1 builds"
        )
    assert f"installs without its compiled CUDA part: {reason}" in process.stderr
    (wheel,) = tmp_path.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("protomem_kernels/_C_cuda.missing.txt").decode().startswith(reason)
    process = build(checkout, "setup.py", "build", PROTOMEM_BUILD_CPU="0", PROTOMEM_BUILD_CUDA="1", **nowhere)
    assert process.returncode != 0
    assert "the compiled CUDA part cannot be built: there was no C++ compiler" in process.stderr


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    spec = importlib.util.spec_from_file_location("protomem_setup", ROOT / "setup.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


@pytest.mark.parametrize(
    ("line", "cuda"),
    [
        ("cuda: Optional[str] = None", None),
        ("cuda: Optional[str] = '13.0'", "13.0"),
        ('cuda = "12.8"', "12.8"),
        ("hip: Optional[str] = '6.2'", None),
    ],
)
def test_a_cuda_build_of_torch_is_told_by_its_version_file(
    setup_py: ModuleType, tmp_path: Path, line: str, cuda: str | None
) -> None:
    (tmp_path / "version.py").write_text(f"__all__ = ['__version__', 'cuda']\n__version__ = '2.11.0+cu130'\n{line}\n")
    assert setup_py.cuda_of(tmp_path) == cuda


def test_torch_here_is_told_right(setup_py: ModuleType) -> None:
    folder, version = setup_py.find_torch()
    assert (setup_py.cuda_of(folder), version) == (torch.version.cuda, torch.__version__)


@pytest.mark.parametrize(
    ("said", "architectures"),
    [("9.0\n8.0\n9.0", "80 90"), ("12.0", "120"), ("7.5", "80 90 100"), ("No devices were found", "80 90 100")],
)
def test_the_gpus_here_are_what_auto_builds_for(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, architectures: str
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{said}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert setup_py.find_architectures() == architectures


def test_without_gpus_it_is_all_that_are_served(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert setup_py.find_architectures() == setup_py.ARCHITECTURES == "80 90 100"


@needs_compiler
def test_a_list_of_architectures_is_checked(checkout: Path) -> None:
    given = {"PROTOMEM_BUILD_CPU": "0", "PROTOMEM_BUILD_CUDA": "1", "PROTOMEM_CUDA_ARCH_LIST": "8.0+PTX"}
    process = build(checkout, "setup.py", "build", CUDACXX="/nowhere/nvcc", **given)
    assert process.returncode != 0
    assert 'PROTOMEM_CUDA_ARCH_LIST must look like "80 90 100", got "8.0+PTX"' in process.stderr


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="nvcc comes in packages for Linux")
def test_nvcc_is_found_in_its_package_and_made_to_run(checkout: Path, tmp_path: Path) -> None:
    """Some installers leave programs without the permission to be executed."""
    programs = [
        tmp_path / "nvidia/cu13/bin/nvcc",
        tmp_path / "nvidia/cu13/bin/ptxas",
        tmp_path / "nvidia/cu13/nvvm/bin/cicc",
    ]
    for program in programs:
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text("#!/bin/sh\nexit 1\n")
        program.chmod(0o644)
    metadata = tmp_path / "nvidia_cuda_nvcc-99.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: nvidia-cuda-nvcc\nVersion: 99\n")
    (metadata / "RECORD").write_text("nvidia/cu13/bin/nvcc,,\n")
    process = build(
        checkout,
        "setup.py",
        "build",
        PROTOMEM_BUILD_CPU="0",
        PROTOMEM_BUILD_CUDA="1",
        CUDACXX="",
        PYTHONPATH=str(tmp_path),
    )
    assert "the compiled CUDA part cannot be built: the build failed" in process.stderr  # this nvcc cannot do more
    assert all(os.access(program, os.X_OK) for program in programs)


def install(wheel: Path, folder: Path) -> Path:
    """Install a wheel into an empty environment that sees this one's torch; return its Python."""
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = venv / "bin/python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(pip, check=True)
    (site,) = (venv / "lib").glob("python*/site-packages")
    (site / "torch_and_pytest.pth").write_text(sysconfig.get_path("purelib"))
    return python


def backends_shown_by_env(python: Path) -> dict[str, str]:
    """Run ``protomem env`` there; return each backend's line: whether it is available, why not, how it was built."""
    code = "import sys; sys.argv[1:] = ['env']; from protomem_kernels.cli import main; main()"
    process = subprocess.run(
        [python, "-c", code], cwd=python.parent, env={"PATH": "", "COLUMNS": "600"}, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout + process.stderr
    _, _, table = process.stdout.partition("in the order of preference")
    lines = [line.split() for line in table.partition("self-check")[0].splitlines() if line]
    told = {name: " ".join(rest) for name, *rest in lines}
    assert {"cuda", "triton", "cpu", "reference"} <= told.keys()
    return told


@pytest.fixture(scope="module")
def built(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the sdist, and the wheel that was built from it.

    It is seen that nothing is missing and that the wheel can be used. What the compiler makes of the kernels with all
    its optimisations, which take most of its time, every other test sees in the object of the checkout.
    """
    folder = tmp_path_factory.mktemp("dist")
    wanted = {"PROTOMEM_BUILD_CPU": "1", "CMAKE_BUILD_TYPE": "None", "CXXFLAGS": "-O1"}
    process = build(checkout, "-m", "build", "--no-isolation", "--outdir", str(folder), **wanted)
    assert process.returncode == 0, process.stdout + process.stderr
    return folder


@needs_compiler
@pytest.mark.slow
def test_the_wheel_works_elsewhere(built: Path, tmp_path: Path) -> None:
    """Install the wheel where there is no compiler, and run a contract suite on it there."""
    (wheel,) = built.glob("*.whl")
    assert re.search(r"-py3-none-(?!any)\w+\.whl$", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "protomem_kernels/_C.so" in names
    assert not [name for name in names if name.startswith(("csrc", "tests", "setup", "benchmarks"))]

    python = install(wheel, tmp_path)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(ROOT / "tests", elsewhere / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", elsewhere)
    show = (
        "import json, protomem_kernels; from protomem_kernels.backends import cpu; "
        "print(json.dumps([str(cpu.OBJECT.path), *cpu.BACKEND.kernels]))"
    )
    shown = subprocess.run(
        [python, "-c", show], cwd=elsewhere, env={"PATH": ""}, capture_output=True, text=True, check=True
    )
    file, *kernels = json.loads(shown.stdout)
    assert Path(file).is_relative_to(python.parents[1])
    assert "aggregate_prototypes" in kernels
    told = backends_shown_by_env(python)
    assert told["cpu"].startswith("yes built default" if "avx2" not in told["cpu"] else "yes built avx")
    assert told["cuda"].startswith("no it was not built: PROTOMEM_BUILD_CUDA=0 was set for the build")
    contract = [python, "-m", "pytest", "-q", "-k", "cpu", "tests/ops/test_aggregate_prototypes.py"]
    result = subprocess.run(contract, cwd=elsewhere, env={"PATH": ""}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"\d+ passed", result.stdout)


@needs_compiler
@pytest.mark.slow
def test_the_sdist_holds_what_its_tests_need(built: Path, checkout: Path) -> None:
    """Every file of the checkout, but what was built or is git's own."""
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    made = ("build", "dist", "protomem_kernels.egg-info")
    needed = {
        path.relative_to(checkout).as_posix()
        for path in checkout.rglob("*")
        if path.is_file() and path.suffix != ".pyc" and path.relative_to(checkout).parts[0] not in made
    }
    needed -= {name for name in needed if name.startswith("protomem_kernels/_C") or name == ".gitignore"}
    assert needed - held == set()
    assert {".clang-format", "Makefile", "docs/static.md", "benchmarks/quick.py", "examples/custom_loop.py"} <= held
