"""Faults in the CUDA kernels of ``negative_logsumexp``, and in the stream of all kernels on batch x memory."""

from __future__ import annotations

import torch

from tests.backends.cuda import test_negative_logsumexp
from tests.backends.cuda.operators import Operators
from tests.faults.cuda.runner import MATRIX, OVER_128, Fault, without

OWN = "cuda/negative_logsumexp.cuh"
FACTORS = "cuda/base/factors.cuh"
STREAM = "cuda/base/stream.cuh"
FAULTS = {
    "stream: no barrier after the parts": Fault(
        STREAM, "__syncthreads();  // the parts are there", "// the parts are there", "race"
    ),
    "stream: no barrier after the weights": Fault(
        STREAM, "__syncthreads();  // and for the others", "// and for the others", "race"
    ),
    "stream: no wait for the next tile": Fault(STREAM, "      cp_async_wait<S::STAGES - 2>();\n    }\n", "    }\n"),
    "stream: a wait for one tile too few": Fault(
        STREAM, "      cp_async_wait<S::STAGES - 2>();\n    }\n", "      cp_async_wait<S::STAGES - 1>();\n    }\n"
    ),
    "stream: slots past the split": Fault(STREAM, "j < last && task.streams(j)", "task.streams(j)"),
    "stream: parts read without their twist": Fault(STREAM, "(column_of(j) ^ twist(own_row))", "column_of(j)"),
    "stream: the lower rows shrink like the upper": Fault(STREAM, "i < 2 ? upper : lower", "upper"),
    "factors: another matrix of a fragment": Fault(FACTORS, "column / 8 + lane / 16", "column / 8 + lane / 8 % 2"),
    "factors: float32 weights where they are not met": Fault(FACTORS, "j / 8 * 8 + j % 2 * 4 + j % 8 / 2", "j"),
    "factors: plain tf32": Fault(FACTORS, "mma_m16n8k8_tf32(d, a.high, b.low);", ""),
    "logsumexp: the target is a negative": Fault(OWN, " && column != target_at", ""),
    "logsumexp: one half of x": Fault(OWN, "RESIDENT_TERMS = sizeof(T) == 2 ? 2 : 1", "RESIDENT_TERMS = 1"),
    "logsumexp: what the halves leave": Fault(OWN, " + correction :", " :"),
    "logsumexp: the part along the row stays": Fault(OWN, "grad[k] - along", "grad[k] + 0 * along"),
}
# Dtypes and numbers of columns that the checks do not use stand in no mutant.
CUTS = OVER_128 + without(MATRIX, "f(float16())", "f(Shape<T, 32, 64, 2, 4, 16, 2, false>())")


def _followed(case: test_negative_logsumexp.Case) -> test_negative_logsumexp.Case:
    """Return the case with more slots behind its last: whoever reads them finds rows that count."""
    assert case.occupied is not None
    tile = 64
    rows = torch.cat([case.prototypes, torch.full_like(case.prototypes[:tile], 2)])
    present = torch.cat([case.occupied, torch.ones_like(case.occupied[:tile])])
    return case._replace(prototypes=rows[:-tile], occupied=present[:-tile])


def check(ops: Operators) -> None:
    make, check = test_negative_logsumexp.make, test_negative_logsumexp.check
    for dtype in (torch.bfloat16, torch.float32):
        check(ops, _followed(make((9, 140, 24), dtype, seed=1)))
        case = make((20, 140, 40), dtype, hard=True, normalize=True, running=True, scale=200.0, seed=2)
        check(ops, _followed(case))
