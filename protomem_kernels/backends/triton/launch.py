"""How the kernels are launched: tile sizes by hand, per architecture, dtype and embedding size.

``TABLE`` is the one place to read or change them, ``choose`` the one way to ask. A tile is ``rows`` samples by
``slots`` prototypes. ``depth`` columns of both are multiplied at a time: the whole embedding where it fits, so that the
resident side stays on the chip, else a part of it, which is then read again per tile from the nearest cache. What is
listed compiles without spills and within the shared memory of its architecture; tests hold it to that.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from protomem_kernels.backends.triton.interpretation import interpreted

# Shared memory that one block may use, in bytes, per compute capability.
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


class Launch(NamedTuple):
    """One entry of the table; a size of 0 is one that the kernel does not have.

    Attributes:
        rows: samples per tile, BLOCK_ROWS.
        slots: prototypes per tile, BLOCK_SLOTS; where a batch meets itself, what is looked at of it at a time.
        depth: columns multiplied at a time, BLOCK_DEPTH.
        columns: columns of a (.., D) result that one program accumulates, BLOCK_COLUMNS.
        warps: warps per block.
        stages: tiles in flight, the one in use included.
    """

    rows: int = 0
    slots: int = 0
    depth: int = 0
    columns: int = 0
    warps: int = 4
    stages: int = 3

    def blocks(self) -> dict[str, int]:
        """Return the tile as a kernel's compile-time arguments."""
        return {
            "BLOCK_ROWS": self.rows,
            "BLOCK_SLOTS": self.slots,
            "BLOCK_DEPTH": self.depth,
            "BLOCK_COLUMNS": self.columns,
        }

    def options(self) -> dict[str, int | bool]:
        """Return what Triton's launcher takes besides the kernel's arguments; multiply-adds are fused."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


# Architecture -> entry, and padded D (the least: all up to it, the greatest: all from it) -> architecture -> entry.
Column: TypeAlias = dict[int, Launch]
Lines: TypeAlias = dict[int, Column]

NARROW = (16, 32, 64, 128)
SIZES = (*NARROW, 256, 512, 1024, 2048, 4096, 8192)


def everywhere(how: Launch) -> Column:
    """Return the same entry for every architecture."""
    return dict.fromkeys((80, 86, 90, 100), how)


def fitted(column: Column, sizes: tuple[int, ...] = NARROW, fixed_depth: bool = False) -> Lines:
    """Return lines for ``sizes`` whose columns and, unless it is fixed, depth are no more than the embedding's."""
    return {
        size: {
            arch: how._replace(depth=how.depth if fixed_depth else min(how.depth, size), columns=min(how.columns, size))
            for arch, how in column.items()
        }
        for size in sizes
    }


def rows_held(entries: int) -> Lines:
    """Return lines for a program that holds whole samples, as many as make so many entries."""
    return {size: everywhere(Launch(rows=max(1, entries // size))) for size in SIZES}


def slots_held(entries: int, most: int = 128) -> Lines:
    """Return lines for a program that holds whole prototypes, as many as make so many entries."""
    return {size: everywhere(Launch(slots=max(1, min(most, entries // size)))) for size in SIZES}


def always(how: Launch) -> Lines:
    """Return the one line of an entry that neither size nor architecture changes."""
    return {16: everywhere(how)}


# In the interpreter cost is per program and operation, hardly per element.
INTERPRETED = fitted(everywhere(Launch(64, 512, max(SIZES), max(SIZES), 4, 1)), SIZES)
DOUBLE = fitted(everywhere(Launch(32, 32, 32, 64, 4, 1)))  # float64 everywhere: for checks, not for speed
SMALL = fitted(everywhere(Launch(64, 32, 32, 128, 8, 2)))  # of float32, on every architecture
MOMENT: Lines = {
    **fitted(
        {
            80: Launch(64, 64, 128, 128, 8, 3),
            86: Launch(64, 64, 128, 128, 8, 3),
            90: Launch(64, 64, 128, 128, 8, 2),
            100: Launch(64, 64, 128, 128, 8, 2),
        }
    ),
    256: {
        80: Launch(64, 64, 256, 256, 8, 2),
        86: Launch(16, 32, 128, 256, 8, 1),
        90: Launch(64, 64, 256, 256, 8, 2),
        100: Launch(64, 32, 256, 256, 8, 2),
    },
    512: {
        80: Launch(32, 32, 128, 512, 8, 2),
        86: Launch(16, 32, 128, 512, 8, 1),
        90: Launch(64, 32, 512, 512, 8, 2),
        100: Launch(64, 32, 128, 512, 8, 2),
    },
    1024: {
        80: Launch(32, 32, 128, 512, 8, 1),
        86: Launch(16, 32, 128, 512, 8, 1),
        90: Launch(64, 32, 128, 256, 8, 2),
        100: Launch(64, 32, 128, 512, 8, 2),
    },
}
GRADIENT: Lines = {
    **fitted(
        {
            80: Launch(64, 64, 128, 128, 8, 2),
            86: Launch(64, 64, 128, 128, 8, 2),
            90: Launch(64, 128, 128, 128, 8, 3),
            100: Launch(64, 64, 128, 128, 8, 2),
        }
    ),
    256: {
        80: Launch(32, 64, 256, 256, 8, 2),
        86: Launch(16, 32, 128, 256, 8, 1),
        90: Launch(32, 128, 256, 256, 8, 2),
        100: Launch(32, 64, 256, 256, 8, 2),
    },
    512: {
        80: Launch(32, 32, 512, 512, 8, 2),
        86: Launch(16, 32, 128, 512, 8, 1),
        90: Launch(16, 128, 512, 128, 8, 2),
        100: Launch(16, 64, 512, 512, 8, 2),
    },
    1024: {
        80: Launch(16, 32, 128, 512, 8, 1),
        86: Launch(16, 32, 128, 512, 8, 1),
        90: Launch(16, 128, 128, 128, 8, 2),
        100: Launch(16, 128, 128, 128, 8, 2),
    },
}

# Kind of kernel -> what its factors are (``_factors``) -> padded D -> architecture -> parameters.
#
# "stream": the sums over the memory of sample rows; "with moment": with a (rows, D) result beside them, in registers.
# "gradient of slots": a (slots, D) result. 16-bit factors come in two halves, which doubles the height of the first
# product, "rows" to 2 x 64 and more: what wgmma and tcgen05 want. Where a result of D columns does not fit beside the
# rest, a program takes "columns" of it, and the first product is formed once per such part. float32 products are three
# of tf32, whose factors are split in registers: hence its small tiles.
#
# "cosines", "gathered cosines", "products": one plain product of rows and rows; cosines in the order of the memory, of
# rows here and there, and products whose factors are masked or scaled on the way: the last two take registers. "depth"
# is the block of what is summed over: the same for all three and for every D, so that sums agree bit for bit. float32
# before sm_90 has no wgmma or tcgen05: factors lie in registers.
#
# The others form no products of matrices: their programs hold a few rows whole, 16 entries or so per thread.
TABLE: dict[str, Mapping[str, Lines]] = {
    "stream": {
        "fp32": fitted(everywhere(Launch(64, 64, 32, 128, 8, 2))),
        "fp64": DOUBLE,
        "interpreted": INTERPRETED,
    },
    "stream with moment": {
        "16 bits": MOMENT,
        # float16 always keeps a running maximum, which takes registers: what would spill with the tiles of bfloat16.
        "fp16": MOMENT
        | fitted(MOMENT[128] | {100: Launch(64, 32, 128, 128, 8, 2)})
        | {512: MOMENT[512] | {90: Launch(64, 32, 256, 256, 8, 2)}},
        # Rows that do not begin at a multiple of 16 entries are read one by one, each address in registers.
        "uneven": fitted(
            {
                **dict.fromkeys((80, 86), Launch(32, 32, 32, 128, 8, 2)),
                **dict.fromkeys((90, 100), Launch(64, 32, 32, 128, 8, 2)),
            }
        ),
        "fp32": SMALL,
        "fp64": DOUBLE,
        "interpreted": INTERPRETED,
    },
    "gradient of slots": {
        "16 bits": GRADIENT,
        "fp16": GRADIENT | fitted(GRADIENT[128] | {86: Launch(32, 64, 128, 128, 8, 2)}),
        "uneven": fitted(
            {
                **dict.fromkeys((80, 86), Launch(32, 32, 32, 128, 8, 2)),
                90: Launch(16, 64, 32, 128, 8, 2),
                100: Launch(32, 64, 32, 128, 8, 2),
            }
        ),
        "fp32": fitted(
            {
                **dict.fromkeys((80, 86), Launch(32, 16, 32, 128, 4, 2)),
                **dict.fromkeys((90, 100), Launch(32, 64, 32, 128, 8, 2)),
            }
        ),
        "fp64": DOUBLE,
        "interpreted": INTERPRETED,
    },
    "cosines": {
        "16 bits": fitted(everywhere(Launch(128, 128, 32, 128, 8, 3)), fixed_depth=True),
        "fp32": fitted(
            {
                **dict.fromkeys((80, 86), Launch(64, 128, 16, 128, 8, 3)),
                **dict.fromkeys((90, 100), Launch(128, 128, 32, 128, 8, 3)),
            },
            fixed_depth=True,
        ),
        "fp64": fitted(everywhere(Launch(32, 128, 16, 128, 8, 2)), fixed_depth=True),
        "interpreted": always(Launch(64, 512, 256, 256, 4, 1)),
    },
    "gathered cosines": {
        "16 bits": fitted(everywhere(Launch(64, 64, 32, 128, 8, 4)), fixed_depth=True),
        "fp32": fitted(
            {
                **dict.fromkeys((80, 86), Launch(64, 64, 16, 128, 8, 4)),
                **dict.fromkeys((90, 100), Launch(64, 64, 32, 128, 8, 4)),
            },
            fixed_depth=True,
        ),
        "fp64": fitted(everywhere(Launch(32, 64, 16, 128, 8, 4)), fixed_depth=True),
        "interpreted": always(Launch(64, 64, 256, 256, 4, 1)),
    },
    "products": {
        "16 bits": fitted(everywhere(Launch(64, 128, 32, 128, 8, 3)), fixed_depth=True),
        "fp32": fitted(
            {
                **dict.fromkeys((80, 86), Launch(64, 128, 16, 128, 8, 2)),
                **dict.fromkeys((90, 100), Launch(64, 128, 32, 128, 8, 3)),
            },
            fixed_depth=True,
        ),
        "fp64": fitted(everywhere(Launch(32, 128, 16, 128, 8, 2)), fixed_depth=True),
        "interpreted": always(Launch(64, 512, 256, 256, 4, 1)),
    },
    # The logits of a chunk, between two products of PyTorch's: a few samples by some slots at a time.
    "chunk": {"any": always(Launch(rows=4, slots=1024, warps=8)), "interpreted": always(Launch(rows=64, slots=4096))},
    # negative_logsumexp: a sample's own row; the splits added up; a sample's chosen negatives.
    "targets": {"any": rows_held(2048), "interpreted": always(Launch(rows=64))},
    "reduction": {"any": rows_held(1024), "interpreted": always(Launch(rows=64))},
    "chosen negatives": {"any": slots_held(8192, most=32), "interpreted": always(Launch(slots=64))},
    "losses": {"any": always(Launch(slots=256))},  # reduce_losses: one program
    # What the operators on the memory share.
    "inverse lengths": {
        "any": {size: everywhere(Launch(slots=2048 // size, depth=size)) for size in NARROW},
        "interpreted": fitted(everywhere(Launch(slots=512, depth=128))),
    },
    "chosen rows": {"any": {size: everywhere(Launch(warps=size // 256)) for size in (256, 512, 1024)}},
    # margin_softmax_logits
    "normalisation": {"any": slots_held(2048), "interpreted": always(Launch(slots=512))},
    # hardest_negatives: 8 chosen rows, of 128 columns a warp, are 32 entries per thread.
    "largest": {"any": always(Launch(slots=1024))},
    "gradient of embeddings": {"any": {size: everywhere(Launch(slots=8, warps=max(1, size // 128))) for size in SIZES}},
    # The operators on a batch alone: tiles of comparisons; a few samples and what is computed from them; notes.
    "order of labels": {"any": always(Launch(rows=16, slots=64))},
    "samples": {
        "fp32": {512: everywhere(Launch(rows=4, slots=1024)), 1024: everywhere(Launch(rows=4, slots=1024, warps=8))},
        "fp64": {256: everywhere(Launch(rows=4, slots=1024)), 512: everywhere(Launch(rows=4, slots=1024, warps=8))},
    },
    "order of identities": {"any": always(Launch(rows=16, slots=64, columns=64))},
    "find": {"any": always(Launch(slots=1024))},
    "write": {"any": always(Launch(slots=512))},
}
# Empty slots, lengths and a hard-negative form at once leave registers for a tile of half the logits.
CROWDED: dict[int, Column] = {
    **fitted(MOMENT[128] | {100: Launch(64, 32, 128, 128, 8, 2)}),
    256: MOMENT[256] | {90: Launch(64, 32, 256, 256, 8, 2)},
    512: MOMENT[512] | {90: Launch(64, 16, 512, 512, 8, 2), 100: Launch(64, 16, 128, 512, 8, 2)},
}
TABLE["stream with moment, every option"] = {
    **TABLE["stream with moment"],
    "16 bits": MOMENT | CROWDED,
    "fp16": MOMENT | CROWDED | {512: CROWDED[512] | {90: Launch(64, 32, 256, 256, 8, 2)}},
}
# Empty slots and lengths: Triton 3.6 puts more of the tile into shared memory than sm_80 has.
TABLE["gradient of slots, every option"] = {
    **TABLE["gradient of slots"],
    "16 bits": GRADIENT | {512: GRADIENT[512] | {80: Launch(16, 32, 512, 512, 8, 2)}},
    "fp16": GRADIENT
    | fitted(GRADIENT[128] | {86: Launch(32, 64, 128, 128, 8, 2), 90: Launch(64, 64, 128, 128, 8, 2)})
    | {512: GRADIENT[512] | {80: Launch(16, 32, 512, 512, 8, 2)}},
}


@functools.cache
def choose(kind: str, arch: int, dtype: torch.dtype, dim: int) -> Launch:
    """Return the launch parameters of a kernel of ``kind`` for factors of ``dtype``, and embeddings of size ``dim``."""
    kinds = TABLE[kind]
    lines = next(kinds[factors] for factors in _factors(dtype, dim) if factors in kinds)
    size = max(padded(dim), min(lines))
    return lines[max(line for line in lines if line <= size)][_column(arch)]


def _factors(dtype: torch.dtype, dim: int) -> Iterator[str]:
    """Yield the names under which the table may list factors, the one that says most first."""
    if interpreted():
        yield "interpreted"
    if dtype.itemsize == 2:
        if dim % 16:
            yield "uneven"
        yield from (triton_type(dtype), "16 bits")
    else:
        yield triton_type(dtype)
    yield "any"


def _column(arch: int) -> int:
    """Return the column of the table that serves a compute capability: the one with no more shared memory than it."""
    if arch in (80, 87):
        return 80
    return 90 if 90 <= arch < 100 else 100 if 100 <= arch < 120 else 86


@functools.cache
def architecture(device: torch.device) -> int:
    """Return the compute capability as an int, 90 for 9.0; in the interpreter that is what it acts as."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def processors(device: torch.device) -> int:
    """Return how many blocks can run at once if each fills a multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def compute_dtype(x: Tensor, prototypes: Tensor) -> torch.dtype:
    """Return the dtype in which products are formed: that of the prototypes, but none wider than that of ``x``.

    ``x`` is float32 or float64, the dtype of accumulation.
    """
    if x.dtype == torch.float64:
        return torch.float64
    return prototypes.dtype if prototypes.dtype in (torch.bfloat16, torch.float16) else torch.float32


def triton_type(dtype: torch.dtype) -> str:
    """Return how Triton spells a dtype in a signature."""
    names = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return names[dtype]


def padded(dim: int) -> int:
    """Return the power of two, at least 16, that an embedding of size ``dim`` is padded to inside a tile."""
    return max(16, 1 << (dim - 1).bit_length()) if dim > 0 else 16


def split(capacity: int, slots: int, blocks: int, processors: int) -> tuple[int, int]:
    """Cut the memory into splits, each a whole number of tiles: return how many, and the slots of one.

    The fewest that keep 90 % of the processors busy until the end, given ``blocks`` programs per split; where no number
    does, the one that keeps most. Every split costs a pass of its results through the memory.
    """
    tiles = max(1, -(-capacity // slots))
    most = min(tiles, max(1, 8 * processors // blocks))
    best, best_busy = 1, 0.0
    for splits in range(1, most + 1):
        waves = -(-blocks * splits // processors)
        busy = blocks * splits / (waves * processors)
        if busy > best_busy + 1e-9:
            best, best_busy = splits, busy
        if busy >= 0.9:
            break
    per_split = -(-tiles // best)
    return max(1, -(-tiles // per_split)), per_split * slots
