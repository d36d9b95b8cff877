"""Every kernel as shipped, compiled for real GPUs: no spills, no warnings, shared memory within limits, tensor cores,
wide offsets, no place that is loaded and stored without a barrier between.

No GPU is needed, and none is used: this is what the compiler makes, not what a GPU does with it.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks.static.counting import Count, kernel_modules
from benchmarks.static.gpus import LIMITS
from benchmarks.static.report import occupancy
from protomem_kernels.backends import chunked
from protomem_kernels.backends import triton as kernels
from protomem_kernels.backends.operators import OPERATORS, file_of
from protomem_kernels.backends.triton.launch import SHARED_MEMORY, Launch
from tests.benchmarks.static.counting import counted

pytest.importorskip("triton")
TENSOR_CORES = {80: "HMMA", 86: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
HALVES = ("bfloat16", "float16")


# Tiles are chosen with the newest Triton. What an older one spills of them (make triton-versions) costs time alone.
MOST_STACK = 0 if tuple(map(int, version("triton").split(".")[:2])) >= (3, 9) else 64


def faults(count: Count) -> Iterator[str]:
    """Yield what a shipped kernel must not be."""
    if count.stack > MOST_STACK or (count.spills and not MOST_STACK):
        yield f"{count.spills} spills, {count.stack} bytes of local memory"
    yield from (f"ptxas: {warning}" for warning in count.warnings if "bytes spill" not in warning)
    yield from count.unordered
    if count.shared > SHARED_MEMORY[count.arch]:
        yield f"{count.shared} bytes of shared memory"
    if not occupancy(count):
        yield "not one block fits"
    if not count.wide_offsets:
        yield "a stride is multiplied in 32 bits"
    if count.matrix_bound and not (count.bytes_per_tile and count.operations_per_tile):
        yield "a matrix-bound kernel that does not say what its tiles move and multiply"
    if count.matrix_bound and count.dtype in HALVES and not uses_tensor_cores(count):
        yield f"no {TENSOR_CORES[count.arch]}: {count.tensor_cores}"


def uses_tensor_cores(count: Count) -> bool:
    return any(code.startswith(TENSOR_CORES[count.arch]) for code in count.tensor_cores)


def check(module: str, jobs: list[tuple[int, str, int]], **options: bool) -> None:
    found = [
        f"{count.name}, sm_{count.arch}, {count.dtype}, D = {count.dim}: {fault}"
        for count in counted(module, *jobs, **options)
        for fault in faults(count)
    ]
    assert not found, "\n".join(found)


each_module = pytest.mark.parametrize(
    "module", kernel_modules(), ids=lambda module: module.split("backends.")[1].replace(".specimens", "")
)
# A compilation takes a second or two. What is left out here, float32 at the smaller sizes, the report shows.
ALL = [(arch, "bfloat16", 512) for arch in (80, 86, 90, 100)]
MATRIX_BOUND = [*itertools.product([80, 90, 100], ["bfloat16"], [128, 256]), (86, "float32", 512)]
MATRIX_BOUND += [(arch, "float32", 512) for arch in (80, 90, 100)]
MATRIX_BOUND += [(86, "float16", 128), (100, "float16", 128), (90, "float16", 512)]


@pytest.mark.slow
@each_module
def test_what_is_shipped(module: str) -> None:
    between_products = ".chunked." in module  # without products of their own: alike on every architecture
    check(module, ALL[1::2] if between_products else ALL)


@pytest.mark.slow
@each_module
def test_the_other_sizes_and_float32(module: str) -> None:
    check(module, MATRIX_BOUND, matrix_bound_only=True)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_report_shows_no_spills_and_no_narrow_offsets_of_ours(arch: int) -> None:
    report = (Path(__file__).parents[3] / "docs" / "static.md").read_text(encoding="utf-8")
    brief = [line.split("|")[4:7] for line in report.splitlines() if line.startswith(f"| {arch} | ours: ")]
    assert len(brief) > 20
    assert all(spills == "0" for cells in brief for _, spills, *_ in (cell.split(" / ") for cell in cells))
    rows = [line for line in report.splitlines() if line.startswith("| ours: ")]
    assert rows
    assert not [row for row in rows if "**32 bits**" in row]


def files_of_kernels() -> list[Path]:
    """Return the files that may launch a kernel."""
    return sorted([*Path(kernels.__file__).parent.glob("*.py"), *Path(chunked.__file__).parent.glob("*.py")])


def test_the_launch_table_knows_the_limits() -> None:
    assert {arch: SHARED_MEMORY[arch] for arch in LIMITS} == {arch: of.shared_per_block for arch, of in LIMITS.items()}


def test_every_launch_says_whether_products_and_sums_fuse() -> None:
    """Triton warns where a launch leaves it open, because its default is about to change; the tests compile fused."""
    launches, silent = 0, []
    for file in files_of_kernels():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launches += 1
                options = [keyword.arg or ast.unparse(keyword.value) for keyword in node.keywords]
                if not any("enable_fp_fusion" in option or option.endswith(".options()") for option in options):
                    silent.append(f"{file.name}:{node.lineno}")
    assert launches > 10
    assert not silent
    assert Launch(64, 64, 64, 64, 4, 2).options()["enable_fp_fusion"] is True


def test_every_operator_is_described() -> None:
    described = {f"protomem_kernels.backends.triton.specimens.{file_of(operator)}" for operator in OPERATORS}
    assert set() != described <= set(kernel_modules())
