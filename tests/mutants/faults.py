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


AGGREGATE = "reference/aggregate_prototypes.py"
ENQUEUE = "reference/enqueue.py"
SUM = "reference/negative_logsumexp.py"
TOP = "reference/hardest_negatives.py"
LOGITS = "reference/margin_softmax_logits.py"
ROWS = "reference/_rows.py"
LOSS = "ops/margin_softmax_loss.py"

T_AGGREGATE = "tests/ops/test_aggregate_prototypes.py"
T_ENQUEUE = "tests/ops/test_enqueue.py"
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
        T_AGGREGATE,
    ),
    Fault("antipodal images kept", AGGREGATE, "ANTIPODAL = 1e-6", "ANTIPODAL = -1.0", T_AGGREGATE),
    Fault("negative labels take part", AGGREGATE, "first &= ordered >= 0", "first &= ordered >= -1", T_AGGREGATE),
    Fault(
        "gradient not projected", AGGREGATE, "(grad_prototypes - along * prototypes)", "(grad_prototypes)", T_AGGREGATE
    ),
    Fault("gradient of the mass lost", AGGREGATE, " + take(grad_mass, index)", "", T_AGGREGATE),
    Fault("gradient ignores the weight", AGGREGATE, "grad = q[:, None] * grad_sum", "grad = grad_sum", T_AGGREGATE),
    Fault(
        "bad weights count",
        AGGREGATE,
        "torch.isfinite(weights) & (weights > 0), weights, 0)",
        "weights != 0, weights, 0)",
        T_REGISTRATION,
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
    Fault("lru prefers the youngest", ENQUEUE, "matched, int64.max, age)", "matched, int64.max, -age)", T_ENQUEUE),
    Fault(
        "lru forgets empty slots",
        ENQUEUE,
        "identities >= 0, stamps, int64.min)",
        "identities >= -1, stamps, int64.min)",
        T_ENQUEUE,
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
    Fault("scale missing in the gradient", SUM, "scale / self.total, 0)", "1 / self.total, 0)", T_LOSS),
    Fault("slope of the hard form missing", SUM, "e if slope is None else e.mul_(slope)", "e", T_LOSS),
    Fault("hard form applied to easy negatives", SUM, "hard = y > ", "hard = y < ", T_LOSS),
    Fault("quadratic term lost", SUM, "form = y.mul(g / scale)", "form = y.mul(0 * g)", T_LOSS),
    Fault("sum not rescaled when the maximum moves", SUM, "self.total *= rescale", "pass", T_LOSS),
    Fault("offset not added back", SUM, "self.total.log() + self.shift", "self.total.log()", T_LOSS),
    Fault(
        "target's share of the prototypes' gradient lost",
        SUM,
        "put_in_tile_(p, targets - start, grad_cosine)",
        "put_in_tile_(p, targets - start, 0.0)",
        T_LOSS,
    ),
    Fault(
        "prototypes' gradient not projected",
        SUM,
        "tile_grad = unit_rows_backward(tile_grad,",
        "_ = unit_rows_backward(tile_grad,",
        T_LOSS,
    ),
    Fault(
        "chosen negatives include the target", SUM, "torch.where(slots == targets[:, None], -1, slots)", "slots", T_LOSS
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
        T_LOSS,
    ),
    Fault(
        "prototypes kept although overwritten",
        "ops/negative_logsumexp.py",
        "ctx.keeps_prototypes = ctx.needs_input_grad[1]",
        "ctx.keeps_prototypes = True",
        T_LOSS,
    ),
    Fault(
        "exponents overflow", "ops/negative_logsumexp.py", "offset = max(0.0, largest - top)", "offset = 0.0", T_LOSS
    ),
    # hardest_negatives
    Fault(
        "ties to the higher slot",
        TOP,
        "tied.cumsum(dim=1, dtype=torch.int32) <= room",
        "tied.flip(1).cumsum(dim=1, dtype=torch.int32).flip(1) <= room",
        T_TOP,
    ),
    Fault("target among its own negatives", TOP, "put_in_tile_(cosines, targets - start, NONE)", "pass", T_TOP),
    Fault(
        "empty slots among the negatives",
        TOP,
        "cosines += minus_infinity_unless(occupied[start : start + width], cosines.dtype)",
        "pass",
        T_TOP,
    ),
    Fault(
        "not descending",
        TOP,
        "best.sort(dim=1, descending=True, stable=True)",
        "best.sort(dim=1, descending=False, stable=True)",
        T_TOP,
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
    Fault("momentum survives a change of identity", "losses.py", "value.masked_fill_(mask, 0)", "pass", T_LOSSES),
    Fault(
        "broken embeddings hidden", "losses.py", "return torch.where(broken, 0, targets)", "return targets", T_LOSSES
    ),
    Fault("rows not of unit length after a step", "losses.py", "optimizer.register_step_post_hook(", "(", T_LOSSES),
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
]
