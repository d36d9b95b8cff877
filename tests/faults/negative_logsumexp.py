"""Faults in ``negative_logsumexp``: its contract, the reference and Triton, and the tiles that others share."""

from tests.faults.fault import Fault

REFERENCE = "backends/reference/negative_logsumexp.py"
TILES_OF_THE_MEMORY = "backends/reference/_rows.py"
TRITON = "backends/triton/logsumexp_stream.py"
TRITON_SAMPLES = "backends/triton/logsumexp_samples.py"
TRITON_TILES = "backends/triton/tiles.py"
TRITON_CHOSEN = "backends/triton/chosen_rows.py"
CHUNKED = "backends/chunked/negative_logsumexp.py"
WEIGHTS = "backends/chunked/weights.py"
T_CHUNKS = "tests/backends/chunked/test_chunks.py::test_negative_logsumexp[torch.float32-every option]"
T_TRITON = "tests/backends/triton/test_negative_logsumexp.py"
T_BLOCKS = f"{T_TRITON}::test_small_blocks"
T_LOSS = "tests/ops/test_margin_softmax_loss.py"

FAULTS = [
    Fault("target not excluded", REFERENCE, "put_in_tile_(e, targets - start, 0.0)", "pass", T_LOSS),
    Fault(
        "target not excluded under the running maximum",
        REFERENCE,
        'put_in_tile_(logits, targets - start, float("-inf"))',
        "pass",
        T_LOSS,
    ),
    Fault("empty slots count", REFERENCE, "e *= present[start : start + width]", "pass", T_LOSS),
    Fault(
        "scale missing in the gradient",
        REFERENCE,
        "scale / self.total, 0)",
        "1 / self.total, 0)",
        f"{T_LOSS}::test_value_and_gradients_against_dense_logits",
    ),
    Fault(
        "slope of the hard form missing",
        REFERENCE,
        "e if slope is None else e.mul_(slope)",
        "e",
        f"{T_LOSS}::test_gradcheck_of_the_heavy_operator",
    ),
    Fault(
        "hard form applied to easy negatives",
        REFERENCE,
        "hard = y > ",
        "hard = y < ",
        f"{T_LOSS}::test_gradcheck_of_the_heavy_operator",
    ),
    Fault(
        "quadratic term lost",
        REFERENCE,
        "form = y.mul(g / scale)",
        "form = y.mul(0 * g)",
        f"{T_LOSS}::test_gradcheck_of_the_heavy_operator",
    ),
    Fault(
        "sum not rescaled when the maximum moves",
        REFERENCE,
        "self.total *= rescale",
        "pass",
        f"{T_LOSS}::test_any_scale_from_one_negative_to_many",
    ),
    Fault(
        "offset not added back",
        REFERENCE,
        "self.total.log() + self.shift",
        "self.total.log()",
        f"{T_LOSS}::test_any_scale_from_one_negative_to_many",
    ),
    Fault(
        "target's share of the prototypes' gradient lost",
        REFERENCE,
        "put_in_tile_(p, targets - start, grad_cosine)",
        "put_in_tile_(p, targets - start, 0.0)",
        f"{T_LOSS}::test_value_and_gradients_against_dense_logits",
    ),
    Fault(
        "prototypes' gradient not projected",
        REFERENCE,
        "tile_grad = unit_rows_backward(tile_grad,",
        "_ = unit_rows_backward(tile_grad,",
        f"{T_LOSS}::test_value_and_gradients_against_dense_logits",
    ),
    Fault(
        "chosen negatives include the target",
        REFERENCE,
        "torch.where(slots == targets[:, None], -1, slots)",
        "slots",
        f"{T_LOSS}::test_hard_form_and_chosen_negatives_against_the_formula",
    ),
    Fault(
        "last tile dropped",
        TILES_OF_THE_MEMORY,
        "range(0, prototypes.shape[0], width)",
        "range(0, prototypes.shape[0] - width + 1, width)",
        T_LOSS,
    ),
    Fault(
        "garbage of empty slots seen",
        TILES_OF_THE_MEMORY,
        "tile = keep_rows(tile, present[start : start + width])",
        "pass",
        f"{T_LOSS}::test_garbage_in_empty_slots_is_never_seen",
    ),
    Fault(
        "prototypes kept although overwritten",
        "ops/negative_logsumexp.py",
        "ctx.keeps_prototypes = ctx.needs_input_grad[1]",
        "ctx.keeps_prototypes = True",
        f"{T_LOSS}::test_prototypes_may_be_overwritten_before_backward",
    ),
    Fault(
        "the gradient is written over what a second backward pass needs",
        "ops/negative_logsumexp.py",
        "if graph_is_kept():",
        "if False:",
        f"{T_LOSS}::test_backward_twice_and_nested",
    ),
    Fault(
        "prototypes that were written over are read all the same",
        "ops/negative_logsumexp.py",
        "prototypes is None and kept.outlived_them()",
        "False",
        "tests/ops/test_versions.py::test_what_was_kept_outlives_the_prototypes",
    ),
    Fault(
        "a scaled memory is not saved",
        "ops/negative_logsumexp.py",
        "if kept_rows == x.shape[0] and not normalize_prototypes:",
        "if kept_rows == x.shape[0]:",
        "tests/ops/test_versions.py::test_a_scaled_memory_is_needed_whatever_was_kept",
    ),
    Fault(
        "exponents overflow",
        "ops/negative_logsumexp.py",
        "offset = max(0.0, largest - top)",
        "offset = 0.0",
        f"{T_LOSS}::test_exponent_offset_keeps_every_sum_in_range",
    ),
    Fault(
        "target not excluded by the Triton kernel",
        TRITON,
        'y = tl.where(present[None, :] & (slots[None, :] != targets[:, None]), y, float("-inf"))',
        'y = tl.where(present[None, :], y, float("-inf"))',
        T_BLOCKS,
    ),
    Fault(
        "slots past the end of the memory seen",
        TRITON_TILES,
        "present = slots < capacity\n",
        "present = slots < capacity + 1\n",
        T_BLOCKS,
    ),
    Fault(
        "samples past the end of the batch in the prototypes' gradient",
        TRITON,
        "stacked_keep = stacked < batch\n        stacked += line // BLOCK_ROWS * batch\n        logits",
        "stacked_keep = stacked >= 0\n        stacked += line // BLOCK_ROWS * batch\n        logits",
        T_BLOCKS,
    ),
    Fault(
        "strides of the embeddings swapped",
        TRITON,
        "x = load_rows(x_ptr, stacked, depth, stride_x_row, stride_x_column, stacked_keep, dim)\n\n",
        "x = load_rows(x_ptr, stacked, depth, stride_x_column, stride_x_row, stacked_keep, dim)\n\n",
        T_BLOCKS,
    ),
    Fault(
        "last split dropped",
        TRITON_SAMPLES,
        "for split in range(splits):\n        line = tl.cast(split, tl.int64) * batch + rows\n        weight",
        "for split in range(splits - 1):\n        line = tl.cast(split, tl.int64) * batch + rows\n        weight",
        T_BLOCKS,
    ),
    Fault(
        "splits added without their maxima",
        TRITON_SAMPLES,
        'weight = tl.exp2(tl.load(maxima_ptr + line, mask=keep, other=float("-inf")) - shift)',
        'weight = tl.exp2(tl.load(maxima_ptr + line, mask=keep, other=float("-inf")) * 0)',
        T_BLOCKS,
    ),
    Fault(
        "moment not rescaled when the maximum moves",
        TRITON,
        "moment = moment * rescale[:, None]",
        "moment = moment",
        T_BLOCKS,
    ),
    Fault(
        "hard form's slope missing in the embeddings' gradient",
        TRITON,
        "            if threshold_ptr is not None:\n                e = e * slope\n            if inverse_ptr",
        "            if inverse_ptr",
        T_BLOCKS,
    ),
    Fault(
        "hard form's slope missing in the prototypes' gradient",
        TRITON,
        "        if threshold_ptr is not None:\n            p = p * slope\n        targets",
        "        targets",
        T_BLOCKS,
    ),
    Fault(
        "what the halves leave of x not counted",
        TRITON_SAMPLES,
        "n += tl.sum(rest * o, axis=1)",
        "pass",
        f"{T_TRITON}::test_16_bit_factors_cost_n_no_accuracy",
    ),
    Fault(
        "tile offset in 32 bits",
        TRITON_TILES,
        "columns.to(tl.int64)[None, :] * stride_column\n",
        "columns.to(tl.int64)[None, :] * stride_column\n    offsets = offsets.to(tl.int32)\n",
        f"{T_TRITON}::test_rows_past_two_to_the_31_elements",
    ),
    Fault(
        "products of bfloat16 bits",
        TRITON_TILES,
        "        a = a.to(tl.float32)\n        b = b.to(tl.float32)\n",
        "        a = a\n        b = b\n",
        "tests/backends/triton/test_tiles.py::test_the_product_helper",
    ),
    Fault(
        "only the first entry of a chosen slot counts",
        TRITON_CHOSEN,
        "while current == slot:",
        "while (current == slot) & (position == entry):",
        f"{T_LOSS}::test_gradcheck_of_the_heavy_operator",
    ),
    Fault(
        "target not excluded from a chunk",
        WEIGHTS,
        'y = tl.where(present[None, :] & (slots[None, :] != targets[:, None]), y, float("-inf"))',
        'y = tl.where(present[None, :], y, float("-inf"))',
        T_CHUNKS,
    ),
    Fault(
        "sums of the chunks before not rescaled", WEIGHTS, "total = total * rescale", "total = total * 1.0", T_CHUNKS
    ),
    Fault(
        "o of the chunks before not rescaled",
        CHUNKED,
        "moment[block].mul_(of.rescale[:, None])",
        "pass",
        T_CHUNKS,
    ),
    Fault(
        "rows of empty slots multiplied as they stand",
        "backends/chunked/products.py",
        "return rows if occupied is None else torch.where(occupied[:, None], rows, 0)",
        "return rows",
        T_CHUNKS,
    ),
    Fault("row's own part left in its gradient", TRITON, "c = along * inverse / scale", "c = along * 0.0", T_BLOCKS),
]
