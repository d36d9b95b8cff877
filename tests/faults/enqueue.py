"""Faults in ``enqueue_``: the reference and Triton."""

from tests.faults.fault import Fault

REFERENCE = "backends/reference/enqueue.py"
TRITON = "backends/triton/enqueue.py"
T_ENQUEUE = "tests/ops/test_enqueue.py"
T_TRITON = "tests/backends/triton/test_enqueue.py"
T_WRITE = f"{T_TRITON}::test_enqueue_in_small_blocks"

FAULTS = [
    Fault(
        "off by one at the ring's wrap", REFERENCE, "(last + 1) % memory_identities.shape[0]", "(last + 1)", T_ENQUEUE
    ),
    Fault("cursor does not move past the last slot", REFERENCE, "(last + 1) %", "last %", T_ENQUEUE),
    Fault(
        "refresh ratio inverted",
        "rows.py",
        "(1 - refresh_ratio) * old + refresh_ratio * p",
        "refresh_ratio * old + (1 - refresh_ratio) * p",
        T_ENQUEUE,
    ),
    Fault(
        "refreshed row not scaled",
        "rows.py",
        "return unit_rows(torch.where((known & keeps_direction)[:, None], blend, p))",
        "return torch.where((known & keeps_direction)[:, None], blend, p)",
        T_ENQUEUE,
    ),
    Fault("vanished sum kept", "rows.py", "VANISHED = 1e-6", "VANISHED = -1.0", T_ENQUEUE),
    Fault(
        "batch members evict each other",
        REFERENCE,
        "free = (~matched[window]).cumsum(0)",
        "free = torch.ones_like(matched[window]).cumsum(0)",
        T_ENQUEUE,
    ),
    Fault("non-finite prototypes enter", REFERENCE, "torch.isfinite(p).all(dim=1) & ", "", T_ENQUEUE),
    Fault("zero prototypes enter", REFERENCE, "(p != 0).any(dim=1) & ", "", T_ENQUEUE),
    Fault(
        "lru prefers the youngest",
        REFERENCE,
        "matched, int64.max, age)",
        "matched, int64.max, -age)",
        f"{T_ENQUEUE}::test_least_recently_written_leaves_first",
    ),
    Fault(
        "lru forgets empty slots",
        REFERENCE,
        "identities >= 0, stamps, int64.min)",
        "identities >= -1, stamps, int64.min)",
        f"{T_ENQUEUE}::test_lru_takes_empty_slots_first_whatever_the_stamps_say",
    ),
    Fault(
        "stamps one behind",
        REFERENCE,
        "torch.where(some, clock, stamps[0])",
        "torch.where(some, clock - 1, stamps[0])",
        T_ENQUEUE,
    ),
    Fault("duplicates enter twice", REFERENCE, "leads = usable & (first == row)", "leads = usable", T_ENQUEUE),
    Fault(
        "a value is read back on a GPU",
        REFERENCE,
        "victims.index_select(0, place[-1:].clamp(min=0))[0]",
        "victims[place[-1].clamp(min=0)]",
        "tests/ops/test_no_synchronisation.py",
    ),
    Fault(
        "offset of a slot in 32 bits",
        TRITON,
        "row = slot * stride_slot",
        "row = slot.to(tl.int32) * stride_slot",
        f"{T_ENQUEUE}::test_rows_past_two_to_the_31_elements",
    ),
    Fault(
        "off by one at the ring's wrap", TRITON, "cursor_ptr, (slot + 1) % capacity", "cursor_ptr, slot + 1", T_WRITE
    ),
    Fault(
        "off by one before the cursor",
        TRITON,
        "past + capacity, past",
        "past + capacity - 1, past",
        f"{T_TRITON}::test_enqueue_survives_a_memory_that_breaks_its_invariants",
    ),
    Fault("hits are victims", TRITON, "past < place + middle", "past < place + middle - 1", T_WRITE),
    Fault("greatest identity never found", TRITON, "(middle < size)", "(middle < size - 1)", T_WRITE),
    Fault("last slot never found", TRITON, "inside = slot < capacity\n", "inside = slot < capacity - 1\n", T_WRITE),
    Fault("the last row of an identity leads", TRITON, "(leader < 0) & (usable != 0)", "usable != 0", T_WRITE),
    Fault("hits leave by age", TRITON, "tl.where(hit, NEWEST, ", "tl.where(hit, stamp, ", T_WRITE),
    Fault(
        "strides of the memory swapped",
        TRITON,
        "slot * stride_slot + columns * stride_slot_column",
        "slot * stride_slot_column + columns * stride_slot",
        T_WRITE,
    ),
    Fault(
        "kept rows scaled anew",
        TRITON,
        "mask=inside & changes)",
        "mask=inside)",
        f"{T_ENQUEUE}::test_refresh_ratio_zero_keeps_every_bit",
    ),
    Fault(
        "rows read while being written",
        TRITON,
        "prototypes = prototypes.clone()",
        "pass",
        f"{T_TRITON}::test_enqueue_of_the_memory_s_own_rows",
    ),
]
