"""The compiled parts: what they ask of PyTorch and of the machine, and what happens where they cannot be used."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from elftools.elf.elffile import ELFFile

import protomem_kernels as pmk
from protomem_kernels import _torch
from protomem_kernels.backends import cpu, cuda, native, reference
from protomem_kernels.backends.operators import OPERATORS, file_of
from protomem_kernels.cli.env import CHECKS
from tests.ops.test_registration import CALLS, named_calls

ROOT = Path(__file__).parents[2]
PACKAGE = Path(pmk.__file__).parent
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
needs_object = pytest.mark.skipif(cpu.OBJECT is None, reason=f"no compiled part: {cpu.BACKEND.unavailable()}")
needs_library = pytest.mark.skipif(cuda.BUILD is None, reason="no CUDA part")
needs_elf = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files, which only Linux has")


@needs_compiler
def test_it_is_there_where_there_is_a_compiler() -> None:
    if os.environ.get("PROTOMEM_DISABLE_COMPILED") == "1":
        pytest.skip(native.SWITCHED_OFF)
    assert cpu.BACKEND.unavailable() is None


# What it asks of PyTorch


def symbols(path: Path, table: str) -> tuple[set[str], set[str]]:
    """Return the undefined symbols of an object file, and the functions that it defines for others."""
    with path.open("rb") as file:
        found = list(ELFFile(file).get_section_by_name(table).iter_symbols())
    undefined = {symbol.name for symbol in found if symbol["st_shndx"] == "SHN_UNDEF"}
    functions = {
        symbol.name
        for symbol in found
        if symbol["st_info"]["type"] == "STT_FUNC" and symbol["st_info"]["bind"] != "STB_LOCAL"
    }
    return undefined, functions - undefined


def check_what_it_asks_of_torch(path: Path, libraries: set[str]) -> None:
    undefined, _ = symbols(path, ".dynsym")
    assert not [name for name in undefined if name.startswith(("Py", "_Py"))]
    assert any(name.startswith("aoti_torch_") for name in undefined)
    # at::, c10::, torch:: and caffe2:: as they are spelt in mangled names
    assert not [name for name in undefined if name.startswith("_Z") and re.search("2at|3c10|5torch|6caffe2", name)]
    assert not [name for name in undefined if re.match("cu[A-Z]|cuda", name)]
    with path.open("rb") as file:
        entries = list(ELFFile(file).get_section_by_name(".dynamic").iter_tags())
    needed = {entry.needed for entry in entries if entry.entry.d_tag == "DT_NEEDED"}
    assert {name for name in needed if re.search("torch|c10|cuda", name)} == libraries
    assert not [entry for entry in entries if entry.entry.d_tag in ("DT_RPATH", "DT_RUNPATH")]


def shown_functions(path: Path) -> set[str]:
    _, functions = symbols(path, ".dynsym")
    return {name for name in functions if not name.startswith(("_ZNSt", "_ZNKSt", "_ZSt"))} - {"_init", "_fini"}


@needs_object
@needs_elf
def test_it_uses_nothing_of_torch_but_the_stable_c_functions() -> None:
    check_what_it_asks_of_torch(cpu.OBJECT.path, {"libtorch_cpu.so"})
    assert cpu.OBJECT.oldest_torch == ".".join(map(str, _torch.OLDEST))


@needs_library
@needs_elf
def test_the_cuda_part_uses_nothing_of_torch_but_the_stable_c_functions() -> None:
    """Nor a CUDA runtime: it brings its own, whatever version torch has."""
    check_what_it_asks_of_torch(cuda.LIBRARY, {"libtorch_cpu.so", "libtorch_cuda.so"})


@needs_object
@needs_elf
def test_it_shows_nothing_of_its_own() -> None:
    assert shown_functions(cpu.OBJECT.path) == set()


@needs_library
@needs_elf
def test_the_cuda_part_shows_nothing_of_its_own() -> None:
    assert shown_functions(cuda.LIBRARY) == set()


@needs_object
@needs_elf
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_no_function_is_shared_between_instruction_sets(isa: str) -> None:
    """The linker keeps any one copy of an inline function: it must not be one that the machine cannot run."""
    folder = ROOT / "build" / f"cpu-{sysconfig.get_platform()}" / "CMakeFiles"
    path = folder / f"kernels_{isa}.dir" / "csrc/cpu/isa.cpp.o"
    if not path.exists():
        pytest.skip(f"there is no {path}")
    _, functions = symbols(path, ".symtab")
    assert any(f"kernels_{isa}" in name for name in functions)
    assert not [name for name in functions if isa not in name]


# What the dispatch sees


@needs_object
@pytest.mark.parametrize("name", cpu.BACKEND.kernels)
def test_schemas_equal_those_of_the_operators(name: str) -> None:
    ours, public = (str(getattr(space, name).default._schema) for space in (torch.ops.protomem_cpu, torch.ops.protomem))
    assert ours.replace("protomem_cpu::", "protomem::") == public


@needs_object
@pytest.mark.parametrize("call", CALLS)
def test_returns_what_the_reference_returns(call: str) -> None:
    name, args = named_calls()[call]
    if name not in cpu.BACKEND.kernels:
        pytest.skip(f"has no kernel for {name}")

    def shape(result: Any) -> Any:
        if result is None:
            return None
        if isinstance(result, torch.Tensor):
            return result.shape, result.dtype, result.is_contiguous()
        return type(result), [shape(tensor) for tensor in result]

    args = [arg.detach().clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
    assert shape(cpu.BACKEND.kernels[name](*copy.deepcopy(args))) == shape(reference.BACKEND.kernels[name](*args))


@needs_object
def test_refuses_what_is_not_on_the_cpu() -> None:
    tensors = torch.zeros(2), torch.zeros(2, device="meta")
    assert cpu.BACKEND.refuses("enqueue_", tensors) == "serves tensors on the CPU, got one on meta"
    assert cpu.BACKEND.refuses("enqueue_", tensors[:1]) is None


SCHEMAS = """
import ctypes, json, sys, torch
import protomem_kernels
from protomem_kernels.backends import cuda
from protomem_kernels.backends.native import registered
from protomem_kernels.backends.operators import OPERATORS
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)  # stands in for the library of that name in a torch with CUDA
torch.ops.load_library(cuda.LIBRARY)
print(json.dumps([
    [str(getattr(space, name).default._schema) for space in (torch.ops.protomem_cuda, torch.ops.protomem)]
    for name in OPERATORS if registered("protomem_cuda", name, "CUDA")
]))
"""


@needs_library
def test_the_cuda_part_loads_and_registers_the_operators() -> None:
    stub = ROOT / "build" / f"cuda-{sysconfig.get_platform()}" / "libtorch_cuda.so"
    if not stub.exists():
        pytest.skip(f"there is no {stub}")
    if torch.version.cuda is not None:
        pytest.skip("torch has CUDA: it is loaded already")
    for ours, public in run(SCHEMAS, str(stub)):
        assert ours.replace("protomem_cuda::", "protomem::") == public


@needs_library
@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA")
def test_the_cuda_part_says_that_torch_has_no_cuda() -> None:
    assert cuda.BACKEND.unavailable() == f"torch {torch.__version__} is a build without CUDA"
    assert pmk.explain("enqueue_")[0] == ("cuda", False, cuda.BACKEND.unavailable())


@pytest.mark.parametrize(
    ("architectures", "served", "refused"),
    [
        (["80", "90", "100"], [80, 86, 89, 90, 100, 103, 120], [70, 75]),
        (["90a"], [90], [80, 100, 120]),
        (["86"], [86, 89, 90, 120], [80]),
        (["100f"], [100, 103], [90, 120]),
    ],
)
def test_explain_tells_what_serves_a_gpu_that_is_not_there(
    architectures: list[str], served: list[int], refused: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "BUILD", cuda.Build("0", "nvcc", "2.13", architectures, [*map(file_of, OPERATORS)]))
    for arch in served:
        choices = pmk.explain("enqueue_", architecture=arch)
        assert choices[0] == ("cuda", True, None)
        assert [choice.chosen for choice in choices[1:]] == [False] * 4
    for arch in refused:
        first = pmk.explain("aggregate_prototypes", architecture=arch)[0]
        names = ", ".join(f"sm_{name}" for name in architectures)
        assert not first.chosen
        assert first.reason == f"it was built for {names} and newer (PROTOMEM_CUDA_ARCH_LIST), and this is sm_{arch}"
    assert pmk.explain("margin_softmax_loss", architecture=90)[0].backend == "triton"
    assert pmk.explain("enqueue_", architecture=90)[3] == ("cpu", False, "serves tensors on the CPU")
    assert pmk.explain("margin_softmax_logits", architecture=90)[0].backend == "triton"
    wide = pmk.explain("aggregate_prototypes", torch.zeros(2, 1025), architecture=served[0])
    assert wide[0].reason == "serves rows of at most 1024 columns, got (2, 1025)"
    monkeypatch.setattr(cuda, "BUILD", None)
    assert pmk.explain("enqueue_", architecture=90)[0].reason.startswith("it was not built")


def test_the_gradient_of_logits_is_no_row_that_is_too_wide() -> None:
    def tensors(dim: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        return [torch.empty(size, dtype=dtype, device="meta") for size in ((2, 5000), (2, dim), (5000, dim))]

    name = "margin_softmax_logits_backward"
    assert cuda.exceeds(name, tensors(1024)) is cuda.too_wide_for(name, tensors(512), 86) is None
    assert cuda.exceeds(name, tensors(1025)) == "serves rows of at most 1024 columns, got (2, 1025)"
    assert str(cuda.exceeds(name, tensors(8, torch.float64))).endswith("got float64")
    assert str(cuda.too_wide_for(name, tensors(513), 86)).startswith("more than 512 columns")
    assert cuda.too_wide_for(name, tensors(513), 90) is None


# Instruction sets


@pytest.fixture
def chosen_capability() -> Iterator[None]:
    before = cpu.OBJECT.capability()
    yield
    cpu.OBJECT.set_capability(before)


@needs_object
@pytest.mark.usefixtures("chosen_capability")
def test_every_instruction_set_computes_the_same_operators() -> None:
    names = cpu.OBJECT.capabilities()
    assert names == ["default", "avx2", "avx512"][: len(names)]
    for name in names:
        cpu.OBJECT.set_capability(name)
        assert cpu.OBJECT.capability() == name
        assert max(check("cpu") for check in CHECKS.values()) < 1e-5
    with pytest.raises(ValueError, match=f"capability must be one of {', '.join(names)}, got sse9"):
        cpu.OBJECT.set_capability("sse9")


def run(code: str, *arguments: str, path: Path = ROOT, **environment: str) -> Any:
    """Run a new interpreter with the package of ``path``; return the JSON that it prints last."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PROTOMEM", "COV"))}
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=inherited | {"PYTHONPATH": str(path)} | environment,
        cwd=path,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


CAPABILITY = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from protomem_kernels.backends import cpu
print(json.dumps([cpu.OBJECT.capability(), [[str(warning.message), warning.filename] for warning in caught]]))
"""


@needs_object
def test_the_environment_chooses_the_instruction_set() -> None:
    assert run(CAPABILITY, PROTOMEM_CPU_CAPABILITY="default") == ["default", []]


@needs_object
def test_an_instruction_set_that_this_machine_has_not_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROTOMEM_CPU_CAPABILITY", "avx512")
    monkeypatch.setattr(cpu.Object, "capabilities", lambda self: ["default"])
    monkeypatch.setattr(cpu, "OBJECT", cpu.OBJECT)
    message = r"PROTOMEM_CPU_CAPABILITY must be one of default \(what this machine and build offer\), got 'avx512'"
    with pytest.raises(ValueError, match=message):
        cpu._load()


# Where it cannot be used

FALLBACK = """
import json, sys, warnings
import torch
torch.__version__ = sys.argv[1]
x, labels = torch.randn(3, 4), torch.arange(3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import protomem_kernels as pmk
    from protomem_kernels.backends import cpu
    with pmk.use_backend("reference"):
        expected = pmk.aggregate_prototypes(x, labels).prototypes
    pmk.explain("aggregate_prototypes", x)
    quiet = len(caught)
    for _ in range(2):
        assert torch.equal(pmk.aggregate_prototypes(x, labels).prototypes, expected)
    try:
        pmk.use_backend("cpu").__enter__()
    except RuntimeError as problem:
        refusal = str(problem)
print(json.dumps({
    "unavailable": cpu.BACKEND.unavailable(),
    "explained": pmk.explain("aggregate_prototypes", x)[-2].reason,
    "refusal": refusal,
    "quiet": quiet,
    "warnings": [str(warning.message) for warning in caught],
    "places": [(warning.filename, warning.lineno) for warning in caught],
}))
"""


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """Return a folder with a copy of the package that has no object."""
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    return tmp_path


@pytest.mark.parametrize(
    ("file", "content", "torch_version", "reason"),
    [
        (None, "", torch.__version__, "it was not built; to build it, install again where there are torch"),
        ("_C.missing.txt", "there was no cake", torch.__version__, "it was not built: there was no cake; to build it"),
        ("_C.so", "not an object", torch.__version__, "it does not load: "),
        ("_C.so", "", "2.9.1+cpu", "it needs torch 2.10 or newer, and this is torch 2.9.1+cpu"),
    ],
    ids=["missing", "not built", "broken", "old torch"],
)
def test_the_reference_serves_and_the_reason_is_told_once(
    bare: Path, file: str | None, content: str, torch_version: str, reason: str
) -> None:
    if file is not None:
        (bare / PACKAGE.name / file).write_text(content)
    told = run(FALLBACK, torch_version, path=bare)
    assert told["unavailable"].startswith(reason)
    assert told["explained"] == told["unavailable"]
    assert f"cpu        {told['unavailable']}" in told["refusal"]
    assert told["quiet"] == 0
    assert len(told["warnings"]) == 1
    assert told["unavailable"] in told["warnings"][0]
    line = 1 + FALLBACK.splitlines().index(
        "        assert torch.equal(pmk.aggregate_prototypes(x, labels).prototypes, expected)"
    )
    assert told["places"] == [["<string>", line]]  # the caller's line, not the package's


def test_switched_off_is_silent() -> None:
    told = run(FALLBACK, torch.__version__, PROTOMEM_DISABLE_COMPILED="1")
    assert told["unavailable"] == told["explained"] == native.SWITCHED_OFF
    assert told["warnings"] == []


def test_the_warning_is_for_tensors_on_the_cpu_and_comes_once() -> None:
    absent = cpu.CpuBackend()
    absent.missing = "it is on holiday"
    absent.passed_over([torch.zeros(1, device="meta")])
    with pytest.warns(UserWarning, match=r"without its compiled part, by the slower reference: it is on holiday \("):
        absent.passed_over([torch.zeros(1)])
    absent.passed_over([torch.zeros(1)])


ENV = """
import json
from typer.testing import CliRunner
from protomem_kernels.cli.app import app
result = CliRunner(env={"COLUMNS": "500"}).invoke(app, ["env"])
print(json.dumps([result.exit_code, result.output]))
"""


@pytest.mark.filterwarnings("ignore")
def test_env_shows_the_reason(bare: Path) -> None:
    exit_code, output = run(ENV, path=bare)
    assert exit_code == 0
    assert "it was not built; to build it, install again where there are torch" in output


@needs_object
def test_env_shows_how_it_was_built() -> None:
    exit_code, output = run(ENV)
    assert exit_code == 0
    for word in (cpu.OBJECT.capability(), cpu.OBJECT.compiler, cpu.OBJECT.torch_version):
        assert word in output
    assert cpu.OBJECT.version == pmk.__version__


@pytest.mark.parametrize("notes", [None, "", "[]", '{"version": "1"}'])
def test_a_cuda_library_without_its_notes_is_as_good_as_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, notes: str | None
) -> None:
    """A copy of half of a build, which every import used to fail on."""
    (tmp_path / "_C_cuda.so").write_bytes(b"")
    if notes is not None:
        (tmp_path / "_C_cuda.json").write_text(notes)
    monkeypatch.setattr(cuda, "LIBRARY", tmp_path / "_C_cuda.so")
    assert cuda.read_build() is None
