"""Faults in ``hardest_negatives``: the reference and Triton."""

from tests.faults.fault import Fault

REFERENCE = "backends/reference/hardest_negatives.py"
TRITON = "backends/triton/hardest_negatives.py"
TRITON_COSINES = "backends/triton/cosines.py"
T_TOP = "tests/ops/test_hardest_negatives.py"

FAULTS = [
    Fault(
        "maxima of a chunk's tiles written a tile too far",
        "backends/chunked/hardest_negatives.py",
        "// TILE_SLOTS + tl.arange(0, GROUPS)\n",
        "// TILE_SLOTS + 1 + tl.arange(0, GROUPS)\n",
        "tests/backends/chunked/test_chunks.py::test_the_other_operators[torch.float32-plain]",
    ),
    Fault(
        "ties to the higher slot",
        REFERENCE,
        "tied.cumsum(dim=1, dtype=torch.int32) <= room",
        "tied.flip(1).cumsum(dim=1, dtype=torch.int32).flip(1) <= room",
        f"{T_TOP}::test_ties_go_to_the_lower_slot",
    ),
    Fault("target among its own negatives", REFERENCE, "put_in_tile_(cosines, targets - start, NONE)", "pass", T_TOP),
    Fault(
        "empty slots among the negatives",
        REFERENCE,
        "cosines += minus_infinity_unless(occupied[start : start + width], cosines.dtype)",
        "pass",
        f"{T_TOP}::test_ties_go_to_the_lower_slot",
    ),
    Fault(
        "not descending",
        REFERENCE,
        "best.sort(dim=1, descending=True, stable=True)",
        "best.sort(dim=1, descending=False, stable=True)",
        f"{T_TOP}::test_exact",
    ),
    Fault(
        "in the order of rounded cosines",
        REFERENCE,
        "best, order = best.sort(dim=1, descending=True, stable=True)",
        "order = best.half().argsort(dim=1, descending=True, stable=True); best = best.gather(1, order)",
        f"{T_TOP}::test_sorted_by_the_very_values_that_are_returned",
    ),
    Fault(
        "slots of the first tile everywhere",
        REFERENCE,
        "torch.arange(start, start + tile.shape[0]",
        "torch.arange(0, tile.shape[0]",
        T_TOP,
    ),
    Fault(
        "ties as topk leaves them",
        TRITON,
        "    return columns\n",
        "    return values.topk(k, dim=1).indices.sort(dim=1).values\n",
        f"{T_TOP}::test_ties_go_to_the_lower_slot",
    ),
    Fault(
        "the result's ties reversed",
        TRITON,
        "values.gather(1, columns).sort(dim=1, descending=True, stable=True)",
        "values.gather(1, columns).flip(1).sort(dim=1, descending=True, stable=True)",
        f"{T_TOP}::test_exact[6-5x130x33-float64-triton]",
    ),
    Fault(
        "one best tile too few",
        TRITON,
        "chosen = min(k, tiles)",
        "chosen = min(max(1, k - 1), tiles)",
        f"{T_TOP}::test_each_of_the_best_in_a_tile_of_its_own",
    ),
    Fault("the target is a negative", TRITON, "(lanes[None, :] != at_target[:, None])", "(lanes[None, :] >= 0)", T_TOP),
    Fault(
        "NaN is a cosine",
        TRITON,
        "negative & (values == values)",
        "negative",
        f"{T_TOP}::test_a_broken_prototype_hides_no_other",
    ),
    Fault(
        "broken embeddings found",
        TRITON,
        "torch.where(broken, -1, slots)",
        "slots",
        f"{T_TOP}::test_an_infinite_row_has_no_negatives",
    ),
    Fault(
        "strides of the gradient swapped",
        TRITON,
        "row * stride_grad_row + at.to(tl.int64) * stride_grad_column",
        "row * stride_grad_column + at.to(tl.int64) * stride_grad_row",
        f"{T_TOP}::test_gradcheck",
    ),
    Fault(
        "scratch pieces overlap",
        TRITON,
        "rows.start + part.start, rows.start + part.stop",
        "part.start, part.stop",
        f"{T_TOP}::test_scratch_space_changes_nothing",
    ),
    Fault("two of three parts", TRITON_COSINES, "dot(middle, tl.trans(w), dot(low, tl.trans(w), acc))", "acc", T_TOP),
    Fault(
        "the first columns only",
        TRITON_COSINES,
        "columns = first + tl.arange(0, BLOCK_DEPTH)\n        x =",
        "columns = tl.arange(0, BLOCK_DEPTH)\n        x =",
        f"{T_TOP}::test_long_embeddings",
    ),
]
