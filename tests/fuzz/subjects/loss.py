"""``margin_softmax_loss``: every margin with every mining rule; value, statistics, both gradients."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

import protomem_kernels as pmk
from tests.fuzz.draw import Draw, accumulation
from tests.fuzz.oracles.rows import lengths
from tests.fuzz.oracles.softmax import Softmax, reduced, softmax
from tests.fuzz.places import observing, small, somewhere
from tests.fuzz.subjects.bank import BankCase, draw_bank
from tests.fuzz.subjects.objective import Objective, draw_objective
from tests.fuzz.verdict import Judge, Values, require, scales_up


def margin_softmax_loss(draw: Draw) -> None:
    with somewhere(draw) as place:
        bank = draw_bank(draw, small(place))
        objective = draw_objective(draw, bank.prototypes.shape[0])
        reduction = draw.pick("none", "none", "none", "mean", "sum")
        draw.note(reduction=reduction)
        LossCase(draw, bank, objective, reduction).check()


def sure_samples(right: Softmax, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the samples (B,) whose value, and those whose gradient, rounding cannot turn into another one."""
    eps = torch.finfo(accumulation(dtype)).eps
    value = (right.gap > 300 * eps * slope(right, dtype)) | ~right.cosine.detach().isfinite()
    value = value & ~(right.steep < -16 * eps)  # a row that rounding left longer than 1: no angle has that cosine
    return value, value & (right.steep > 3e4 * eps)


def slope(right: Softmax, dtype: torch.dtype) -> Tensor:
    """Return how much rounding of the cosine is magnified in its angle (B,): without bound, but for rounding, at 1."""
    return right.steep.clamp(min=torch.finfo(accumulation(dtype)).eps).rsqrt()


def of_slope(right: Softmax) -> Tensor:
    """Return, in 32 of its roundings, how far one of the cosine moves a margin's slope (B,): as 1 / sin^2."""
    return 1 / (32 * right.steep.clamp(min=1e-30))


class LossCase:
    """One call, and what is right for it."""

    def __init__(self, draw: Draw, bank: BankCase, objective: Objective, reduction: str) -> None:
        self.draw, self.bank, self.objective, self.reduction = draw, bank, objective, reduction
        self.kind = accumulation(bank.embeddings.dtype)
        self.targets = bank.targets.long()
        self.counts = self.targets >= 0
        self.broken = self.counts & ~bank.embeddings.isfinite().all(dim=1)
        self.sound = torch.where(bank.embeddings.isfinite().all(dim=1)[:, None], bank.embeddings, 0)
        self.used = bank.clean(bank.targets)

    def right(self, e: Tensor, w: Tensor, before: dict[str, float], training: bool = False) -> Softmax:
        return softmax(
            e,
            w,
            torch.where(self.broken, -1, self.targets),
            self.bank.present,
            margin=self.objective.right_margin,
            mining=self.objective.right_rule,
            scale=self.objective.scale,
            normalize=self.bank.normalize,
            before=before,
            training=training,
        )

    def check(self) -> None:
        draw, bank, objective = self.draw, self.bank, self.objective
        before = objective.state()
        x = bank.embeddings.detach().requires_grad_(draw.chance(0.8))
        w = bank.prototypes.detach().requires_grad_(draw.chance(0.6))
        watched = x.requires_grad or w.requires_grad
        stats = None
        options = {**objective.options, "occupied": bank.occupied, "normalize_prototypes": bank.normalize}
        with nullcontext() if watched else observing(draw):
            if draw.chance(0.5):
                loss, stats = pmk.margin_softmax_loss(
                    x, w, bank.targets, reduction=self.reduction, return_stats=True, **options
                )
            else:
                loss = pmk.margin_softmax_loss(x, w, bank.targets, reduction=self.reduction, **options)
        require("margin_softmax_loss: dtype", loss.dtype == self.kind, str(loss.dtype))
        self.statistics(before)
        after = objective.state()  # what the batch was computed with, to the bit

        right = self.right(self.sound.double(), self.used.double(), after)
        value_sure, slope_sure = sure_samples(right, bank.embeddings.dtype)
        value_sure, slope_sure = value_sure | ~self.counts, slope_sure | ~self.counts
        if bool(self.broken.any()):
            shown = loss[self.broken] if self.reduction == "none" else loss
            hidden = isinstance(objective.rule, pmk.HardSamples) and self.reduction == "none"
            require(
                "margin_softmax_loss: a broken embedding shows", hidden or not bool(shown.isfinite().any()), f"{shown}"
            )
            if self.reduction != "none" or objective.right_rule.keep is not None:
                return
        self.value(loss, value_sure)
        if stats is not None:
            self.stats(stats, right, value_sure)
        if loss.requires_grad:
            self.gradients(loss, x, w, right, slope_sure, after)

    def statistics(self, before: dict[str, float]) -> None:
        """Hold the running statistics to what the batch makes of them."""
        if not before:
            return
        parts = [part for part in (self.objective.margin, self.objective.rule) if isinstance(part, nn.Module)]
        training = any(part.training for part in parts)
        right = self.right(self.sound.double(), self.used.double(), before, training)
        for name, value in self.objective.state().items():
            expected = right.state[name] if training else before[name]
            off = abs(value - expected) <= 1e-5 * max(1.0, abs(expected)) * 4
            require(
                "margin_softmax_loss: running statistics",
                off,
                f"{name} = {value}, not {expected} (from {before[name]})",
            )

    def value(self, loss: Tensor, sure: Tensor) -> None:
        state = self.objective.state()

        def oracle(e: Tensor, w: Tensor) -> Values:
            with torch.no_grad():
                right = self.right(e, w, state)
                return {"loss": reduced(right.losses, right.kept, self.reduction)}

        if self.reduction != "none" and not bool(sure.all()):
            require("margin_softmax_loss: finite", bool(loss.isfinite()), f"{loss.item()}")
            return
        judge = Judge(self.draw, oracle, [self.sound, self.used], self.bank.embeddings.dtype)
        with torch.no_grad():
            steep = slope(self.right(self.sound.double(), self.used.double(), state), self.bank.embeddings.dtype)
        if self.reduction != "none":
            steep = steep[self.counts].max() if bool(self.counts.any()) else torch.ones(())
        natural = 1 + judge.truth["loss"].abs() + self.objective.scale * steep
        if self.reduction == "sum":
            natural = natural * max(1, int(self.counts.sum()))
        if self.reduction == "none":
            judge.close("margin_softmax_loss: value", "loss", loss, natural, sure & ~self.broken)
        else:
            judge.close("margin_softmax_loss: value", "loss", loss, natural)

    def stats(self, stats: pmk.MarginSoftmaxStats, right: Softmax, sure: Tensor) -> None:
        state = self.objective.state()

        def oracle(e: Tensor, w: Tensor) -> Values:
            with torch.no_grad():
                r = self.right(e, w, state)
                counts = self.counts & ~self.broken
                zero = torch.zeros_like
                return {
                    "target_cosine": torch.where(counts, r.cosine, zero(r.cosine)),
                    "negative_logsumexp": torch.where(counts, r.n, zero(r.n)),
                    "target_probability": torch.where(counts, torch.sigmoid(r.target_logit - r.n), zero(r.n)),
                }

        judge = Judge(self.draw, oracle, [self.sound, self.used], self.bank.embeddings.dtype)
        scale = self.objective.scale
        for name, natural in (
            ("target_cosine", 1.0),
            ("negative_logsumexp", 1 + scale),
            ("target_probability", 1 + scale * slope(right, self.bank.embeddings.dtype)),
        ):
            judge.close(f"margin_softmax_loss: {name}", name, getattr(stats, name), natural, sure & ~self.broken)

    def gradients(
        self, loss: Tensor, x: Tensor, w: Tensor, right: Softmax, sure: Tensor, state: dict[str, float]
    ) -> None:
        upstream = self.draw.normal(*loss.shape)
        if self.reduction == "none":
            upstream = torch.where(sure & ~self.broken, upstream, 0)
        loss.backward(upstream.to(loss.dtype))
        for name, leaf in (("embeddings", x), ("prototypes", w)):
            if leaf.requires_grad and leaf.dtype != torch.float16:
                mine = leaf.grad[~self.broken & self.counts] if name == "embeddings" else leaf.grad
                huge = self.draw.notes.get("norms") is not None
                require(
                    f"margin_softmax_loss: finite gradient of {name}", huge or bool(mine.isfinite().all()), f"{mine}"
                )
        if self.reduction != "none" and not bool(sure.all()):
            return

        def oracle(e: Tensor, p: Tensor) -> Values:
            e, p = (t.detach().clone().requires_grad_() for t in (e, p))
            r = self.right(e, p, state)
            total = reduced(r.losses, r.kept, self.reduction)
            if total.requires_grad:
                total.backward(upstream.to(total.dtype))
            zero = torch.zeros_like
            return {"x": zero(e) if e.grad is None else e.grad, "w": zero(p) if p.grad is None else p.grad}

        judge = Judge(self.draw, oracle, [self.sound, self.used], self.bank.embeddings.dtype)
        up = upstream.abs().expand(len(self.targets)) / (
            max(1, int(right.kept.sum())) if self.reduction == "mean" else 1
        )
        # A rounding of s h is one of e^(s h), s times as large; of a cosine, one of its margin's slope.
        rounding = 1 + self.objective.scale / 32 + of_slope(right)
        up = torch.where(self.counts, up, 0) * (4 * self.objective.scale * rounding)
        size = lengths(self.sound.double())
        natural = up / torch.where(size > 0, size, 1) + (up if right.bound.penalty is not None else 0)
        rows = ~self.broken & (self.bank.embeddings.isfinite().all(dim=1) | ~self.counts)
        if x.requires_grad:
            rule, up_scaled = "margin_softmax_loss: gradient of embeddings", scales_up(upstream)
            judge.close(rule, "x", x.grad, natural[:, None], rows[:, None], scaled_up=up_scaled)
            idle = x.grad[~self.counts]
            require("margin_softmax_loss: no gradient for ignored samples", not bool(idle.any()), f"{idle}")
        if w.requires_grad:
            size = (
                lengths(self.used.double()) if self.bank.normalize else torch.ones(len(self.used), dtype=torch.float64)
            )
            natural = up.sum() / torch.where(size > 0, size, 1)
            judge.close("margin_softmax_loss: gradient of prototypes", "w", w.grad, natural[:, None])
            unread = w.grad[~self.bank.used(self.bank.targets)]
            require("margin_softmax_loss: no gradient for empty slots", not bool(unread.any()), f"{unread}")
