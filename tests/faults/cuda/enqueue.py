"""Faults in the CUDA kernels of ``enqueue_``, and in what they share with ``aggregate_prototypes``."""

from __future__ import annotations

import torch

from protomem_kernels.backends import reference
from tests.backends.cuda.operators import Operators
from tests.backends.cuda.test_enqueue import HISTORY, enqueue_matches, full_memory, lru_matches, rows_and_identities
from tests.faults.cuda.runner import Fault, without

OWN = "cuda/enqueue.cuh"
ROWS = "cuda/base/rows.cuh"
TICKET = "cuda/base/ticket.cuh"
FAULTS = {
    "rows: one column past the tail": Fault(ROWS, "if (column < D) f(group", "if (column <= D) f(group", "race"),
    "ticket: no fence before it": Fault(
        TICKET, "__threadfence();  // what this block wrote comes before the ticket,", "", "race"
    ),
    "ticket: no fence after it": Fault(TICKET, "  __threadfence();  // and what", "  // and what", "race"),
    "ticket: each thread fences, not the one that draws": Fault(
        TICKET,
        "  __syncthreads();\n  if (threadIdx.x == 0) {\n    __threadfence();",
        "  __threadfence();\n  __syncthreads();\n  if (threadIdx.x == 0) {",
        "race",
    ),
    "ticket: each thread fences after it, not the one that drew": Fault(
        TICKET,
        "    __threadfence();  // and what it reads from here on comes after it\n  }\n  __syncthreads();",
        "  }\n  __syncthreads();\n  if (threadIdx.x != 0) __threadfence();",
        "race",
    ),
    "ticket: the last block but one": Fault(TICKET, "gridDim.x - 1", "gridDim.x - 2"),
    "enqueue: bits of the set written without an atomic": Fault(
        OWN, "atomicOr(&hashes[hash / 32], 1u << (hash % 32))", "hashes[hash / 32] |= 1u << (hash % 32)", "race"
    ),
    "enqueue: no barrier before the set is used": Fault(
        OWN, "  __syncthreads();\n\n  long long oldest", "  long long oldest", "race"
    ),
    "enqueue: the ring wraps one slot late": Fault(OWN, "if (slot >= M) slot -= M", "if (slot > M) slot -= M"),
    "enqueue: the cursor does not wrap": Fault(OWN, "slot + 1 == M ? 0 : slot + 1", "slot + 1"),
    "enqueue: the window ends one slot early": Fault(
        OWN, "inside >= 32 ? ~0u : (1u << inside) - 1", "inside >= 32 ? ~0u >> 1 : (1u << inside) - 1"
    ),
    "enqueue: hits before the cursor": Fault(OWN, "found < cursor ? found + M", "found < cursor ? found"),
    "enqueue: the last usable row leads": Fault(
        OWN, "int k = notes.length[position] - 1; k >= 0; k--", "int k = 0; k < notes.length[position]; k++"
    ),
    "enqueue: the batch's own slots are victims": Fault(OWN, "1u << (found % 32));", "0u);"),
    "enqueue: the odd slot of a pair": Fault(OWN, "* 2 + i % 2", "* 2"),
    "lru: the digit before": Fault(
        OWN, "before < state.wanted && state.wanted <=", "before <= state.wanted && state.wanted <"
    ),
    "lru: keys from the bit that is left out": Fault(
        OWN,
        "state.shift > digit_bits ? state.shift - digit_bits",
        "state.shift > digit_bits ? state.shift - digit_bits - 1",
    ),
    "lru: stamps as signed differences": Fault(
        OWN,
        "1 + Key(static_cast<uint64_t>(stamp) - static_cast<uint64_t>(state.oldest))",
        "1 + Key(static_cast<uint32_t>(stamp - state.oldest))",
    ),
    "lru: ranks with ties": Fault(OWN, "notes.keys[other] < key", "notes.keys[other] <= key"),
    "write: no barrier between the batch's rows and the last block": Fault(
        OWN, "  __syncthreads();\n  int count = 0;", "  int count = 0;", "race"
    ),
    "write: what had to leave": Fault(OWN, "known ? -1 : *identity", "*identity"),
    "write: ratios exchanged": Fault(OWN, "rest * old[group][i] + ratio *", "ratio * old[group][i] + rest *"),
    "write: keeping is forgotten": Fault(OWN, "if (!known || ratio != 0) {", "if (true) {"),
}
# Dtypes and numbers of columns that the checks do not use stand in no mutant.
CUTS = without("cuda/base/tensors.cuh", "f(double())", "f(float16())", "f(bfloat16())")


def check(operators: Operators) -> None:
    kernels = operators.kernels
    for policy in ("fifo", "lru"):
        enqueue_matches(kernels, HISTORY, policy, 9, torch.float32, lambda x: x)
        state, theirs = full_memory(4100), full_memory(4100)
        rest = (*rows_and_identities(4100, 300), 0.2, policy, True)
        outputs = [k["enqueue_"](*s, *rest) for k, s in ((kernels, state), (reference.BACKEND.kernels, theirs))]
        for a, b in zip((*outputs[0], *state), (*outputs[1], *theirs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    lru_matches(kernels, sizes=[300])
