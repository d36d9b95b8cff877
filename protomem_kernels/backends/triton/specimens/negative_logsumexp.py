"""The kernels of ``negative_logsumexp``, for a memory of ``dtype``: on all of it, and on chosen rows."""

from __future__ import annotations

import torch
import triton

from protomem_kernels.backends.triton import launch
from protomem_kernels.backends.triton.launch import Launch
from protomem_kernels.backends.triton.logsumexp_chosen import chosen_kernel
from protomem_kernels.backends.triton.logsumexp_samples import reduction_kernel, split_kernel, target_kernel
from protomem_kernels.backends.triton.logsumexp_stream import gradient_kernel, stream_kernel
from protomem_kernels.backends.triton.specimens import CENTRE, Specimen
from protomem_kernels.rows import accumulation_dtype

_OPTIONS = {"plain": (), "occupied": ("occupied",), "every option": ("occupied", "hard", "normalize", "running")}


def specimens(arch: int, dtype: torch.dtype, dim: int) -> list[Specimen]:
    """Describe the kernels for the compile tests and the static report, for a memory of ``dtype``."""
    found = _small_specimens(arch, dtype, dim)
    for name, options in _OPTIONS.items():
        for kind in ("stream", "stream with moment", "gradient of slots"):
            if kind != "stream" or _is_wide(dtype):
                every = kind != "stream" and name == "every option"
                how = launch.choose(f"{kind}, {name}" if every else kind, arch, dtype, dim)
                found.append(large_specimen(kind, dtype, dim, how, f"{kind}, {name}", options))
    return found


def _is_wide(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.float64)


def _fill(kernel: object, types: dict[str, str], constants: dict[str, object]) -> dict[str, object]:
    """Return the fields of a specimen that say what is compiled; whatever is not named is None, or a stride of 1."""
    names: list[str] = kernel.arg_names  # type: ignore[attr-defined]
    signature = {name: types.get(name, "constexpr") for name in names}
    fixed = {name: constants.get(name, 1 if "stride" in name else None) for name in names if name not in types}
    aligned = [n for n, t in types.items() if t.startswith("*") or n in ("dim", "stride_x_row", "stride_w_row")]
    return {"kernel": kernel, "signature": signature, "constexprs": fixed, "aligned": tuple(aligned)}


def large_specimen(
    kind: str, dtype: torch.dtype, dim: int, how: Launch, name: str, options: tuple[str, ...]
) -> Specimen:
    """Describe one of the two matrix-bound kernels as launched with ``how``."""
    stored, acc = launch.triton_type(dtype), launch.triton_type(accumulation_dtype(dtype))
    halves, block_dim = 1 if _is_wide(dtype) else 2, launch.padded(dim)
    types = {"x_ptr": f"*{stored}", "prototypes_ptr": f"*{stored}", "targets_ptr": "*i64"}
    if "occupied" in options:
        types["occupied_ptr"] = "*i1"
    if "hard" in options:
        types |= {"threshold_ptr": f"*{acc}", "coefficients_ptr": f"*{acc}"}
    types |= dict.fromkeys(["batch", "capacity", "dim", "stride_x_row", "stride_w_row"], "i32") | {"scale": "fp64"}
    products, moment = halves, kind != "stream"
    if kind == "gradient of slots":
        kernel = gradient_kernel
        types |= {"grad_prototypes_ptr": f"*{stored}"}
        types |= dict.fromkeys(["grad_cosine_ptr", "grad_n_ptr", "n_ptr"], f"*{acc}")
        if dtype == torch.float16:
            types["unit_ptr"] = f"*{acc}"
        if "occupied" in options:
            types["present_ptr"] = "*i1"
    else:
        kernel = stream_kernel
        types |= {"totals_ptr": f"*{acc}", "slots_per_split": "i32", "offset": "fp64"}
        if "running" in options or dtype == torch.float16:
            types["maxima_ptr"] = f"*{acc}"
        if moment:
            types["moments_ptr"] = f"*{acc}"
    if "normalize" in options:
        types["inverse_ptr"] = f"*{acc}"
    constants = {"HALVES": halves, "TF32": False, "BLOCK_DIM": block_dim, **how.blocks()}
    chunks = block_dim // how.columns if moment else 1
    batch, capacity = CENTRE
    streamed = how.slots if kernel is stream_kernel else how.rows * halves
    emulated = 3 if dtype == torch.float32 else 1  # products of tf32 that stand for one of float32
    per_tile = 2 * how.rows * how.slots * emulated * (products * block_dim + moment * how.columns)
    vectors = 4 * batch * accumulation_dtype(dtype).itemsize
    least = (capacity * dim * (2 if kernel is gradient_kernel else 1) + 2 * batch * dim) * dtype.itemsize + vectors
    return Specimen(
        name=name,
        **_fill(kernel, types, constants),  # type: ignore[arg-type]
        warps=how.warps,
        stages=how.stages,
        matrix_bound=True,
        bytes_per_tile=streamed * dim * dtype.itemsize,
        operations_per_tile=per_tile,
        tiles=triton.cdiv(batch, how.rows) * triton.cdiv(capacity, how.slots) * chunks,
        least_bytes=least,
    )


def _small_specimens(arch: int, dtype: torch.dtype, dim: int) -> list[Specimen]:
    """Describe the kernels around the matrix-bound ones."""
    stored, acc = launch.triton_type(dtype), launch.triton_type(accumulation_dtype(dtype))
    kinds = "targets", "reduction", "chosen negatives"
    one, many, few = (launch.choose(kind, arch, dtype, dim) for kind in kinds)
    block_dim = launch.padded(dim)
    x = {"x_ptr": f"*{acc}", "batch": "i32", "dim": "i32", "stride_x_row": "i32"}
    memory = {"prototypes_ptr": f"*{stored}", "targets_ptr": "*i64", "capacity": "i32", "stride_w_row": "i32"}
    halves = {} if _is_wide(dtype) else {"parts_ptr": f"*{stored}"}
    block = {"NORMALIZE": True, "PARTS": 2, "BLOCK_ROWS": one.rows, "BLOCK_DIM": block_dim}
    described = {
        "target": (
            one,
            target_kernel,
            x | memory | halves | {"cosine_ptr": f"*{acc}", "target_rows_ptr": f"*{acc}"},
            block,
        ),
        "reduction": (
            many,
            reduction_kernel,
            x
            | halves
            | dict.fromkeys(["totals_ptr", "maxima_ptr", "moments_ptr", "n_ptr", "o_ptr"], f"*{acc}")
            | {"splits": "i32", "scale": "fp64", "offset": "fp64"},
            block | {"BLOCK_ROWS": many.rows},
        ),
    }
    if halves:
        described["split"] = one, split_kernel, x | halves, block
    chosen = {name: kind for name, kind in (x | memory).items() if name != "batch"}
    chosen |= {"negatives_ptr": "*i64", "count": "i32", "scale": "fp64", "stride_negative_row": "i32"}
    chosen |= dict.fromkeys(["threshold_ptr", "coefficients_ptr", "n_ptr"], f"*{acc}")
    block = {"NORMALIZE": True, "BLOCK_SLOTS": few.slots, "BLOCK_DIM": block_dim}
    described["chosen"] = few, chosen_kernel, chosen | {"o_ptr": f"*{acc}"}, block
    backward = {"slots_ptr": "*i64"} | dict.fromkeys(["grad_cosine_ptr", "grad_n_ptr", "grads_ptr"], f"*{acc}")
    described["chosen, backward"] = few, chosen_kernel, chosen | backward, block
    return [
        Specimen(name=name, **_fill(kernel, types, constants), warps=how.warps, stages=how.stages)  # type: ignore[arg-type]
        for name, (how, kernel, types, constants) in described.items()
    ]
