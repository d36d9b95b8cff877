"""How kernels on batch x memory are launched: tile sizes by hand, per architecture, dtype and embedding size.

``TABLE`` is the one place to read or change them. A tile is ``rows`` samples by ``slots`` prototypes. ``depth`` columns
of both are multiplied at a time: the whole embedding where it fits, so that the resident side stays on the chip, else a
part of it, which is then read again per tile from the nearest cache. What is listed compiles without spills and within
the shared memory of its architecture; tests hold it to that.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from protomem_kernels.backends.triton import interpreted

# Shared memory that one block may use, in bytes, per compute capability.
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


class Launch(NamedTuple):
    """One line of the table.

    Attributes:
        rows: samples per tile, BLOCK_ROWS.
        slots: prototypes per tile, BLOCK_SLOTS.
        depth: columns multiplied at a time, BLOCK_DEPTH.
        columns: columns of a (.., D) result that one program accumulates, BLOCK_COLUMNS.
        warps: warps per block.
        stages: tiles in flight, the one in use included.
    """

    rows: int
    slots: int
    depth: int
    columns: int
    warps: int
    stages: int

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


# kind of kernel -> bytes of a factor -> padded D (128: all up to it, 1024: all from it) -> architecture -> parameters.
#
# "stream": the sums over the memory of sample rows; "with moment": with a (rows, D) result beside them, in registers.
# "gradient of slots": a (slots, D) result. 16-bit factors come in two halves, which doubles the height of the first
# product, "rows" to 2 x 64 and more: what wgmma and tcgen05 want. Where a result of D columns does not fit beside the
# rest, a program takes "columns" of it, and the first product is formed once per such part. float32 products are three
# of tf32, whose factors are split in registers: hence its small tiles.
SMALL = Launch(64, 32, 32, 128, 8, 2)  # of float32, on every architecture
TABLE: dict[str, dict[int, dict[int, dict[int, Launch]]]] = {
    "stream": {
        4: {128: dict.fromkeys((80, 86, 90, 100), Launch(64, 64, 32, 128, 8, 2))},
    },
    "stream with moment": {
        2: {
            128: {
                80: Launch(64, 64, 128, 128, 8, 3),
                86: Launch(64, 64, 128, 128, 8, 3),
                90: Launch(64, 64, 128, 128, 8, 2),
                100: Launch(64, 64, 128, 128, 8, 2),
            },
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
        },
        4: {128: dict.fromkeys((80, 86, 90, 100), SMALL)},
    },
    "gradient of slots": {
        2: {
            128: {
                80: Launch(64, 64, 128, 128, 8, 2),
                86: Launch(64, 64, 128, 128, 8, 2),
                90: Launch(64, 128, 128, 128, 8, 3),
                100: Launch(64, 64, 128, 128, 8, 2),
            },
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
        },
        4: {
            128: {
                **dict.fromkeys((80, 86), Launch(32, 16, 32, 128, 4, 2)),
                **dict.fromkeys((90, 100), Launch(32, 64, 32, 128, 8, 2)),
            },
        },
    },
}
# Rows that do not begin at a multiple of 16 entries are read one by one, each address in registers: smaller tiles.
UNEVEN: dict[str, dict[int, Launch]] = {
    "stream with moment": {
        **dict.fromkeys((80, 86), Launch(32, 32, 32, 128, 8, 2)),
        **dict.fromkeys((90, 100), Launch(64, 32, 32, 128, 8, 2)),
    },
    "gradient of slots": {
        **dict.fromkeys((80, 86), Launch(32, 32, 32, 128, 8, 2)),
        90: Launch(16, 64, 32, 128, 8, 2),
        100: Launch(32, 64, 32, 128, 8, 2),
    },
}
# float16 always keeps a running maximum, which takes registers: what would spill with the tiles above. (kind, D, arch)
FLOAT16 = {
    ("gradient of slots", 128, 86): Launch(32, 64, 128, 128, 8, 2),
    ("stream with moment", 128, 100): Launch(64, 32, 128, 128, 8, 2),
    ("stream with moment", 512, 90): Launch(64, 32, 256, 256, 8, 2),
}
DOUBLE = Launch(32, 32, 32, 64, 4, 1)  # float64 everywhere: for checks, not for speed


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


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64 and float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def triton_type(dtype: torch.dtype) -> str:
    """Return how Triton spells a dtype in a signature."""
    names = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return names[dtype]


def row_warps(dim: int) -> int:
    """Return the warps of a program that works on one row of ``dim`` columns: 8 columns or so per thread."""
    return max(1, min(4, padded(dim) // 256))


def padded(dim: int) -> int:
    """Return the power of two, at least 16, that an embedding of size ``dim`` is padded to inside a tile."""
    return max(16, 1 << (dim - 1).bit_length()) if dim > 0 else 16


def choose(kind: str, arch: int, dtype: torch.dtype, dim: int) -> Launch:
    """Return the launch parameters of a kernel of ``kind`` for products in ``dtype`` of embeddings of size ``dim``."""
    size = padded(dim)
    if interpreted():  # its cost is per program and operation, hardly per element
        return Launch(rows=64, slots=512, depth=size, columns=size, warps=4, stages=1)
    if dtype == torch.float64:
        how = DOUBLE
    elif dim % 16 and dtype.itemsize == 2:
        how = UNEVEN[kind][_row(arch)]
    else:
        lines = TABLE[kind][dtype.itemsize]
        bucket = max(bucket for bucket in lines if bucket <= max(size, min(lines)))
        how = lines[bucket][_row(arch)]
        if dtype == torch.float16:
            how = FLOAT16.get((kind, bucket, _row(arch)), how)
    return how._replace(depth=min(how.depth, size), columns=min(how.columns, size))


def _row(arch: int) -> int:
    """Return the column of the table that serves a compute capability: the one with no more shared memory than it."""
    if arch in (80, 87):
        return 80
    return 90 if 90 <= arch < 100 else 100 if 100 <= arch < 120 else 86


def row_block(columns: int) -> int:
    """Return how many rows of a tile ``columns`` wide a program of 4 warps takes: 16 entries or so per thread."""
    return 512 if interpreted() else max(1, 2048 // columns)


def choose_product(kind: str, arch: int, dtype: torch.dtype, dim: int) -> Launch:
    """Return the launch parameters of a kernel that forms one plain product of rows and rows, in tiles.

    ``depth`` is the block of what is summed over: the same for every kind, so that sums agree bit for bit.

    Args:
        kind: "stream" for cosines in the order of the memory; "gathered" for cosines of rows here and there, "other"
            for products whose factors are masked or scaled on the way: both take registers.
        arch: the compute capability.
        dtype: what ``compute_dtype`` says.
        dim: columns of an embedding.
    """
    columns = min(padded(dim), 128)
    if interpreted():
        return Launch(rows=64, slots=64 if kind == "gathered" else 512, depth=256, columns=256, warps=4, stages=1)
    launch = Launch(rows=64, slots=128, depth=32, columns=columns, warps=8, stages=3)
    if dtype == torch.float64:
        launch = launch._replace(rows=32, depth=16, stages=2)
    elif dtype == torch.float32 and arch not in (90, 100, 103):  # no wgmma or tcgen05: factors lie in registers
        launch = launch._replace(depth=16, stages=3 if kind == "stream" else 2)
    elif kind == "stream":
        launch = launch._replace(rows=128)
    return launch._replace(slots=64, stages=4) if kind == "gathered" else launch


def gathered_slots(dim: int) -> int:
    """Return how many gathered rows of ``dim`` columns a program holds at a time."""
    return 64 if interpreted() else max(1, min(32, 8192 // padded(dim)))


def reduced_rows(dim: int) -> int:
    """Return how many rows of ``dim`` columns a program adds up over the splits."""
    return 64 if interpreted() else max(1, 1024 // padded(dim))


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
