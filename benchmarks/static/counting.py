"""Compile a kernel for an architecture, with no GPU, and count what the compiler made of it.

A kernel is compiled as Triton's launcher would compile it for contiguous tensors of an even size: pointers lie on 16
bytes, and what the specimen calls aligned is a multiple of 16 where the embedding size is one. The counts come from the
machine code, through the tools in Triton's wheel: what ``cuobjdump`` says about resources, and the instructions that
``nvdisasm`` lists. Triton keeps what it has compiled in its own cache, so a second run is quick.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import importlib
import io
import itertools
import multiprocessing
import os
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.static.ordering import unordered
from protomem_kernels.backends.chunked import specimens as of_chunked
from protomem_kernels.backends.triton import specimens as of_triton
from protomem_kernels.backends.triton.specimens import Specimen

DESCRIBED = (of_triton, of_chunked)  # folders whose modules describe kernels

TENSOR_CORES = re.compile(r"(HMMA|HGMMA|UTC\w*MMA|DMMA)\b")
LOCAL = re.compile(r"(LDL|STL)\b")
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
# What ptxas -v always says. Whatever else it says is a warning, though it calls some "info": a serialized wgmma is one.
PTXAS_INFO = re.compile(
    r"ptxas\S* info\s*: (\d+ bytes gmem|Compiling entry|Function properties for|Used \d+ registers|Compile time)"
    r"|\s*0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
)
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


class Job(NamedTuple):
    """The kernels of a module, all or the matrix-bound ones, for one architecture, dtype and embedding size."""

    module: str
    arch: int
    dtype: str
    dim: int
    matrix_bound_only: bool = False


@dataclass(frozen=True)
class Count:
    """What one kernel compiled to, and what its tiles do."""

    module: str
    name: str
    arch: int
    dtype: str
    dim: int
    warps: int
    stages: int
    registers: int  # per thread
    stack: int  # bytes of local memory per thread
    spills: int  # instructions that load from or store to local memory
    shared: int  # bytes per block, without the system's own
    tensor_columns: int  # of tensor memory, sm_100
    tensor_cores: dict[str, int]  # instruction -> how often it stands in the code
    exponentials: int  # instructions
    instructions: int
    wide_offsets: bool  # whether no stride or large size is multiplied in 32 bits
    warnings: list[str]  # of ptxas
    unordered: list[str]  # what is loaded and stored with no barrier between
    matrix_bound: bool
    bytes_per_tile: int
    operations_per_tile: int
    tiles: int
    least_bytes: int


def kernel_modules() -> list[str]:
    """Return the modules of the package that describe kernels; none is imported."""
    return [
        f"{folder.__name__}.{file.stem}"
        for folder in DESCRIBED
        for file in sorted(Path(folder.__file__).parent.glob("*.py"))
        if file.stem != "__init__"
    ]


def count_all(jobs: Iterable[Job], processes: int = 2) -> list[Count]:
    """Return the counts of every job, in order: counted in so many fresh processes, or, if that is one, in this one."""
    jobs = list(jobs)
    if processes == 1:
        return count_jobs(jobs)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        return [count for counts in pool.map(count_job, jobs) for count in counts]


def count_job(job: Job) -> list[Count]:
    """Return the counts of one job, in this process."""
    return count_jobs([job])


def count_jobs(jobs: Sequence[Job]) -> list[Count]:
    """Return the counts of the jobs, in order, in this process."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("a process with TRITON_INTERPRET=1 cannot compile")
    kernels = []
    cubins: dict[int, set[bytes]] = {}
    for job in jobs:
        for specimen in _specimens(job):
            compiled = compile_for(specimen, job.arch, job.dim)
            kernels.append((job, specimen, compiled))
            cubins.setdefault(job.arch, set()).add(compiled.asm["cubin"])
    codes = {arch: instructions(arch, [*found]) for arch, found in cubins.items()}
    return [_count(job, specimen, compiled, codes[job.arch]) for job, specimen, compiled in kernels]


def _specimens(job: Job) -> list[Specimen]:
    module = importlib.import_module(job.module)
    specimens: list[Specimen] = module.specimens(job.arch, getattr(torch, job.dtype), job.dim)
    return [specimen for specimen in specimens if specimen.matrix_bound or not job.matrix_bound_only]


def _count(job: Job, specimen: Specimen, compiled: Any, counted: dict[bytes, Counter[str]]) -> Count:
    registers, stack = resources(compiled.asm["cubin"])
    codes = counted[compiled.asm["cubin"]]
    matching = functools.partial(_matching, codes)
    return Count(
        module=job.module,
        arch=job.arch,
        dtype=job.dtype,
        dim=job.dim,
        name=specimen.name,
        warps=compiled.metadata.num_warps,
        stages=specimen.stages,
        registers=registers,
        stack=stack,
        spills=sum(matching(LOCAL).values()),
        shared=compiled.metadata.shared,
        tensor_columns=compiled.metadata.tmem_size or 0,
        tensor_cores=matching(TENSOR_CORES),
        exponentials=sum(matching(re.compile(r"MUFU\.EX2")).values()),
        instructions=sum(codes.values()),
        wide_offsets=not narrow_products(any_strides(specimen, job.arch)),
        warnings=warnings(compiled.metadata.ptxas_log),
        unordered=unordered(compiled.asm["ptx"], pointers(specimen)),
        matrix_bound=specimen.matrix_bound,
        bytes_per_tile=specimen.bytes_per_tile,
        operations_per_tile=specimen.operations_per_tile,
        tiles=specimen.tiles,
        least_bytes=specimen.least_bytes,
    )


def compile_for(specimen: Specimen, arch: int, dim: int) -> Any:
    """Return Triton's compiled kernel, with what ptxas said as ``metadata.ptxas_log``."""
    import triton
    from triton import knobs

    target, options = _target(specimen, arch)
    with knobs.runtime.scope(), knobs.compilation.scope():
        knobs.runtime.add_stages_inspection_hook = _keep_what_ptxas_says
        compiled = triton.compile(_source(specimen, dim), target=target, options=options)
        if not hasattr(compiled.metadata, "ptxas_log"):  # from the cache of a Triton whose key leaves the hook out
            knobs.compilation.always_compile = True
            compiled = triton.compile(_source(specimen, dim), target=target, options=options)
    return compiled


def _keep_what_ptxas_says(
    backend: Any = None, stages: dict[str, Any] | None = None, *_: Any, **__: Any
) -> tuple[str, str] | None:
    """Keep ptxas's words beside the kernel; Triton calls this without arguments for the cache's key."""
    from triton import knobs

    if stages is None:
        return "ptxas_log", "ptxas_log"
    assemble = stages["cubin"]

    def assemble_and_listen(ptx: str, metadata: dict[str, Any]) -> bytes:
        with knobs.nvidia.scope(), contextlib.redirect_stdout(io.StringIO()) as said:
            knobs.nvidia.dump_ptxas_log = True
            cubin: bytes = assemble(ptx, metadata)
        metadata["ptxas_log"] = said.getvalue()
        return cubin

    stages["cubin"] = assemble_and_listen
    return None


def warnings(ptxas_log: str) -> list[str]:
    """Return the lines of ``ptxas -v`` that are more than figures, spills included."""
    return [line.strip() for line in ptxas_log.splitlines() if line.strip() and not PTXAS_INFO.match(line)]


def pointers(specimen: Specimen) -> list[str]:
    """Return the arguments that the compiled kernel takes, in order; "" for what is no pointer."""
    kinds = {name: specimen.signature.get(name, "constexpr") for name in specimen.kernel.arg_names}
    return [name if kind.startswith("*") else "" for name, kind in kinds.items() if kind != "constexpr"]


def any_strides(specimen: Specimen, arch: int) -> str:
    """Return Triton's intermediate code of the kernel for tensors of any layout: no stride is known to be 1."""
    strides = [name for name, value in specimen.constexprs.items() if "stride" in name and value == 1]
    free = replace(
        specimen,
        signature=specimen.signature | dict.fromkeys(strides, "i32"),
        constexprs={name: value for name, value in specimen.constexprs.items() if name not in strides},
    )
    return intermediate(_source(free, dim=1), specimen, arch)


def intermediate(source: Any, specimen: Specimen, arch: int) -> str:
    """Return Triton's intermediate code of ``source``, launched as ``specimen`` is; nothing machine-specific is run."""
    from triton._C.libtriton import ir
    from triton.compiler import make_backend

    target, given = _target(specimen, arch)
    backend = make_backend(target)
    options = backend.parse_options(given)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    return str(stages["ttir"](source.make_ir(target, options, functions, modules, context), {}))


def _target(specimen: Specimen, arch: int) -> tuple[Any, dict[str, Any]]:
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": specimen.warps, "num_stages": specimen.stages, "enable_fp_fusion": True}
    return GPUTarget("cuda", arch, 32), options


def _source(specimen: Specimen, dim: int) -> Any:
    from triton.compiler import ASTSource

    signature = {name: specimen.signature.get(name, "constexpr") for name in specimen.kernel.arg_names}
    multiples = [
        place
        for place, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (name in specimen.aligned and kind != "constexpr" and dim % 16 == 0)
    ]
    attributes = {(place,): [["tt.divisibility", 16]] for place in multiples}
    return ASTSource(specimen.kernel, signature, specimen.constexprs, attributes)


def _matching(codes: Counter[str], pattern: re.Pattern[str]) -> dict[str, int]:
    return {code: times for code, times in sorted(codes.items()) if pattern.match(code)}


def resources(cubin: bytes) -> tuple[int, int]:
    """Return the registers and the bytes of local memory that a thread takes."""
    found = RESOURCES.search(_tool("cuobjdump", ["-res-usage"], cubin))
    assert found is not None
    registers, stack, _, local = map(int, found.groups())
    return registers, stack + local


def instructions(arch: int, cubins: Sequence[bytes]) -> dict[bytes, Counter[str]]:
    """Return for each cubin how often every instruction stands in its code; where branches lead is not looked into.

    The disassembler takes a quarter of a second to start, whatever it is given: so it is given all code at once.
    """
    codes = [_code(cubin) for cubin in cubins]
    ends = [*itertools.accumulate(map(len, codes))]
    counts = [Counter[str]() for _ in cubins]
    for address, code in INSTRUCTION.findall(_tool("nvdisasm", ["-ndf", "--binary", f"SM{arch}"], b"".join(codes))):
        counts[bisect.bisect_right(ends, int(address, 16))][code] += 1
    return dict(zip(cubins, counts, strict=True))


def _code(cubin: bytes) -> bytes:
    """Return what can be executed: those sections of an ELF file of 64 bits, one after the other."""
    (start,) = struct.unpack_from("<Q", cubin, 0x28)
    size, number = struct.unpack_from("<2H", cubin, 0x3A)
    sections = [struct.unpack_from("<2I4Q", cubin, start + size * place) for place in range(number)]
    executable = 4  # SHF_EXECINSTR
    return b"".join(cubin[at : at + length] for _, _, flags, _, at, length in sections if flags & executable)


def _tool(name: str, options: Sequence[str], cubin: bytes) -> str:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [getattr(knobs.nvidia, name).path, *options, str(file)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def narrow_products(ttir: str) -> list[str]:
    """Return the lines of Triton's intermediate code that multiply by a stride or a large size in 32 bits.

    ``slot * stride`` passes 2**31 long before a GPU's memory is full, so one of the two has to be 64 bits wide first.
    A 32-bit stride stays one through ``splat`` and ``broadcast``, and stops being one at ``extsi``.
    """
    narrow = set(re.findall(r"(%\w*stride\w*|%dim|%capacity|%width): i32", ttir))
    found = []
    for line in ttir.splitlines():
        match = re.match(r"\s*(%\w+) = ([\w.]+) (%\w+)(?:, (%\w+))?", line)
        if match is None:
            continue
        result, operation, *operands = match.groups()
        if narrow.intersection(operands):
            if operation in ("tt.splat", "tt.broadcast", "tt.expand_dims"):
                narrow.add(result)
            elif operation == "arith.muli":
                found.append(line.strip())
    return found
