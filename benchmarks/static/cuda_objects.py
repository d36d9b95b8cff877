"""What nvcc made of the kernels of csrc/cuda: read out of the built library, which needs no GPU and runs nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from benchmarks.static.counting import INSTRUCTION, LOCAL, RESOURCES, TENSOR_CORES
from benchmarks.static.gpus import LIMITS, occupancy
from protomem_kernels.backends import cuda

SYSTEM_SHARED = 1024  # bytes that sm_90 and newer keep for themselves in a block that has any, and cuobjdump counts
TYPES = {"f": "fp32", "d": "fp64", "6__half": "fp16", "13__nv_bfloat16": "bf16"}
SHAPE = "INS0_5ShapeI"  # of a kernel on batch x memory (csrc/cuda/stream.cuh); its arguments are given in its place
ARGUMENT = re.compile(r"f|d|6__half|13__nv_bfloat16|Lb([01])E|Li(\d+)E")
LOADS = re.compile(r"LDG\b")
LOADS_16, STORES_16 = re.compile(r"LDG\..*\.128"), re.compile(r"STG.*\.128")
COPIES_16 = re.compile(r"LDGSTS.*\.128")
# What orders a thread's accesses among others', and its loads from global memory: ``CONSTANT`` ones go through a cache
# that is not coherent. CCTL.IVALL throws away what the multiprocessor's L1 cache holds.
ORDERING = re.compile(r"(BAR|MEMBAR|CCTL|ATOMG|LDG)\b")
IN_FILE = re.compile(r"arch = sm_(\d+)|Function (?:: )?(\w+)")


@dataclass(frozen=True)
class Compiled:
    """A kernel's machine code for one architecture."""

    name: str  # with its template arguments: sum_kernel<fp32, true>
    arch: int
    registers: int  # per thread
    stack: int  # bytes of local memory per thread
    shared: int  # bytes per block, static, without the system's own
    codes: Counter[str]  # instruction -> how often it stands in the code
    ordering: tuple[str, ...] = ()  # those of ``ORDERING``, as they follow one another

    def count(self, pattern: str | re.Pattern[str]) -> int:
        return sum(times for code, times in self.codes.items() if re.match(pattern, code))

    @property
    def spills(self) -> int:
        return self.count(LOCAL)


def cuobjdump() -> str | None:
    """Return the path of the tool: from its PyPI package, which brings nvdisasm beside it, or on the PATH."""
    try:
        for file in files("nvidia-cuda-cuobjdump") or []:
            path = Path(str(file.locate()))
            if path.name == "cuobjdump" and path.exists():
                path.chmod(path.stat().st_mode | 0o111)
                (path.parent / "nvdisasm").chmod(0o755)
                return str(path)
    except PackageNotFoundError:
        pass
    return shutil.which("cuobjdump")


def unavailable() -> str | None:
    """Return why nothing can be read here, or None."""
    if cuda.BUILD is None:
        return f"no CUDA part: {cuda.no_code_for(80)}"
    return None if cuobjdump() else "there is no cuobjdump (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)"


def readable(mangled: str) -> str:
    """Return a kernel's name with its template arguments.

    >>> readable("_ZN8protomem4cuda10sum_kernelI6__halfLb1EEEvNS_6MatrixE")
    'sum_kernel<fp16, true>'
    >>> readable("_ZN8protomem4cuda13logits_kernelINS0_5ShapeIfLi32ELi64ELi8ELi1ELi16ELi2ELb1EEEEEvNS0_6LogitsE")
    'logits_kernel<fp32, 32, 64, 8, 1, 16, 2, true>'
    """
    found = re.match(r"_ZN8protomem4cuda(?:12_GLOBAL__N_1)?(\d+)", mangled)
    if found is None:
        return mangled
    start, length = found.end(), int(found[1])
    name, rest = mangled[start : start + length], mangled[start + length :].replace(SHAPE, "I", 1)
    arguments, at = [], 1
    while rest.startswith("I") and (argument := ARGUMENT.match(rest, at)):
        flag, number = argument.groups()
        arguments.append(number or (("false", "true")[int(flag)] if flag else TYPES[argument[0]]))
        at = argument.end()
    return f"{name}<{', '.join(arguments)}>" if arguments else name


def read(library: Path = cuda.LIBRARY) -> list[Compiled]:
    """Return every kernel of the library on every architecture it has machine code for."""
    resources = {}
    for arch, function, text in _functions(library, "-res-usage"):
        registers, stack, shared, local = map(int, RESOURCES.search(text).groups())  # type: ignore[union-attr]
        resources[arch, function] = registers, stack + local, max(0, shared - (SYSTEM_SHARED if arch >= 90 else 0))
    found = []
    for arch, function, text in _functions(library, "-sass"):
        codes = [code for _, code in INSTRUCTION.findall(text)]
        ordering = tuple(code for code in codes if ORDERING.match(code))
        found.append(Compiled(readable(function), arch, *resources[arch, function], Counter(codes), ordering))
    return found


def _functions(library: Path, option: str) -> Iterable[tuple[int, str, str]]:
    command = [str(cuobjdump()), option, str(library)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    marks, arch = list(IN_FILE.finditer(text)), 0
    for mark, after in zip(marks, [*marks[1:], None], strict=True):
        if mark[1]:
            arch = int(mark[1])
        else:
            yield arch, mark[2], text[mark.end() : after.start() if after else len(text)]


def section(kernels: Iterable[Compiled], threads: dict[str, int]) -> str:
    """Return the report's part on them; ``threads`` of a block by kernel, from csrc/cuda."""
    by_name: dict[str, dict[int, Compiled]] = {}  # some are in two of the library's files
    for kernel in sorted(kernels, key=lambda kernel: (kernel.name, kernel.arch)):
        by_name.setdefault(kernel.name, {})[kernel.arch] = kernel
    architectures = " / ".join(f"sm_{arch}" for arch in sorted(set().union(*by_name.values())))
    rows = [
        "## The CUDA C++ kernels",
        f"From the library as built, for {architectures}; one number where they agree. **loads**, **stores**,\n"
        "**cp.async**: instructions that move 16 bytes, and all of their kind. **atomics**: on global memory, all of\n"
        "integers. **shared**: as declared in the source, without what a launch adds. Arguments of kernels on batch x\n"
        "memory: dtype; rows and columns of a warp; warps across and down; rows of a tile; tiles in flight; whether\n"
        "rows are read 16 bytes at a time.",
        "| kernel | registers | spills | shared, KiB | occupancy | 16-byte loads | 16-byte stores | cp.async |"
        " atomics | ldmatrix | tensor cores |\n|---|---|---|---|---|---|---|---|---|---|---|\n"
        + "\n".join(_row(name, list(found.values()), threads) for name, found in by_name.items()),
    ]
    return "\n\n".join(rows)


def _row(name: str, kernels: list[Compiled], threads: dict[str, int]) -> str:
    """Return a kernel's line, of its code for each architecture."""
    columns: list[Callable[[Compiled], object]] = [
        lambda kernel: kernel.registers,
        lambda kernel: kernel.spills,
        lambda kernel: f"{kernel.shared / 1024:.1f}",
        lambda kernel: _occupancy(kernel, threads),
        lambda kernel: f"{kernel.count(LOADS_16)} of {kernel.count(LOADS)}",
        lambda kernel: f"{kernel.count(STORES_16)} of {kernel.count('STG')}",
        lambda kernel: f"{kernel.count(COPIES_16)} of {kernel.count('LDGSTS')}",
        lambda kernel: kernel.count("ATOMG|RED|ATOM\\."),
        lambda kernel: kernel.count("LDSM"),
        lambda kernel: kernel.count(TENSOR_CORES) or "none",
    ]
    cells = [name]
    for column in columns:
        values = [str(column(kernel)) for kernel in kernels]
        cells.append(values[0] if len(set(values)) == 1 else " / ".join(values))
    return f"| {' | '.join(cells)} |"


def _occupancy(kernel: Compiled, threads: dict[str, int]) -> str:
    block = threads.get(kernel.name.split("<")[0])
    if shape := re.search(r"<\w+, \d+, \d+, (\d+), (\d+), ", kernel.name):
        block = 32 * int(shape[1]) * int(shape[2])
    if block is None or kernel.arch not in LIMITS:
        return ""
    share = occupancy(kernel.arch, registers=kernel.registers, shared=kernel.shared, warps=block // 32)
    return f"{100 * share:.0f} %"


def threads_of_blocks(sources: Path) -> dict[str, int]:
    """Return how many threads a block of each kernel has at most, as csrc/cuda declares it."""
    found = {}
    for file in sorted(sources.glob("*.cuh")):
        text = file.read_text(encoding="utf-8")
        numbers = dict(re.findall(r"(\w+_threads) = (\d+)", text))
        for threads, name in re.findall(r"KERNEL\((\w+)[^)]*\)\s+void (\w+)", text):
            if threads in numbers:
                found[name] = int(numbers[threads])
    return found
