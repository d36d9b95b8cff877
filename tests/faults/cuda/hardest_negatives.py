"""Faults in the CUDA kernels of ``hardest_negatives``, and in the gradient of chosen rows."""

from __future__ import annotations

import torch

from tests.backends.cuda import test_hardest_negatives
from tests.backends.cuda.operators import Operators
from tests.faults.cuda.runner import MATRIX, OVER_128, Fault, without

OWN = "cuda/hardest_negatives.cuh"
CHOSEN = "cuda/base/chosen_rows.cuh"
FAULTS = {
    "hardest: the target may win": Fault(OWN, "slot != target", "slot != target - args.capacity - 1"),
    "hardest: a maximum that outlives its group": Fault(
        OWN, "      best = -INFINITY;\n    }\n    return 1;", "    }\n    return 1;"
    ),
    "hardest: ties to the higher slot": Fault(OWN, "value == cosine && other < own", "value == cosine && other > own"),
    "hardest: one tie too many": Fault(OWN, "tied && rank < wanted", "tied && rank <= wanted"),
    "hardest: counts without an atomic": Fault(
        OWN, "atomicAdd(&counts[bits >> shift & 255u], 1);", "counts[bits >> shift & 255u]++;", "race"
    ),
    "chosen: every entry of a slot writes": Fault(
        CHOSEN, "(head > 0 && args.sorted_ptr[head - 1] == slot)", "false", "race"
    ),
}
# Dtypes and numbers of columns that the checks do not use stand in no mutant.
CUTS = OVER_128 + without(MATRIX, "f(float16())")


def check(ops: Operators) -> None:
    test_hardest_negatives.check(ops, test_hardest_negatives.make((6, 700, 33), torch.bfloat16, seed=1), 2, False)
    test_hardest_negatives.test_ties_go_to_the_lower_slot(ops)
