"""The kernels of cut-cross-entropy, launched as it launches them on ``CENTRE``, described the way ours are.

No margin, no refused negatives, and a label's gathered dot product is a kernel of its own, left out here. Both kernels
wait in a loop for a lock, so the order of their sums changes from run to run. The backward pass reads what its filter
lets through: counted as if nothing were filtered, which is where a fresh memory starts.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.static.launches import Blank, launched
from protomem_kernels.backends.triton.specimens import CENTRE, Specimen

PACKAGE = "cut_cross_entropy"


def specimens(arch: int, dtype: torch.dtype, dim: int) -> list[Specimen]:
    """Return what a loss with the gradient of its embeddings launches, and with that of its weights."""
    del arch
    from cut_cross_entropy import cce_backward, cce_lse_forward

    B, M = CENTRE
    size = dtype.itemsize
    x, w, one = Blank(dtype), Blank(dtype), Blank(torch.float32)
    locks = Blank(torch.int32)
    sizes = {"B": B, "V": M, "D": dim, "B_BIN": B}
    strides = {"stride_eb": dim, "stride_ed": 1, "stride_cv": dim, "stride_cd": 1, "stride_vb": 1}
    common = {"E": x, "C": w, "LSE": one, "Valids": None, "softcap": None, **sizes, **strides}
    forward = {**common, "LA": None, "Locks": Blank(torch.uint32), "stride_lse_b": 1, "num_locks": 4}
    found = [_specimen("forward", cce_lse_forward._cce_lse_forward_kernel, forward, dim, size, products=1)]
    if dtype != torch.float32:  # its backward pass takes bfloat16 and float16 embeddings only
        backward = {
            **common,
            **{"dOut": Blank(torch.float32, 1), "grad_scale": 1.0 / B, "VocabOrdering": None},
            **{"Targets": Blank(torch.int64), "dE": x, "dELocks": locks, "dC": w, "dCLocks": locks},
            **{"n_de_locks_0": 64, "n_de_locks_1": 8, "n_dc_locks_0": M // 8, "n_dc_locks_1": 8},
            **{"filter_eps": 2.0**-12, "SHIFT": False},
        }
        for name, all_of_them in (("backward, embeddings", False), ("backward, both", True)):
            arguments = {**backward, "REQUIRES_GRAD": all_of_them}
            kernel = cce_backward._cce_backward_kernel
            found.append(_specimen(name, kernel, arguments, dim, size, 3 if all_of_them else 2))
    return found


def _specimen(name: str, kernel: Any, arguments: dict[str, Any], dim: int, size: int, products: int) -> Specimen:
    """Describe a kernel whose tiles read ``BLOCK_B`` rows of X and ``BLOCK_V`` of W, and add to rows of gradients."""
    B, M = CENTRE
    compiled = launched(kernel, arguments)
    rows, slots = compiled["constexprs"]["BLOCK_B"], compiled["constexprs"]["BLOCK_V"]
    gradients = {1: 0, 2: rows, 3: rows + slots}[products]  # rows, read and written again under a lock
    read = {1: rows + slots, 2: rows + 2 * slots, 3: 2 * (rows + slots)}[products]
    once = {1: B + M, 2: B + M + B, 3: 2 * (B + M)}[products]
    return Specimen(
        name=name,
        **compiled,
        matrix_bound=True,
        bytes_per_tile=(read + 2 * gradients) * dim * size,
        operations_per_tile=products * 2 * rows * slots * dim,
        tiles=-(-B // rows) * -(-M // slots),
        least_bytes=once * dim * size,
    )
