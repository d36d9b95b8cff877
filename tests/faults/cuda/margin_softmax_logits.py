"""Faults in the CUDA kernels of ``margin_softmax_logits``."""

from __future__ import annotations

import os

import torch

from tests.backends.cuda import test_margin_softmax_logits, test_negative_logsumexp
from tests.backends.cuda.operators import Operators
from tests.faults.cuda.runner import MATRIX, OVER_128, Fault, without

OWN = "cuda/margin_softmax_logits.cuh"
FACTORS = "cuda/base/factors.cuh"
FAULTS = {
    "logits: x with one part too few": Fault(FACTORS, "bfloat16>  ? 3", "bfloat16>  ? 2"),
    "logits: an empty slot's gradient counts": Fault(
        OWN, "& 1u) != 0 && start + column", "& 1u) <= 1 && start + column"
    ),
    "logits: the target of another chunk": Fault(
        OWN, "args.targets[start + column] - args.first_slot != slot", "args.targets[start + column] != slot"
    ),
    "logits: every chunk begins anew": Fault(OWN, "args.continues ?", "false ?"),
    "logits: the gradient of a tile before": Fault(
        OWN,
        "if (sample == 0) load(sample, column_of);",
        "load(sample, column_of);\n    if (sample == 0) return;\n    load(sample - Shape::TILE, column_of);",
    ),
    "logits: float16 weights as they are": Fault(OWN, "if constexpr (!NEEDED) return 1;", "return 1;"),
    "logits: units read before they are there": Fault(
        OWN, "units_ptr[own_row] = unit;\n      __syncthreads();", "units_ptr[own_row] = unit;", "race"
    ),
}
# Dtypes and numbers of columns that the checks do not use stand in no mutant.
CUTS = OVER_128 + without(
    MATRIX, "f(float())", "f(Shape<T, 32, 64, 2, 4, 16, 2, false>())", "f(Shape<T, 32, 64, 2, 4, TILE, 2, false>())"
)


def check(ops: Operators) -> None:
    os.environ["PROTOMEM_HOST_SCRATCH_BYTES"] = "1"  # several chunks
    for dtype in (torch.bfloat16, torch.float16):
        case = test_negative_logsumexp.make((38, 140, 24), dtype, hard=True, seed=1)
        test_margin_softmax_logits.check(ops, case)
