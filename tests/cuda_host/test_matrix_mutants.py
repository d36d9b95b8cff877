"""Small faults in the CUDA kernels on batch x memory, one at a time: each has to be noticed by the checks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.cuda_host import test_hardest_negatives, test_margin_softmax_logits, test_negative_logsumexp
from tests.cuda_host.mutants import Fault, assert_noticed, assert_quiet
from tests.cuda_host.operators import Operators

STREAM, LOGSUMEXP, HARDEST = "cuda/stream.cuh", "cuda/negative_logsumexp.cuh", "cuda/hardest_negatives.cuh"
LOGITS = "cuda/margin_softmax_logits.cuh"
FAULTS = {
    "stream: no barrier after the parts": Fault(
        "negative_logsumexp", STREAM, "__syncthreads();  // the parts are there", "// the parts are there", "race"
    ),
    "stream: no barrier after the weights": Fault(
        "negative_logsumexp", STREAM, "__syncthreads();  // and for the others", "// and for the others", "race"
    ),
    "stream: no wait for the next tile": Fault(
        "negative_logsumexp", STREAM, "      cp_async_wait<S::STAGES - 2>();\n    }\n", "    }\n"
    ),
    "stream: a wait for one tile too few": Fault(
        "negative_logsumexp",
        STREAM,
        "      cp_async_wait<S::STAGES - 2>();\n    }\n",
        "      cp_async_wait<S::STAGES - 1>();\n    }\n",
    ),
    "stream: slots past the split": Fault(
        "negative_logsumexp", STREAM, "j < last && task.streams(j)", "task.streams(j)"
    ),
    "stream: parts read without their twist": Fault(
        "negative_logsumexp", STREAM, "(column_of(j) ^ twist(own_row))", "column_of(j)"
    ),
    "stream: the lower rows shrink like the upper": Fault(
        "negative_logsumexp", STREAM, "i < 2 ? upper : lower", "upper"
    ),
    "factors: another matrix of a fragment": Fault(
        "negative_logsumexp", "cuda/factors.cuh", "column / 8 + lane / 16", "column / 8 + lane / 8 % 2"
    ),
    "factors: float32 weights where they are not met": Fault(
        "negative_logsumexp", "cuda/factors.cuh", "j / 8 * 8 + j % 2 * 4 + j % 8 / 2", "j"
    ),
    "factors: plain tf32": Fault("negative_logsumexp", "cuda/factors.cuh", "mma_m16n8k8_tf32(d, a.high, b.low);", ""),
    "logsumexp: the target is a negative": Fault("negative_logsumexp", LOGSUMEXP, " && column != target_at", ""),
    "logsumexp: one half of x": Fault(
        "negative_logsumexp", LOGSUMEXP, "RESIDENT_TERMS = sizeof(T) == 2 ? 2 : 1", "RESIDENT_TERMS = 1"
    ),
    "logsumexp: what the halves leave": Fault("negative_logsumexp", LOGSUMEXP, " + correction :", " :"),
    "logsumexp: the part along the row stays": Fault(
        "negative_logsumexp", LOGSUMEXP, "grad[k] - along", "grad[k] + 0 * along"
    ),
    "hardest: the target may win": Fault(
        "hardest_negatives", HARDEST, "slot != target", "slot != target - args.capacity - 1"
    ),
    "hardest: a maximum that outlives its group": Fault(
        "hardest_negatives", HARDEST, "      best = -INFINITY;\n    }\n    return 1;", "    }\n    return 1;"
    ),
    "hardest: ties to the higher slot": Fault(
        "hardest_negatives", HARDEST, "value == cosine && other < own", "value == cosine && other > own"
    ),
    "hardest: one tie too many": Fault("hardest_negatives", HARDEST, "tied && rank < wanted", "tied && rank <= wanted"),
    "hardest: counts without an atomic": Fault(
        "hardest_negatives",
        HARDEST,
        "atomicAdd(&counts[bits >> shift & 255u], 1);",
        "counts[bits >> shift & 255u]++;",
        "race",
    ),
    "logits: x with one part too few": Fault(
        "margin_softmax_logits", "cuda/factors.cuh", "bfloat16>  ? 3", "bfloat16>  ? 2"
    ),
    "logits: an empty slot's gradient counts": Fault(
        "margin_softmax_logits", LOGITS, "& 1u) != 0 && start + column", "& 1u) <= 1 && start + column"
    ),
    "logits: the target of another chunk": Fault(
        "margin_softmax_logits",
        LOGITS,
        "args.targets[start + column] - args.first_slot != slot",
        "args.targets[start + column] != slot",
    ),
    "logits: every chunk begins anew": Fault("margin_softmax_logits", LOGITS, "args.continues ?", "false ?"),
    "logits: the gradient of a tile before": Fault(
        "margin_softmax_logits",
        LOGITS,
        "if (sample == 0) load(sample, column_of);",
        "load(sample, column_of);\n    if (sample == 0) return;\n    load(sample - Shape::TILE, column_of);",
    ),
    "logits: float16 weights as they are": Fault(
        "margin_softmax_logits", LOGITS, "if constexpr (!NEEDED) return 1;", "return 1;"
    ),
    "logits: units read before they are there": Fault(
        "margin_softmax_logits",
        LOGITS,
        "units_ptr[own_row] = unit;\n      __syncthreads();",
        "units_ptr[own_row] = unit;",
        "race",
    ),
    "chosen: every entry of a slot writes": Fault(
        "hardest_negatives", "cuda/chosen_rows.cuh", "(head > 0 && args.sorted_ptr[head - 1] == slot)", "false", "race"
    ),
}


def _followed(case: test_negative_logsumexp.Case) -> test_negative_logsumexp.Case:
    """Return the case with more slots behind its last: whoever reads them finds rows that count."""
    assert case.occupied is not None
    tile = 64
    rows = torch.cat([case.prototypes, torch.full_like(case.prototypes[:tile], 2)])
    present = torch.cat([case.occupied, torch.ones_like(case.occupied[:tile])])
    return case._replace(prototypes=rows[:-tile], occupied=present[:-tile])


def check(operator: str, ops: Operators) -> None:
    if operator == "hardest_negatives":
        test_hardest_negatives.check(ops, test_hardest_negatives.make((6, 700, 33), torch.bfloat16, seed=1), 2, False)
        test_hardest_negatives.test_ties_go_to_the_lower_slot(ops)
        return
    if operator == "margin_softmax_logits":
        os.environ["PROTOMEM_HOST_SCRATCH_BYTES"] = "1"  # several chunks
        for dtype in (torch.bfloat16, torch.float16):
            case = test_negative_logsumexp.make((38, 140, 24), dtype, hard=True, seed=1)
            test_margin_softmax_logits.check(ops, case)
        return
    make, check = test_negative_logsumexp.make, test_negative_logsumexp.check
    for dtype in (torch.bfloat16, torch.float32):
        check(ops, _followed(make((9, 140, 24), dtype, seed=1)))
        case = make((20, 140, 40), dtype, hard=True, normalize=True, running=True, scale=200.0, seed=2)
        check(ops, _followed(case))


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed(name: str, mode: str, tmp_path: Path) -> None:
    assert_noticed(__name__, FAULTS[name], mode, tmp_path)


@pytest.mark.parametrize("operator", sorted({fault.operator for fault in FAULTS.values()}))
def test_the_checks_pass_without_a_fault(operator: str, mode: str, tmp_path: Path) -> None:
    assert_quiet(__name__, operator, FAULTS.values(), mode, tmp_path)
