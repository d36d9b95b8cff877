"""The kernels of ``hardest_negatives``."""

from __future__ import annotations

from typing import Any

import torch
import triton

from protomem_kernels.backends.triton.cosines import PRODUCTS
from protomem_kernels.backends.triton.hardest_negatives import (
    TILE,
    _candidates_kernel,
    _embeddings_gradient_kernel,
    _keep_largest_kernel,
    _tile_maxima_kernel,
)
from protomem_kernels.backends.triton.launch import Launch, choose, padded, triton_type
from protomem_kernels.backends.triton.specimens import CENTRE, Specimen, arguments
from protomem_kernels.rows import accumulation_dtype


def specimens(arch: int, dtype: torch.dtype, dim: int) -> list[Specimen]:
    """Describe the kernels for the compile tests and the static report."""
    (batch, capacity), size, wide = CENTRE, dtype.itemsize, accumulation_dtype(dtype).itemsize
    types = {"prototypes_ptr": f"*{triton_type(dtype)}", "targets_ptr": "*i64", "occupied_ptr": "*i1"}
    types |= {"pairs_ptr": "*i64", "pair_tiles_ptr": "*i32", "columns_ptr": "*i64", "room_ptr": "*i32"}
    types |= {"slots_ptr": "*i64"}
    aligned = ("dim", "stride_x_row", "stride_w_row")
    counts = ["batch", "capacity", "tiles", "count", "chosen", "width", "k", "stride_grad_row", "stride_slots_row"]
    types |= dict.fromkeys([*counts, *aligned], "i32")

    def specimen(name: str, kernel: Any, launch: Launch, work: tuple[int, ...] = (0,) * 4, **fixed: Any) -> Specimen:
        pointers = [argument for argument in kernel.arg_names if argument.endswith("_ptr")]
        moved, multiplied, tiles, least = work
        return Specimen(
            name=name,
            **arguments(
                kernel,
                dict.fromkeys(pointers, f"*{triton_type(accumulation_dtype(dtype))}") | types,
                launch.blocks() | fixed,
            ),
            warps=launch.warps,
            stages=launch.stages,
            aligned=aligned,
            matrix_bound=multiplied > 0,
            bytes_per_tile=moved,
            operations_per_tile=2 * multiplied,
            tiles=tiles,
            least_bytes=least,
        )

    stream = choose("cosines", arch, dtype, dim)
    gather = choose("gathered cosines", arch, dtype, dim)
    maxima = (
        dim * (stream.rows * wide + TILE * size) + stream.rows * wide,
        stream.rows * TILE * dim * PRODUCTS[dtype],
        triton.cdiv(batch, stream.rows) * triton.cdiv(capacity, TILE),
        dim * (batch * wide + capacity * size) + batch * triton.cdiv(capacity, TILE) * wide,
    )
    moved = dim * (gather.rows * wide + gather.slots * size) + gather.rows * gather.slots * wide
    candidates = (moved, gather.rows * gather.slots * dim * PRODUCTS[dtype], 0, 0)
    largest = choose("largest", arch, dtype, dim)
    few = choose("gradient of embeddings", arch, dtype, dim)
    bare = {"occupied_ptr": None, "inverse_ptr": None}
    gathered = (few.slots * (dim * size + 8 + wide), 0, 0, 0)
    gradient, chosen = _embeddings_gradient_kernel, {"BLOCK_CHOSEN": few.slots, "BLOCK_COLUMNS": padded(dim)}
    return [
        specimen("maxima", _tile_maxima_kernel, stream, maxima, **bare),
        specimen("maxima, every option", _tile_maxima_kernel, stream, (*maxima[:2], 0, 0)),
        specimen("candidates", _candidates_kernel, gather, candidates, **bare),
        specimen("candidates, every option", _candidates_kernel, gather, candidates),
        specimen("keep largest", _keep_largest_kernel, largest, (largest.slots * wide, 0, 0, 0), BLOCK=largest.slots),
        specimen("gradient", gradient, few, gathered, **chosen, NORMALIZE=False),
        specimen("gradient, normalized", gradient, few, gathered, **chosen, NORMALIZE=True),
    ]
