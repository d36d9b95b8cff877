"""Faults in ``margin_softmax_logits``: the reference and Triton."""

from tests.faults.fault import Fault

REFERENCE = "backends/reference/margin_softmax_logits.py"
TRITON = "backends/triton/margin_softmax_logits.py"
T_LOGITS = "tests/ops/test_margin_softmax_logits.py"

FAULTS = [
    Fault(
        "embeddings rounded to the memory's dtype in logits of chunks",
        "backends/chunked/margin_softmax_logits.py",
        "factor, lift = factor_of(x, prototypes, precision.parts(dtype))",
        "factor, lift = factor_of(x, prototypes, 1)",
        "tests/backends/chunked/test_chunks.py::test_the_other_operators[torch.bfloat16-plain]",
    ),
    Fault("margin not written", REFERENCE, "put_in_tile_(values, targets - start, target_logits)", "pass", T_LOGITS),
    Fault("target's gradient counted twice", REFERENCE, "put_in_tile_(g, targets - start, 0.0)", "pass", T_LOGITS),
    Fault("hard negatives' slope missing", REFERENCE, "g = g if slope is None else g * slope", "pass", T_LOGITS),
    Fault("empty slots have logits", TRITON, 'tl.where(present[None, :], values, float("-inf"))', "values", T_LOGITS),
    Fault("the margin forgotten", TRITON, "slots[None, :] == targets[:, None], at", "slots[None, :] < 0, at", T_LOGITS),
    Fault(
        "the last column not written",
        TRITON,
        "mask=rows_kept[:, None] & (slots < capacity)[None, :]",
        "mask=rows_kept[:, None] & (slots < capacity - 1)[None, :]",
        T_LOGITS,
    ),
    Fault("the target's slope", TRITON, "& (slots[None, :] + first != targets[:, None])", "", T_LOGITS),
    Fault(
        "the target sought in its chunk",
        TRITON,
        "slots[None, :] + first != targets",
        "slots[None, :] != targets",
        f"{T_LOGITS}::test_many_tiles_equal_the_reference",
    ),
    Fault(
        "later chunks begin again",
        TRITON,
        "CONTINUES=first > 0",
        "CONTINUES=False",
        f"{T_LOGITS}::test_many_tiles_equal_the_reference",
    ),
    Fault(
        "strides of H swapped",
        TRITON,
        "rows.to(tl.int64)[:, None] * stride_row + slots[None, :] * stride_column",
        "rows.to(tl.int64)[:, None] * stride_column + slots[None, :] * stride_row",
        T_LOGITS,
    ),
    Fault(
        "broken embeddings passed on",
        TRITON,
        "torch.isfinite(x).all(dim=1)",
        "torch.isfinite(x).any(dim=1) | True",
        f"{T_LOGITS}::test_many_tiles_equal_the_reference",
    ),
    Fault("gradient of unit rows", TRITON, "g - tl.sum(g * unit, axis=1)[:, None] * unit", "g", T_LOGITS),
]
