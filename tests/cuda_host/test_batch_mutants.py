"""Small faults in the CUDA kernels of the batch operators, one at a time: each has to be noticed by the checks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from protomem_kernels import reference
from tests.cuda_host.batch_checks import (
    HISTORY,
    aggregate_matches,
    batch,
    enqueue_matches,
    full_memory,
    lru_matches,
    padded,
    rows_and_identities,
    sums_in_batch_order,
)
from tests.cuda_host.mutants import Fault, assert_noticed, assert_quiet
from tests.cuda_host.operators import Operators

AGGREGATE, ENQUEUE = "cuda/aggregate_prototypes.cuh", "cuda/enqueue.cuh"
ROWS, TICKET, RANKS = "common/cuda/rows.cuh", "common/cuda/ticket.cuh", "cuda/ranks.cuh"
FAULTS = {
    "aggregate: no barrier after the tile's lengths": Fault(
        "aggregate_prototypes",
        AGGREGATE,
        "    __syncthreads();\n    for (int k = 0; k < tile; k++) {",
        "    for (int k = 0; k < tile; k++) {",
        "race",
    ),
    "aggregate: no barrier before the next tile": Fault(
        "aggregate_prototypes", AGGREGATE, "__syncthreads();  // the tile before has been added up", "", "race"
    ),
    "aggregate: the flags of a block's own position counted": Fault(
        "aggregate_prototypes",
        AGGREGATE,
        "flags_before(flags.x, position - at)",
        "flags_before(flags.x, position - at + 1)",
    ),
    "aggregate: the weight of a bad sample": Fault(
        "aggregate_prototypes", AGGREGATE, "weight > 0 && ", "weight == weight && "
    ),
    "aggregate: one identity too many": Fault(
        "aggregate_prototypes", AGGREGATE, "number >= rows) return", "number > rows) return"
    ),
    "backward: the direction along the embedding stays": Fault(
        "aggregate_prototypes", AGGREGATE, "t - along * by_size(e[i])", "t + along * by_size(e[i])"
    ),
    "backward: an index past the rows": Fault(
        "aggregate_prototypes", AGGREGATE, "row >= prototypes.rows", "row > prototypes.rows + (1ll << 50)", "sanitized"
    ),
    "rows: one column past the tail": Fault(
        "enqueue", ROWS, "if (column < D) f(group", "if (column <= D) f(group", "race"
    ),
    "rows: unaligned rows read as vectors": Fault("aggregate_prototypes", ROWS, "x.cols % WIDTH == 0 &&", "", "plain"),
    "ranks: later equals counted": Fault(
        "aggregate_prototypes", RANKS, "same && other < row + r", "same && other > row + r"
    ),
    "ticket: no fence before it": Fault(
        "enqueue", TICKET, "__threadfence();  // what this thread wrote comes before the ticket,", "", "race"
    ),
    "ticket: no fence after it": Fault("enqueue", TICKET, "  __threadfence();  // and what", "  // and what", "race"),
    "ticket: the last block but one": Fault("enqueue", TICKET, "gridDim.x - 1", "gridDim.x - 2"),
    "enqueue: bits of the set written without an atomic": Fault(
        "enqueue",
        ENQUEUE,
        "atomicOr(&hashes[hash / 32], 1u << (hash % 32))",
        "hashes[hash / 32] |= 1u << (hash % 32)",
        "race",
    ),
    "enqueue: no barrier before the set is used": Fault(
        "enqueue", ENQUEUE, "  __syncthreads();\n\n  long long oldest", "  long long oldest", "race"
    ),
    "enqueue: the ring wraps one slot late": Fault(
        "enqueue", ENQUEUE, "if (slot >= M) slot -= M", "if (slot > M) slot -= M"
    ),
    "enqueue: the cursor does not wrap": Fault("enqueue", ENQUEUE, "slot + 1 == M ? 0 : slot + 1", "slot + 1"),
    "enqueue: the window ends one slot early": Fault(
        "enqueue", ENQUEUE, "inside >= 32 ? ~0u : (1u << inside) - 1", "inside >= 32 ? ~0u >> 1 : (1u << inside) - 1"
    ),
    "enqueue: hits before the cursor": Fault(
        "enqueue", ENQUEUE, "found < cursor ? found + M", "found < cursor ? found"
    ),
    "enqueue: the last usable row leads": Fault(
        "enqueue",
        ENQUEUE,
        "int k = notes.length[position] - 1; k >= 0; k--",
        "int k = 0; k < notes.length[position]; k++",
    ),
    "enqueue: the batch's own slots are victims": Fault("enqueue", ENQUEUE, "1u << (found % 32));", "0u);"),
    "enqueue: the odd slot of a pair": Fault("enqueue", ENQUEUE, "* 2 + i % 2", "* 2"),
    "lru: the digit before": Fault(
        "enqueue", ENQUEUE, "before < state.wanted && state.wanted <=", "before <= state.wanted && state.wanted <"
    ),
    "lru: keys from the bit that is left out": Fault(
        "enqueue",
        ENQUEUE,
        "state.shift > digit_bits ? state.shift - digit_bits",
        "state.shift > digit_bits ? state.shift - digit_bits - 1",
    ),
    "lru: stamps as signed differences": Fault(
        "enqueue",
        ENQUEUE,
        "1 + Key(static_cast<uint64_t>(stamp) - static_cast<uint64_t>(state.oldest))",
        "1 + Key(static_cast<uint32_t>(stamp - state.oldest))",
    ),
    "lru: ranks with ties": Fault("enqueue", ENQUEUE, "notes.keys[other] < key", "notes.keys[other] <= key"),
    "write: no barrier between the batch's rows and the last block": Fault(
        "enqueue", ENQUEUE, "  __syncthreads();\n  int count = 0;", "  int count = 0;", "race"
    ),
    "write: what had to leave": Fault("enqueue", ENQUEUE, "known ? -1 : *identity", "*identity"),
    "write: ratios exchanged": Fault(
        "enqueue", ENQUEUE, "rest * old[group][i] + ratio *", "ratio * old[group][i] + rest *"
    ),
    "write: keeping is forgotten": Fault("enqueue", ENQUEUE, "if (!known || ratio != 0) {", "if (true) {"),
}


def check(operator: str, operators: Operators) -> None:
    kernels = operators.kernels
    if operator == "aggregate_prototypes":
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
        return
    for policy in ("fifo", "lru"):
        enqueue_matches(kernels, HISTORY, policy, 9, torch.float32, lambda x: x)
        state, theirs = full_memory(4100), full_memory(4100)
        rest = (*rows_and_identities(4100, 300), 0.2, policy, True)
        outputs = [k["enqueue_"](*s, *rest) for k, s in ((kernels, state), (reference.KERNELS, theirs))]
        for a, b in zip((*outputs[0], *state), (*outputs[1], *theirs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    lru_matches(kernels, sizes=[300])


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed(name: str, mode: str, tmp_path: Path) -> None:
    assert_noticed(__name__, FAULTS[name], mode, tmp_path)


@pytest.mark.parametrize("operator", sorted({fault.operator for fault in FAULTS.values()}))
def test_the_checks_pass_without_a_fault(operator: str, mode: str, tmp_path: Path) -> None:
    assert_quiet(__name__, operator, FAULTS.values(), mode, tmp_path)
