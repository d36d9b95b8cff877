"""The CUDA C++ kernels as built: no spills, shared memory within limits, 16 bytes at a time on every streaming path."""

from __future__ import annotations

import functools
import re

import pytest

from benchmarks.static import cuda_objects
from benchmarks.static.counting import TENSOR_CORES
from benchmarks.static.cuda_objects import Compiled, readable, section, threads_of_blocks
from protomem_kernels.backends import cuda
from tests.cuda_host.build import ROOT

needs_library = pytest.mark.skipif(
    cuda_objects.unavailable() is not None, reason=f"nothing to read: {cuda_objects.unavailable()}"
)
BATCH = {"order_kernel", "sum_kernel", "backward_kernel", "prepare_kernel", "find_kernel", "narrow_kernel"}
BATCH |= {"collect_kernel", "write_kernel"}
LOGITS = {"logits_kernel", "logits_embeddings_kernel", "logits_sums_kernel", "logits_samples_kernel"}
LOGITS |= {"logits_prototypes_kernel"}
STREAMS = {"logsumexp_stream_kernel", "logsumexp_backward_kernel", "hardest_maxima_kernel"}
STREAMS |= {"logits_kernel", "logits_embeddings_kernel", "logits_prototypes_kernel"}
SHAPE_ARGUMENTS = 8  # of a Shape in csrc/cuda/stream.cuh
STORES = {"sum_kernel", "backward_kernel", "write_kernel"}  # whole rows
MOST_SHARED = 48 * 1024  # a block may have it unasked, on every GPU; find_kernel adds up to 32 KiB when launched


@functools.cache
def kernels() -> list[Compiled]:
    return cuda_objects.read()


def of_batch() -> list[Compiled]:
    return [kernel for kernel in kernels() if kernel.name.split("<")[0] in BATCH]


@needs_library
def test_every_kernel_is_there_for_every_architecture() -> None:
    assert cuda.BUILD is not None
    for arch in cuda.BUILD.architectures:
        assert {kernel.name.split("<")[0] for kernel in of_batch() if kernel.arch == int(arch.rstrip("af"))} == BATCH


@needs_library
def test_the_kernels_of_the_logits_are_there_and_move_16_bytes() -> None:
    assert cuda.BUILD is not None
    for arch in cuda.BUILD.architectures:
        here = [kernel for kernel in kernels() if kernel.arch == int(arch.rstrip("af"))]
        assert {kernel.name.split("<")[0] for kernel in here} >= LOGITS
        for name, pattern in (
            ("logits_kernel", cuda_objects.STORES_16),
            ("logits_embeddings_kernel", cuda_objects.LOADS_16),
            ("logits_sums_kernel", cuda_objects.STORES_16),
        ):
            # Not every shape has four neighbouring numbers for a thread.
            vectors = [kernel.count(pattern) > 0 for kernel in here if kernel.name.split("<")[0] == name]
            assert sum(vectors) * 2 > len(vectors), (name, arch)


@needs_library
def test_every_product_streams_16_bytes_at_a_time_through_the_tensor_cores() -> None:
    seen = set()
    for kernel in kernels():
        name, *shape = re.split(r"[<>]", kernel.name)
        if shape and shape[0].count(", ") == SHAPE_ARGUMENTS - 1:
            assert kernel.count(TENSOR_CORES) > 0, (kernel.name, kernel.arch)
            copies = kernel.count("LDGSTS"), kernel.count(cuda_objects.COPIES_16)
            assert copies[0] == copies[1], (kernel.name, kernel.arch)
            assert copies[1] > 0 or shape[0].endswith("false"), (kernel.name, kernel.arch)
            seen.add(name)
    assert seen == STREAMS


@needs_library
def test_nothing_spills() -> None:
    assert not [(kernel.name, kernel.arch) for kernel in kernels() if kernel.spills or kernel.stack]


@needs_library
def test_shared_memory_is_within_what_every_gpu_has() -> None:
    for kernel in of_batch():
        assert 0 <= kernel.shared + (32 * 1024 if kernel.name.startswith("find") else 0) <= MOST_SHARED, kernel.name


@needs_library
def test_aligned_rows_are_moved_16_bytes_at_a_time() -> None:
    seen = set()
    for kernel in of_batch():
        name = kernel.name.split("<")[0]
        first_flag = next((word for word in kernel.name.strip(">").split("<")[-1].split(", ") if word in FLAGS), None)
        vectors = kernel.count(cuda_objects.LOADS_16), kernel.count(cuda_objects.STORES_16)
        if name == "order_kernel" or first_flag == "false":
            continue
        assert vectors[0] > 0, (kernel.name, kernel.arch)
        assert vectors[1] > 0 or name not in STORES, (kernel.name, kernel.arch)
        seen.add(name)
    assert seen == BATCH - {"order_kernel"}


FLAGS = ("true", "false")


@needs_library
def test_no_float_is_added_by_an_atomic() -> None:
    for kernel in kernels():
        assert not kernel.count(r"(RED|ATOM\w*)\..*F(16|32|64)"), (kernel.name, kernel.arch)


def steps(kernel: Compiled) -> list[str]:
    """Return the ordering instructions by their first word, and whether a load is coherent."""
    return ["LDG.CONSTANT" if "CONSTANT" in code else code.split(".")[0] for code in kernel.ordering]


TICKET = ["BAR", "MEMBAR", "CCTL", "ATOMG", "MEMBAR", "CCTL", "BAR"]


@needs_library
def test_the_last_block_fences_beside_its_ticket_and_reads_nothing_stale() -> None:
    """Barrier, fence, ticket, fence, barrier: each fence with the invalidation of L1, then coherent loads alone."""
    drawn = set()
    for kernel in kernels():
        found = steps(kernel)
        if "MEMBAR" not in found:
            continue
        places = [i for i in range(len(found)) if found[i : i + len(TICKET)] == TICKET]
        assert len(places) == 1, (kernel.name, kernel.arch, found)
        assert found.count("MEMBAR") == TICKET.count("MEMBAR"), (kernel.name, kernel.arch, found)
        assert "CCTL.IVALL" in kernel.ordering
        assert "LDG" in found[places[0] :], (kernel.name, kernel.arch)
        assert "LDG.CONSTANT" not in found[places[0] :], (kernel.name, kernel.arch)
        drawn.add(kernel.name.split("<")[0])
    sources = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "csrc" / "cuda").glob("*.cuh"))
    functions = re.findall(r"^void (\w+)(\(.*?^})", sources, re.MULTILINE | re.DOTALL)
    callers = {name for name, body in functions if "is_last_block(" in body}
    assert drawn == callers != set()


def test_names_are_read() -> None:
    assert readable("_ZN8protomem4cuda11find_kernelILb1ELb0EEEvNS0_6MemoryE") == "find_kernel<true, false>"
    assert readable("_ZN8protomem4cuda12order_kernelENS_6VectorEi") == "order_kernel"
    assert readable("_ZN8protomem4cuda1kI13__nv_bfloat16Li64EEvv") == "k<bf16, 64>"
    assert readable("memset") == "memset"


def test_the_section_states_what_was_counted() -> None:
    from collections import Counter

    codes = Counter({"LDG.E.128.CONSTANT": 3, "LDG.E": 2, "STG.E.128": 1, "RED.E.MAX.S64.STRONG.GPU": 1, "STL": 4})
    threads = threads_of_blocks(ROOT / "csrc" / "cuda")
    assert threads["sum_kernel"] == 128
    assert threads["find_kernel"] == 256
    wide = "logits_kernel<bf16, 32, 64, 8, 1, 16, 2, true>"
    products = Counter({"LDGSTS.E.BYPASS.128": 8, "LDSM.16.M88.4": 4, "HMMA.16816.F32.BF16": 48})
    text = section(
        [
            Compiled("sum_kernel<fp32, true>", 90, 64, 8, 320, codes),
            Compiled("sum_kernel<fp32, true>", 80, 40, 8, 320, codes),
            Compiled("sum_kernel<fp32, true>", 80, 40, 8, 320, codes),
            Compiled(wide, 80, 254, 0, 0, products),
        ],
        threads,
    )
    assert "for sm_80 / sm_90;" in text
    assert (
        "| sum_kernel<fp32, true> | 40 / 64 | 4 | 0.3 | 75 % / 50 % | 3 of 5 | 1 of 1 | 0 of 0 | 1 | 0 | none |" in text
    )
    assert f"| {wide} | 254 | 0 | 0.0 | 12 % | 0 of 0 | 0 of 0 | 8 of 8 | 0 | 4 | 48 |" in text
