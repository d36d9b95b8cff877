"""The list of faults: which line becomes which, and the tests that must fail for it."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """Replace ``before`` by ``after`` in ``file`` (once); then ``tests`` must fail."""

    name: str
    file: str
    before: str
    after: str
    tests: str

    @property
    def in_triton(self) -> bool:
        """Whether the fault is in a Triton kernel, which its tests run in the interpreter."""
        return self.file.startswith("triton/")


AGGREGATE = "reference/aggregate_prototypes.py"
ENQUEUE = "reference/enqueue.py"
SUM = "reference/negative_logsumexp.py"
TOP = "reference/hardest_negatives.py"
LOGITS = "reference/margin_softmax_logits.py"
ROWS = "reference/_rows.py"
LOSS = "ops/margin_softmax_loss.py"
TRITON_TOP = "triton/hardest_negatives.py"
TRITON_LOGITS = "triton/margin_softmax_logits.py"
TRITON_COSINES = "triton/cosines.py"
TRITON_ROWS = "triton/rows.py"
TRITON_AGGREGATE = "triton/aggregate_prototypes.py"
TRITON_ENQUEUE = "triton/enqueue.py"
TRITON_SUM = "triton/negative_logsumexp.py"
TRITON_TILES = "triton/tiles.py"
TRITON_CHOSEN = "triton/chosen_rows.py"

T_AGGREGATE = "tests/ops/test_aggregate_prototypes.py"
T_ENQUEUE = "tests/ops/test_enqueue.py"
T_BATCH = "tests/ops/test_triton_batch.py"
T_SUM = f"{T_BATCH}::test_aggregate_in_small_blocks"
T_WRITE = f"{T_BATCH}::test_enqueue_in_small_blocks"
T_STREAM = "tests/ops/test_triton_stream.py"
T_BLOCKS = f"{T_STREAM}::test_small_blocks"
T_LOSS = "tests/ops/test_margin_softmax_loss.py"
T_TOP = "tests/ops/test_hardest_negatives.py"
T_LOGITS = "tests/ops/test_margin_softmax_logits.py"
T_REGISTRATION = "tests/ops/test_registration.py"
T_LOSSES = "tests/test_losses.py"
T_MEMORY = "tests/test_memory.py"
T_MARGINS = "tests/test_margins.py"
T_MINING = "tests/test_mining.py"
T_QUALITY = "tests/test_quality.py"
T_SAMPLING = "tests/test_sampling.py"
T_EVALUATION = "tests/test_evaluation.py"

FAULTS = [
    # aggregate_prototypes
    Fault("missing normalisation of the embeddings", AGGREGATE, "x = unit_rows(x)", "pass", T_AGGREGATE),
    Fault("weights ignored", AGGREGATE, "total = sum_rows(q[:, None] * x", "total = sum_rows(x", T_AGGREGATE),
    Fault(
        "zero mass divides",
        AGGREGATE,
        "take(mass, index) > 0, given, 1)",
        "take(mass, index) > 0, given, 0)",
        f"{T_AGGREGATE}::test_zero_weights_count_equally",
    ),
    Fault("antipodal images kept", AGGREGATE, "ANTIPODAL = 1e-6", "ANTIPODAL = -1.0", T_AGGREGATE),
    Fault("negative labels take part", AGGREGATE, "first &= ordered >= 0", "first &= ordered >= -1", T_AGGREGATE),
    Fault(
        "gradient not projected", AGGREGATE, "(grad_prototypes - along * prototypes)", "(grad_prototypes)", T_AGGREGATE
    ),
    Fault("gradient of the mass lost", AGGREGATE, " + take(grad_mass, index)", "", f"{T_AGGREGATE}::test_gradcheck"),
    Fault(
        "gradient ignores the weight",
        AGGREGATE,
        "grad = q[:, None] * grad_sum",
        "grad = grad_sum",
        f"{T_AGGREGATE}::test_gradcheck",
    ),
    Fault(
        "bad weights count",
        AGGREGATE,
        "torch.isfinite(weights) & (weights > 0), weights, 0)",
        "weights != 0, weights, 0)",
        f"{T_REGISTRATION}::test_unchecked_values_are_harmless",
    ),
    # enqueue_
    Fault("off by one at the ring's wrap", ENQUEUE, "(last + 1) % memory_identities.shape[0]", "(last + 1)", T_ENQUEUE),
    Fault("cursor does not move past the last slot", ENQUEUE, "(last + 1) %", "last %", T_ENQUEUE),
    Fault(
        "refresh ratio inverted",
        ENQUEUE,
        "(1 - refresh_ratio) * old + refresh_ratio * p",
        "refresh_ratio * old + (1 - refresh_ratio) * p",
        T_ENQUEUE,
    ),
    Fault(
        "refreshed row not scaled",
        ENQUEUE,
        "return unit_rows(torch.where((known & keeps_direction)[:, None], blend, p))",
        "return torch.where((known & keeps_direction)[:, None], blend, p)",
        T_ENQUEUE,
    ),
    Fault("vanished sum kept", ENQUEUE, "VANISHED = 1e-6", "VANISHED = -1.0", T_ENQUEUE),
    Fault(
        "batch members evict each other",
        ENQUEUE,
        "free = (~matched[window]).cumsum(0)",
        "free = torch.ones_like(matched[window]).cumsum(0)",
        T_ENQUEUE,
    ),
    Fault("non-finite prototypes enter", ENQUEUE, "torch.isfinite(p).all(dim=1) & ", "", T_ENQUEUE),
    Fault("zero prototypes enter", ENQUEUE, "(p != 0).any(dim=1) & ", "", T_ENQUEUE),
    Fault(
        "lru prefers the youngest",
        ENQUEUE,
        "matched, int64.max, age)",
        "matched, int64.max, -age)",
        f"{T_ENQUEUE}::test_least_recently_written_leaves_first",
    ),
    Fault(
        "lru forgets empty slots",
        ENQUEUE,
        "identities >= 0, stamps, int64.min)",
        "identities >= -1, stamps, int64.min)",
        f"{T_ENQUEUE}::test_lru_takes_empty_slots_first_whatever_the_stamps_say",
    ),
    Fault(
        "stamps one behind",
        ENQUEUE,
        "torch.where(some, clock, stamps[0])",
        "torch.where(some, clock - 1, stamps[0])",
        T_ENQUEUE,
    ),
    Fault("duplicates enter twice", ENQUEUE, "leads = usable & (first == row)", "leads = usable", T_ENQUEUE),
    Fault(
        "a value is read back on a GPU",
        ENQUEUE,
        "victims.index_select(0, place[-1:].clamp(min=0))[0]",
        "victims[place[-1].clamp(min=0)]",
        "tests/ops/test_no_synchronisation.py",
    ),
    # Triton kernels of these two
    Fault(
        "last label not sorted", TRITON_ROWS, "mask=index < size, other=-1", "mask=index < size - 1, other=-1", T_SUM
    ),
    Fault(
        "order not stable", TRITON_ROWS, "(others[None, :] < rows[:, None])", "(others[None, :] > rows[:, None])", T_SUM
    ),
    Fault(
        "squares of rows underflow",
        TRITON_ROWS,
        "y = x / safe[:, None]",
        "y = x",
        f"{T_AGGREGATE}::test_huge_and_tiny_embeddings_keep_their_direction",
    ),
    Fault("mask at a segment's tail", TRITON_AGGREGATE, "keep = at < length\n", "keep = at <= length\n", T_SUM),
    Fault(
        "strides of the embeddings swapped",
        TRITON_AGGREGATE,
        "x = load_rows(embeddings_ptr, samples, columns, stride_embedding, stride_column,",
        "x = load_rows(embeddings_ptr, samples, columns, stride_column, stride_embedding,",
        T_SUM,
    ),
    Fault(
        "weightless identities get nothing",
        TRITON_AGGREGATE,
        "weights = tl.where(mass > 0, weights, 1.0)",
        "weights = tl.where(mass > 0, weights, 0.0)",
        T_SUM,
    ),
    Fault(
        "antipodal images kept",
        TRITON_AGGREGATE,
        "tl.constexpr(1e-6)",
        "tl.constexpr(-1.0)",
        f"{T_AGGREGATE}::test_almost_antipodal_images_have_no_direction",
    ),
    Fault("unused rows not written", TRITON_AGGREGATE, "sum_kernel[(max(size, rows),)]", "sum_kernel[(size,)]", T_SUM),
    Fault("rows past the last written", TRITON_AGGREGATE, "& (number < rows)", "& (number <= rows)", T_SUM),
    Fault("gradient not projected", TRITON_AGGREGATE, "(t - along[:, None] * x)", "(t)", T_SUM),
    Fault(
        "offset of an embedding in 32 bits",
        "triton/tiles.py",
        "offsets = rows.to(tl.int64)[:, None] * stride_row",
        "offsets = rows.to(tl.int32)[:, None] * stride_row",
        f"{T_AGGREGATE}::test_embeddings_past_two_to_the_31_elements",
    ),
    Fault(
        "offset of a slot in 32 bits",
        TRITON_ENQUEUE,
        "row = slot * stride_slot",
        "row = slot.to(tl.int32) * stride_slot",
        f"{T_ENQUEUE}::test_rows_past_two_to_the_31_elements",
    ),
    Fault(
        "off by one at the ring's wrap",
        TRITON_ENQUEUE,
        "cursor_ptr, (slot + 1) % capacity",
        "cursor_ptr, slot + 1",
        T_WRITE,
    ),
    Fault(
        "off by one before the cursor",
        TRITON_ENQUEUE,
        "past + capacity, past",
        "past + capacity - 1, past",
        f"{T_BATCH}::test_enqueue_survives_a_memory_that_breaks_its_invariants",
    ),
    Fault("hits are victims", TRITON_ENQUEUE, "past < place + middle", "past < place + middle - 1", T_WRITE),
    Fault("greatest identity never found", TRITON_ENQUEUE, "(middle < size)", "(middle < size - 1)", T_WRITE),
    Fault(
        "last slot never found", TRITON_ENQUEUE, "inside = slot < capacity\n", "inside = slot < capacity - 1\n", T_WRITE
    ),
    Fault("the last row of an identity leads", TRITON_ENQUEUE, "(leader < 0) & (usable != 0)", "usable != 0", T_WRITE),
    Fault("hits leave by age", TRITON_ENQUEUE, "tl.where(hit, NEWEST, ", "tl.where(hit, stamp, ", T_WRITE),
    Fault(
        "strides of the memory swapped",
        TRITON_ENQUEUE,
        "slot * stride_slot + columns * stride_slot_column",
        "slot * stride_slot_column + columns * stride_slot",
        T_WRITE,
    ),
    Fault(
        "kept rows scaled anew",
        TRITON_ENQUEUE,
        "mask=inside & changes)",
        "mask=inside)",
        f"{T_ENQUEUE}::test_refresh_ratio_zero_keeps_every_bit",
    ),
    Fault(
        "rows read while being written",
        TRITON_ENQUEUE,
        "prototypes = prototypes.clone()",
        "pass",
        f"{T_BATCH}::test_enqueue_of_the_memory_s_own_rows",
    ),
    # negative_logsumexp
    Fault("target not excluded", SUM, "put_in_tile_(e, targets - start, 0.0)", "pass", T_LOSS),
    Fault(
        "target not excluded under the running maximum",
        SUM,
        'put_in_tile_(logits, targets - start, float("-inf"))',
        "pass",
        T_LOSS,
    ),
    Fault("empty slots count", SUM, "e *= present[start : start + width]", "pass", T_LOSS),
    Fault(
        "scale missing in the gradient",
        SUM,
        "scale / self.total, 0)",
        "1 / self.total, 0)",
        f"{T_LOSS}::test_value_and_gradients_against_dense_logits",
    ),
    Fault(
        "slope of the hard form missing",
        SUM,
        "e if slope is None else e.mul_(slope)",
        "e",
        f"{T_LOSS}::test_gradcheck_of_the_heavy_operator",
    ),
    Fault(
        "hard form applied to easy negatives",
        SUM,
        "hard = y > ",
        "hard = y < ",
        f"{T_LOSS}::test_gradcheck_of_the_heavy_operator",
    ),
    Fault(
        "quadratic term lost",
        SUM,
        "form = y.mul(g / scale)",
        "form = y.mul(0 * g)",
        f"{T_LOSS}::test_gradcheck_of_the_heavy_operator",
    ),
    Fault(
        "sum not rescaled when the maximum moves",
        SUM,
        "self.total *= rescale",
        "pass",
        f"{T_LOSS}::test_any_scale_from_one_negative_to_many",
    ),
    Fault(
        "offset not added back",
        SUM,
        "self.total.log() + self.shift",
        "self.total.log()",
        f"{T_LOSS}::test_any_scale_from_one_negative_to_many",
    ),
    Fault(
        "target's share of the prototypes' gradient lost",
        SUM,
        "put_in_tile_(p, targets - start, grad_cosine)",
        "put_in_tile_(p, targets - start, 0.0)",
        f"{T_LOSS}::test_value_and_gradients_against_dense_logits",
    ),
    Fault(
        "prototypes' gradient not projected",
        SUM,
        "tile_grad = unit_rows_backward(tile_grad,",
        "_ = unit_rows_backward(tile_grad,",
        f"{T_LOSS}::test_value_and_gradients_against_dense_logits",
    ),
    Fault(
        "chosen negatives include the target",
        SUM,
        "torch.where(slots == targets[:, None], -1, slots)",
        "slots",
        f"{T_LOSS}::test_hard_form_and_chosen_negatives_against_the_formula",
    ),
    Fault(
        "last tile dropped",
        ROWS,
        "range(0, prototypes.shape[0], width)",
        "range(0, prototypes.shape[0] - width + 1, width)",
        T_LOSS,
    ),
    Fault(
        "garbage of empty slots seen",
        ROWS,
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
        "exponents overflow",
        "ops/negative_logsumexp.py",
        "offset = max(0.0, largest - top)",
        "offset = 0.0",
        f"{T_LOSS}::test_exponent_offset_keeps_every_sum_in_range",
    ),
    # hardest_negatives
    Fault(
        "ties to the higher slot",
        TOP,
        "tied.cumsum(dim=1, dtype=torch.int32) <= room",
        "tied.flip(1).cumsum(dim=1, dtype=torch.int32).flip(1) <= room",
        f"{T_TOP}::test_ties_go_to_the_lower_slot",
    ),
    Fault("target among its own negatives", TOP, "put_in_tile_(cosines, targets - start, NONE)", "pass", T_TOP),
    Fault(
        "empty slots among the negatives",
        TOP,
        "cosines += minus_infinity_unless(occupied[start : start + width], cosines.dtype)",
        "pass",
        f"{T_TOP}::test_ties_go_to_the_lower_slot",
    ),
    Fault(
        "not descending",
        TOP,
        "best.sort(dim=1, descending=True, stable=True)",
        "best.sort(dim=1, descending=False, stable=True)",
        f"{T_TOP}::test_exact",
    ),
    Fault(
        "slots of the first tile everywhere",
        TOP,
        "torch.arange(start, start + tile.shape[0]",
        "torch.arange(0, tile.shape[0]",
        T_TOP,
    ),
    # margin_softmax_logits
    Fault("margin not written", LOGITS, "put_in_tile_(values, targets - start, target_logits)", "pass", T_LOGITS),
    Fault("target's gradient counted twice", LOGITS, "put_in_tile_(g, targets - start, 0.0)", "pass", T_LOGITS),
    Fault("hard negatives' slope missing", LOGITS, "g = g if slope is None else g * slope", "pass", T_LOGITS),
    # the loss around them
    Fault(
        "ignored samples counted in the mean",
        LOSS,
        "loss / kept.sum().clamp(min=1)",
        "loss / max(kept.numel(), 1)",
        T_LOSS,
    ),
    Fault(
        "sign of the target logit",
        LOSS,
        "excess = n - scale * target_map(cosine)",
        "excess = n + scale * target_map(cosine)",
        T_LOSS,
    ),
    Fault("NaN of ignored samples leaks", LOSS, "torch.where(counts[:, None], embeddings, 0)", "embeddings", T_LOSS),
    Fault(
        "both banks empty gives NaN",
        LOSS,
        'neither = (a == float("-inf")) & (b == float("-inf"))',
        "neither = torch.zeros_like(a, dtype=torch.bool)",
        T_LOSSES,
    ),
    Fault(
        "hardest negatives of each bank, not of both",
        LOSS,
        "list(torch.where(kept, slots, -1)",
        "list(torch.where(kept | True, slots, -1)",
        T_LOSS,
    ),
    Fault(
        "autocast reaches the products",
        "ops/dispatch.py",
        "with without_autocast(tensors[0]):",
        "with contextlib.nullcontext():",
        T_LOSS,
    ),
    # margins, mining, quality
    Fault(
        "margin subtracted from the angle",
        "margins.py",
        "return cosine * m.cos() - safe_sine(cosine) * m.sin()",
        "return cosine * m.cos() + safe_sine(cosine) * m.sin()",
        T_MARGINS,
    ),
    Fault(
        "guard missing",
        "margins.py",
        "torch.where(cosine >= -m.cos(), add_angle(cosine, m), cosine - m * m.sin())",
        "add_angle(cosine, m)",
        T_MARGINS,
    ),
    Fault(
        "derivative unbounded at one",
        "margins.py",
        "differentiable = squared.clamp(min=floor).sqrt()",
        "differentiable = squared.clamp(min=0).sqrt()",
        T_MARGINS,
    ),
    Fault(
        "AdaFace's statistics follow a single sample",
        "margins.py",
        "torch.where(number > 1, self.momentum, 0.0)",
        "torch.where(number > 0, self.momentum, 0.0)",
        T_MARGINS,
    ),
    Fault("CurricularFace's t not updated", "mining.py", "self._update(target_cosine, counts)", "pass", T_MINING),
    Fault(
        "easy samples kept",
        "mining.py",
        "argsort(descending=True, stable=True)",
        "argsort(descending=False, stable=True)",
        T_MINING,
    ),
    Fault(
        "own image among the others",
        "quality.py",
        "unit_embeddings(same @ x - x)",
        "unit_embeddings(same @ x)",
        T_QUALITY,
    ),
    # modules
    Fault(
        "eval writes",
        "losses.py",
        "if self.training else self._read(embeddings, labels)",
        "if True else self._read(embeddings, labels)",
        T_LOSSES,
    ),
    Fault(
        "fresh rows stay in the memory too",
        "losses.py",
        "self.memory.occupied & ~written",
        "self.memory.occupied",
        T_LOSSES,
    ),
    Fault(
        "momentum survives a change of identity",
        "losses.py",
        "value.masked_fill_(mask, 0)",
        "pass",
        f"{T_LOSSES}::test_the_optimiser_steps_rows_that_stay_of_unit_length",
    ),
    Fault(
        "broken embeddings hidden",
        "losses.py",
        "return torch.where(broken, 0, targets)",
        "return targets",
        f"{T_LOSSES}::test_a_non_finite_embedding_shows_in_its_own_loss_alone",
    ),
    Fault(
        "rows not of unit length after a step",
        "losses.py",
        "optimizer.register_step_post_hook(",
        "(",
        f"{T_LOSSES}::test_the_optimiser_steps_rows_that_stay_of_unit_length",
    ),
    Fault("doppelganger of itself", "memory.py", "self.prototypes, slots, k=k", "self.prototypes, None, k=k", T_MEMORY),
    Fault("reset keeps the identities", "memory.py", "self.identities.fill_(-1)", "pass", T_MEMORY),
    # data
    Fault(
        "groups not shuffled over epochs",
        "sampling.py",
        "shuffle = torch.randperm(len(catalogue.images), generator=generator)",
        "shuffle = torch.arange(len(catalogue.images))",
        T_SAMPLING,
    ),
    # hardest_negatives in Triton
    Fault(
        "ties as topk leaves them",
        TRITON_TOP,
        "    return columns\n",
        "    return values.topk(k, dim=1).indices.sort(dim=1).values\n",
        f"{T_TOP}::test_ties_go_to_the_lower_slot",
    ),
    Fault(
        "the result's ties reversed",
        TRITON_TOP,
        "values.gather(1, columns).sort(dim=1, descending=True, stable=True)",
        "values.gather(1, columns).flip(1).sort(dim=1, descending=True, stable=True)",
        f"{T_TOP}::test_exact[6-5x130x33-float64-triton]",
    ),
    Fault(
        "one best tile too few",
        TRITON_TOP,
        "chosen = min(k, tiles)",
        "chosen = min(max(1, k - 1), tiles)",
        f"{T_TOP}::test_each_of_the_best_in_a_tile_of_its_own",
    ),
    Fault(
        "the target is a negative", TRITON_TOP, "(lanes[None, :] != at_target[:, None])", "(lanes[None, :] >= 0)", T_TOP
    ),
    Fault(
        "NaN is a cosine",
        TRITON_TOP,
        "negative & (values == values)",
        "negative",
        f"{T_TOP}::test_a_broken_prototype_hides_no_other",
    ),
    Fault(
        "broken embeddings found",
        TRITON_TOP,
        "torch.where(broken, -1, slots)",
        "slots",
        f"{T_TOP}::test_an_infinite_row_has_no_negatives",
    ),
    Fault(
        "strides of the gradient swapped",
        TRITON_TOP,
        "row * stride_grad_row + at.to(tl.int64) * stride_grad_column",
        "row * stride_grad_column + at.to(tl.int64) * stride_grad_row",
        f"{T_TOP}::test_gradcheck",
    ),
    Fault(
        "scratch pieces overlap",
        TRITON_TOP,
        "rows.start + part.start, rows.start + part.stop",
        "part.start, part.stop",
        f"{T_TOP}::test_scratch_space_changes_nothing",
    ),
    # cosines of a tile in Triton
    Fault("two of three parts", TRITON_COSINES, "dot(middle, tl.trans(w), dot(low, tl.trans(w), acc))", "acc", T_TOP),
    Fault(
        "the first columns only",
        TRITON_COSINES,
        "columns = first + tl.arange(0, BLOCK_DEPTH)\n        x =",
        "columns = tl.arange(0, BLOCK_DEPTH)\n        x =",
        f"{T_TOP}::test_long_embeddings",
    ),
    # margin_softmax_logits in Triton
    Fault(
        "empty slots have logits",
        TRITON_LOGITS,
        'tl.where(present[None, :], values, float("-inf"))',
        "values",
        T_LOGITS,
    ),
    Fault(
        "the margin forgotten",
        TRITON_LOGITS,
        "slots[None, :] == targets[:, None], at",
        "slots[None, :] < 0, at",
        T_LOGITS,
    ),
    Fault(
        "the last column not written",
        TRITON_LOGITS,
        "mask=rows_kept[:, None] & (slots < capacity)[None, :]",
        "mask=rows_kept[:, None] & (slots < capacity - 1)[None, :]",
        T_LOGITS,
    ),
    Fault("the target's slope", TRITON_LOGITS, "& (slots[None, :] + first != targets[:, None])", "", T_LOGITS),
    Fault(
        "the target sought in its chunk",
        TRITON_LOGITS,
        "slots[None, :] + first != targets",
        "slots[None, :] != targets",
        f"{T_LOGITS}::test_many_tiles_equal_the_reference",
    ),
    Fault(
        "later chunks begin again",
        TRITON_LOGITS,
        "CONTINUES=first > 0",
        "CONTINUES=False",
        f"{T_LOGITS}::test_many_tiles_equal_the_reference",
    ),
    Fault(
        "strides of H swapped",
        TRITON_LOGITS,
        "rows.to(tl.int64)[:, None] * stride_row + slots[None, :] * stride_column",
        "rows.to(tl.int64)[:, None] * stride_column + slots[None, :] * stride_row",
        T_LOGITS,
    ),
    Fault(
        "broken embeddings passed on",
        TRITON_LOGITS,
        "torch.isfinite(x).all(dim=1)",
        "torch.isfinite(x).any(dim=1) | True",
        f"{T_LOGITS}::test_many_tiles_equal_the_reference",
    ),
    Fault("gradient of unit rows", TRITON_LOGITS, "g - tl.sum(g * unit, axis=1)[:, None] * unit", "g", T_LOGITS),
    # negative_logsumexp in Triton
    Fault(
        "target not excluded by the Triton kernel",
        TRITON_SUM,
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
        TRITON_SUM,
        "stacked_keep = stacked < batch\n        stacked += line // BLOCK_ROWS * batch\n        logits",
        "stacked_keep = stacked >= 0\n        stacked += line // BLOCK_ROWS * batch\n        logits",
        T_BLOCKS,
    ),
    Fault(
        "strides of the embeddings swapped",
        TRITON_SUM,
        "x = load_rows(x_ptr, stacked, depth, stride_x_row, stride_x_column, stacked_keep, dim)\n\n",
        "x = load_rows(x_ptr, stacked, depth, stride_x_column, stride_x_row, stacked_keep, dim)\n\n",
        T_BLOCKS,
    ),
    Fault(
        "last split dropped",
        TRITON_SUM,
        "for split in range(splits):\n        line = tl.cast(split, tl.int64) * batch + rows\n        weight",
        "for split in range(splits - 1):\n        line = tl.cast(split, tl.int64) * batch + rows\n        weight",
        T_BLOCKS,
    ),
    Fault(
        "splits added without their maxima",
        TRITON_SUM,
        'weight = tl.exp2(tl.load(maxima_ptr + line, mask=keep, other=float("-inf")) - shift)',
        'weight = tl.exp2(tl.load(maxima_ptr + line, mask=keep, other=float("-inf")) * 0)',
        T_BLOCKS,
    ),
    Fault(
        "moment not rescaled when the maximum moves",
        TRITON_SUM,
        "moment = moment * rescale[:, None]",
        "moment = moment",
        T_BLOCKS,
    ),
    Fault(
        "hard form's slope missing in the embeddings' gradient",
        TRITON_SUM,
        "            if threshold_ptr is not None:\n                e = e * slope\n            if inverse_ptr",
        "            if inverse_ptr",
        T_BLOCKS,
    ),
    Fault(
        "hard form's slope missing in the prototypes' gradient",
        TRITON_SUM,
        "        if threshold_ptr is not None:\n            p = p * slope\n        targets",
        "        targets",
        T_BLOCKS,
    ),
    Fault(
        "what the halves leave of x not counted",
        TRITON_SUM,
        "n += tl.sum((x - high / LIFT - low / LIFT) * o, axis=1)",
        "pass",
        f"{T_STREAM}::test_16_bit_factors_cost_n_no_accuracy",
    ),
    Fault(
        "tile offset in 32 bits",
        TRITON_TILES,
        "columns.to(tl.int64)[None, :] * stride_column\n",
        "columns.to(tl.int64)[None, :] * stride_column\n    offsets = offsets.to(tl.int32)\n",
        f"{T_STREAM}::test_rows_past_two_to_the_31_elements",
    ),
    Fault(
        "products of bfloat16 bits",
        TRITON_TILES,
        "        a = a.to(tl.float32)\n        b = b.to(tl.float32)\n",
        "        a = a\n        b = b\n",
        f"{T_STREAM}::test_the_product_helper",
    ),
    Fault(
        "only the first entry of a chosen slot counts",
        TRITON_CHOSEN,
        "while current == slot:",
        "while (current == slot) & (position == entry):",
        f"{T_LOSS}::test_gradcheck_of_the_heavy_operator",
    ),
    Fault(
        "row's own part left in its gradient", TRITON_SUM, "c = along * inverse / scale", "c = along * 0.0", T_BLOCKS
    ),
]
