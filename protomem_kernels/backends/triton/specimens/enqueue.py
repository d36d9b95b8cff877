"""The kernels of ``enqueue_``, for a memory of ``dtype``."""

from __future__ import annotations

from typing import Any

import torch
import triton

from protomem_kernels.backends.triton.enqueue import find_kernel, order_kernel, write_kernel
from protomem_kernels.backends.triton.launch import Launch, choose, triton_type
from protomem_kernels.backends.triton.specimens import Specimen
from protomem_kernels.rows import accumulation_dtype


def specimens(arch: int, dtype: torch.dtype, dim: int) -> list[Specimen]:
    """Describe the kernels for the compile tests and the static report, for a memory of ``dtype``."""
    memory, rows = f"*{triton_type(dtype)}", f"*{triton_type(accumulation_dtype(dtype))}"
    notes = dict.fromkeys(["start_ptr", "ordered_ptr", "found_ptr", "cursor_ptr", "clock_ptr"], "*i64")
    notes |= dict.fromkeys(["order_ptr", "length_ptr", "usable_ptr", "leader_ptr"], "*i32")
    answers = {"slots_ptr": "*i64", "evicted_ptr": "*i64", "known_ptr": "*i1", "previous_ptr": memory}
    state = {"memory_ptr": memory, "memory_identities_ptr": "*i64", "stamps_ptr": "*i64"}
    batch = {"prototypes_ptr": rows, "identities_ptr": "*i64"}
    names = ["size", "dim", "capacity", "halvings", "row_blocks", "stride_slot", "stride_prototype"]
    everything = notes | answers | state | batch | dict.fromkeys(names, "i32") | {"refresh_ratio": "fp64"}
    kinds = "order of identities", "find", "write"
    compare, find, write = (choose(kind, arch, dtype, dim) for kind in kinds)
    fixed = {
        "stride_identity": 1,
        "stride_stamp": 1,
        "stride_column": 1,
        "stride_slot_column": 1,
        "BLOCK_ROWS": compare.rows,
        "BLOCK_KEYS": compare.slots,
        "BLOCK_COLUMNS": compare.columns,
        "BLOCK_SLOTS": find.slots,
        "BLOCK_NOTES": write.slots,
        "BLOCK_D": triton.next_power_of_2(dim),
    }
    aligned = ("dim", "stride_slot", "stride_prototype")
    moved = dim * (accumulation_dtype(dtype).itemsize + 2 * dtype.itemsize)

    def specimen(name: str, kernel: Any, how: Launch, moved: int, **more: Any) -> Specimen:
        given = fixed | {argument: value for argument, value in more.items() if value is None}
        types = everything | {argument: kind for argument, kind in more.items() if kind is not None}
        return Specimen(
            name=name,
            kernel=kernel,
            signature={argument: types[argument] for argument in kernel.arg_names if argument not in given},
            constexprs={argument: given[argument] for argument in kernel.arg_names if argument in given},
            warps=how.warps,
            stages=how.stages,
            aligned=aligned,
            bytes_per_tile=moved,
        )

    return [
        specimen("order", order_kernel, compare, compare.rows * dim * accumulation_dtype(dtype).itemsize),
        specimen("find", find_kernel, find, 8 * find.slots, ages_ptr=None),
        specimen("find lru", find_kernel, find, 24 * find.slots, ages_ptr="*i64"),
        specimen("write", write_kernel, write, moved, victims_ptr=None),
        specimen("write lru", write_kernel, write, moved, victims_ptr="*i64"),
    ]
