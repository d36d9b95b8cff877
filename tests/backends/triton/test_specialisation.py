"""Every kernel for every kind of argument that Triton's launcher compiles anew for, as far as Triton's own code.

The launcher makes a constant of an integer that is 1, marks one that is a multiple of 16, takes 64 bits for one past
2^31 (a stride may be), and marks pointers on 16 bytes. Triton's interpreter does nothing of the kind, so this is where
a batch of one sample fails to compile, or a loop whose variable grows from 32 to 64 bits. No GPU is used, and no code
is generated.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.static.counting import intermediate, kernel_modules
from protomem_kernels.backends import chunked
from protomem_kernels.backends import triton as kernels
from protomem_kernels.backends.triton.specimens import Specimen

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.no_cover,
    pytest.mark.skipif(kernels.interpreted(), reason="compiles, which the interpreter cannot (TRITON_INTERPRET=1)"),
]
ARCH, DIM = 90, 512


def integers(specimen: Specimen) -> list[str]:
    """Return the arguments that are integers when the kernel is launched, and no compile-time ones."""
    found = []
    for parameter in specimen.kernel.params:
        fixed = specimen.constexprs.get(parameter.name)
        number = parameter.name in specimen.constexprs and type(fixed) is int
        if not parameter.is_constexpr and (number or specimen.signature.get(parameter.name) in ("i32", "i64")):
            found.append(parameter.name)
    return found


def options(specimen: Specimen) -> list[str]:
    """Return the pointers that may be None: the kernel, or what it calls, asks."""
    source = specimen.kernel.src
    return [
        name
        for name, kind in specimen.signature.items()
        if kind.startswith("*") and re.search(rf"\b{name} is (not )?None", source)
    ]


def as_launched(
    specimen: Specimen, ones: Iterable[str] = (), *, wide: bool = False, aligned: bool = False, without: str = ""
) -> Any:
    """Return what the launcher would compile for these arguments: ``ones`` are 1, strides of 64 bits if ``wide``."""
    from triton.compiler import ASTSource

    kinds = {name: "i64" if wide and name.startswith("stride") else "i32" for name in integers(specimen)}
    signature = specimen.signature | kinds | dict.fromkeys(ones, "constexpr")
    signature = {name: signature.get(name, "constexpr") for name in specimen.kernel.arg_names}
    constants = {name: value for name, value in specimen.constexprs.items() if signature[name] == "constexpr"}
    constants |= dict.fromkeys(ones, 1)
    if without:
        signature[without], constants[without] = "constexpr", None
    multiple = [["tt.divisibility", 16]]
    marked = [at for at, of in enumerate(signature.values()) if aligned and (of.startswith("*") or of == "i32")]
    return ASTSource(specimen.kernel, signature, constants, {(place,): multiple for place in marked})


def launches(specimen: Specimen, each: bool) -> Iterator[tuple[str, Any]]:
    """Yield what to compile: all kinds for all arguments and, if ``each``, for one at a time."""
    yield "nothing is known of any argument", as_launched(specimen)
    yield "every integer is a multiple of 16, every pointer aligned", as_launched(specimen, aligned=True)
    yield "every stride has 64 bits", as_launched(specimen, wide=True)
    yield "every integer is 1", as_launched(specimen, integers(specimen))
    if each:
        yield from ((f"{name} is 1", as_launched(specimen, [name])) for name in integers(specimen))
        yield from ((f"{name} is None", as_launched(specimen, without=name)) for name in options(specimen))


def refused(specimen: Specimen, each: bool = True) -> dict[str, str]:
    """Return of what does not compile Triton's words."""
    found = {}
    for name, source in launches(specimen, each):
        try:
            assert "tt.func" in intermediate(source, specimen, ARCH)
        except Exception as problem:
            found[name] = f"{type(problem).__name__}: {problem}"
    return found


def specimens(module: str, dtype: torch.dtype, dim: int) -> list[Specimen]:
    return importlib.import_module(module).specimens(ARCH, dtype, dim)


each_module = pytest.mark.parametrize(
    "module", kernel_modules(), ids=lambda module: module.split("backends.")[1].replace(".specimens", "")
)


@each_module
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_specialisation(module: str, dtype: torch.dtype) -> None:
    found = [
        f"{specimen.name}, {name}: {problem}"
        for specimen in specimens(module, dtype, DIM)
        for name, problem in refused(specimen, each=dtype == torch.bfloat16).items()
    ]
    assert not found, "\n".join(found)


@each_module
def test_specialisation_of_a_problem_of_one_sample_one_slot_and_one_column(module: str) -> None:
    for specimen in specimens(module, torch.float16, 1):
        intermediate(as_launched(specimen, integers(specimen)), specimen, ARCH)


def test_specialisation_knows_every_kernel_that_is_launched() -> None:
    """A launch is ``kernel[grid](...)``, in whatever file of the backends."""
    described = {id(specimen.kernel) for name in kernel_modules() for specimen in specimens(name, torch.bfloat16, DIM)}
    launched, unknown = 0, []
    folders = (kernels, chunked)
    for folder, file in ((of, file) for of in folders for file in sorted(Path(of.__file__).parent.glob("*.py"))):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launched += 1
                name = ast.unparse(node.func.value)
                module = importlib.import_module(f"{folder.__name__}.{file.stem}".removesuffix(".__init__"))
                if id(getattr(module, name, None)) not in described:
                    unknown.append(f"{file.name}:{node.lineno}: {name}")
    assert launched > 10
    assert not unknown


def planted(kernel: Any) -> Specimen:
    """Describe a kernel on floats, integers and a compile-time BLOCK."""
    kinds = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in kernel.arg_names if name != "BLOCK"}
    return Specimen(kernel.__name__, kernel, kinds, {"BLOCK": 16}, warps=1, stages=1)


def test_specialisation_finds_what_the_interpreter_does_not_show() -> None:
    from tests.backends.triton import planted_arguments as faulty

    assert not refused(planted(faulty.right))
    assert set(refused(planted(faulty.asks_a_constant))) == {"every integer is 1", "size is 1"}
    assert set(refused(planted(faulty.grows_in_a_loop))) == {"every stride has 64 bits"}
    assert set(refused(planted(faulty.needs_an_option))) == {"bias_ptr is None"}


def test_specialisation_varies_one_argument_at_a_time() -> None:
    from tests.backends.triton import planted_arguments as faulty

    specimen = planted(faulty.right)
    assert integers(specimen) == ["size", "stride"]
    assert options(specimen) == ["bias_ptr"]
    strided = replace(specimen, signature=specimen.signature | {"stride": "constexpr"}, constexprs={"stride": 1})
    assert integers(strided) == ["size", "stride"]  # how specimens say that rows are contiguous
    assert as_launched(strided).signature["stride"] == "i32"
    texts = {name: intermediate(source, specimen, ARCH) for name, source in launches(specimen, each=True)}
    assert len(set(texts.values())) == len(texts) == 7
    aligned = texts["every integer is a multiple of 16, every pointer aligned"]
    assert aligned.count("tt.divisibility = 16") == 5
    assert not any("divisibility" in text for text in texts.values() if text is not aligned)
    assert "%stride: i64" in texts["every stride has 64 bits"]
    assert "%size" not in texts["size is 1"]
    assert "%stride" in texts["size is 1"]
