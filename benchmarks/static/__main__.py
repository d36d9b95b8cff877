"""``python -m benchmarks.static``: compile and count; write the report, or print the counts as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import json
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from benchmarks.static import cuda_objects, report
from benchmarks.static.counting import Job, count_all, kernel_modules

PEERS = ["benchmarks.static.cut_cross_entropy", "benchmarks.static.liger_kernel"]
ARCHS, DTYPES, DIMS = [80, 90, 100], ["bfloat16", "float32"], [128, 256, 512]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--output", type=Path, help="write the report on every kernel into this folder")
    what.add_argument("--count", nargs="+", metavar="MODULE:ARCH:DTYPE:DIM", help="print these counts as JSON")
    parser.add_argument("--matrix-bound-only", action="store_true", help="of --count: leave the other kernels out")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    if find_spec("triton") is None:
        sys.exit("error: triton is not installed (pip install triton; it exists for Linux)")
    if args.count:
        jobs = [
            Job(module, int(arch), dtype, int(dim), args.matrix_bound_only)
            for module, arch, dtype, dim in map(_parts, args.count)
        ]
        json.dump([dataclasses.asdict(count) for count in count_all(jobs, args.processes)], sys.stdout)
    else:
        _report(args.output, args.processes)


def _parts(job: str) -> list[str]:
    return job.split(":")


def _report(folder: Path, processes: int) -> None:
    missing = [name for name in PEERS if _is_missing(name)]
    peers = [name for name in PEERS if name not in missing]
    notes = [f"{_name(name)}: not installed (pip install --no-deps {_name(name)})" for name in missing]
    if PEERS[1] in peers:
        notes.append(_about_liger(max(DIMS)))
    jobs = [  # the kernels that form no products hardly change with the size
        Job(module, arch, dtype, dim, matrix_bound_only=dim != max(DIMS))
        for module, arch, dtype, dim in itertools.product([*kernel_modules(), *peers], ARCHS, DTYPES, DIMS)
    ]
    counts = count_all(jobs, processes)
    versions = ", ".join([f"triton {version('triton')}", *(f"{_name(name)} {version(_name(name))}" for name in peers)])
    more = []
    if (reason := cuda_objects.unavailable()) is None:
        threads = cuda_objects.threads_of_blocks(Path(__file__).parents[2] / "csrc" / "cuda")
        more.append(cuda_objects.section(cuda_objects.read(), threads) + "\n")
    else:
        notes.append(f"The CUDA C++ kernels are missing: {reason}")
    for path in report.write(folder, counts, notes, versions, more):
        print(path)


def _is_missing(module: str) -> bool:
    package = getattr(importlib.import_module(module), "PACKAGE", None)
    return package is not None and find_spec(package) is None


def _name(module: str) -> str:
    return module.rsplit(".", 1)[1].replace("_", "-")


def _about_liger(dim: int) -> str:
    from benchmarks.static.liger_kernel import chunks
    from protomem_kernels.backends.triton.specimens import CENTRE

    parts, once = chunks(dim), CENTRE[1] * dim * 2 / 1e9
    return (
        f"liger-kernel: its kernel works on logits in memory. `torch.mm` makes them, in {parts} chunks of rows at\n"
        f"  D = {dim}, and reads W twice for each: {2 * parts * once:.1f} GB in bfloat16, where one pass over W is\n"
        f"  {once:.2f} GB. That comes on top of the kernel's own time below."
    )


if __name__ == "__main__":
    main()
