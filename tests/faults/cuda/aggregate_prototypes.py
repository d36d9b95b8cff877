"""Faults in the CUDA kernels of ``aggregate_prototypes``, and in what they share with ``enqueue_``."""

from __future__ import annotations

import torch

from tests.backends.cuda.operators import Operators
from tests.backends.cuda.test_aggregate_prototypes import aggregate_matches, batch, padded, sums_in_batch_order
from tests.faults.cuda.runner import Fault, without

OWN = "cuda/aggregate_prototypes.cuh"
RANKS = "cuda/base/ranks.cuh"
ROWS = "cuda/base/rows.cuh"
FAULTS = {
    "aggregate: no barrier after the tile's lengths": Fault(
        OWN,
        "    __syncthreads();\n    for (int k = 0; k < tile; k++) {",
        "    for (int k = 0; k < tile; k++) {",
        "race",
    ),
    "aggregate: no barrier before the next tile": Fault(
        OWN, "__syncthreads();  // the tile before has been added up", "", "race"
    ),
    "aggregate: the flags of a block's own position counted": Fault(
        OWN, "flags_before(flags.x, position - at)", "flags_before(flags.x, position - at + 1)"
    ),
    "aggregate: the weight of a bad sample": Fault(OWN, "weight > 0 && ", "weight == weight && "),
    "aggregate: one identity too many": Fault(OWN, "number >= rows) return", "number > rows) return"),
    "backward: the direction along the embedding stays": Fault(
        OWN, "t - along * by_size(e[i])", "t + along * by_size(e[i])"
    ),
    "backward: an index past the rows": Fault(
        OWN, "row >= prototypes.rows", "row > prototypes.rows + (1ll << 50)", "sanitized"
    ),
    "rows: unaligned rows read as vectors": Fault(ROWS, "x.cols % WIDTH == 0 &&", "", "plain"),
    "ranks: later equals counted": Fault(RANKS, "same && other < row + r", "same && other > row + r"),
}
# Dtypes and numbers of columns that the checks do not use stand in no mutant.
CUTS = without("cuda/base/tensors.cuh", "f(double())", "f(float16())")


def check(operators: Operators) -> None:
    kernels = operators.kernels
    sums_in_batch_order(kernels)
    for size, dim, people in ((90, 6, 1), (23, 9, 20)):
        e, labels, weights = batch(size, dim, people)
        weights[4:8] = torch.tensor([float("nan"), -1.0, float("inf"), 2.0])
        for rows in (size, 2):
            aggregate_matches(kernels, padded(e), labels, weights, True, rows)
            aggregate_matches(kernels, e.bfloat16(), labels, None, False, rows)
    made = kernels["aggregate_prototypes"](e, labels, weights, True, 2)
    index = torch.where(made[2] < 0, 2**40, made[2])
    kernels["aggregate_prototypes_backward"](made[0], made[3], e, weights, index, made[0], *made[3:], True)
