"""``margin_softmax_logits``: the logits themselves, their gradients, and that cross-entropy over them is the loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import protomem_kernels as pmk
from tests.fuzz.draw import Draw, accumulation
from tests.fuzz.oracles.rows import lengths
from tests.fuzz.oracles.softmax import Softmax, softmax
from tests.fuzz.places import small, somewhere
from tests.fuzz.subjects.bank import draw_bank
from tests.fuzz.subjects.loss import of_slope, slope, sure_samples
from tests.fuzz.subjects.objective import draw_objective
from tests.fuzz.verdict import Judge, Values, exact, require, scales_up


def margin_softmax_logits(draw: Draw) -> None:
    with somewhere(draw) as place:
        bank = draw_bank(draw, small(place))
        objective = draw_objective(draw, bank.prototypes.shape[0], logits=True)
        sound = bank.embeddings.isfinite().all(dim=1)
        embeddings, clean = torch.where(sound[:, None], bank.embeddings, 0), bank.clean(bank.targets)
        targets = bank.targets.long()

        x = bank.embeddings.detach().requires_grad_(draw.chance(0.8))
        w = bank.prototypes.detach().requires_grad_(draw.chance(0.6))
        logits = pmk.margin_softmax_logits(
            x, w, bank.targets, **objective.options, occupied=bank.occupied, normalize_prototypes=bank.normalize
        )
        require("margin_softmax_logits: dtype", logits.dtype == accumulation(x.dtype), str(logits.dtype))
        state = objective.state()

        def right(e: Tensor, p: Tensor) -> Softmax:
            return softmax(
                e,
                p,
                targets,
                bank.present,
                margin=objective.right_margin,
                mining=objective.right_rule,
                scale=objective.scale,
                normalize=bank.normalize,
                before=state,
                training=False,
                ignored_are_zero=False,
            )

        truth = right(embeddings.double(), clean.double())
        value_sure, slope_sure = sure_samples(truth, x.dtype)
        value_sure = value_sure & sound
        slope_sure = slope_sure & sound
        upstream = torch.where(slope_sure[:, None] & truth.logits.isfinite(), draw.normal(*logits.shape), 0)

        def oracle(e: Tensor, p: Tensor) -> Values:
            e, p = (t.detach().clone().requires_grad_() for t in (e, p))
            values = right(e, p).logits
            total = torch.where(upstream != 0, values, 0)
            if total.requires_grad:
                total.backward(upstream.to(e.dtype))
            zero = torch.zeros_like
            return {
                "logits": values.detach(),
                "x": zero(e) if e.grad is None else e.grad,
                "w": zero(p) if p.grad is None else p.grad,
            }

        judge = Judge(draw, oracle, [embeddings, clean], x.dtype)
        rows = value_sure[:, None]
        exact(
            "margin_softmax_logits: which are -inf",
            (logits.detach() == -math.inf)[value_sure],
            (truth.logits.detach() == -math.inf)[value_sure],
        )
        natural = 1 + objective.scale * slope(truth, x.dtype)
        judge.close("margin_softmax_logits: values", "logits", logits, natural[:, None], rows)
        if not logits.requires_grad or logits.numel() == 0:
            return
        logits.backward(upstream.to(logits.dtype))
        size = lengths(embeddings.double())
        up = 4 * objective.scale * upstream.abs() * (1 + of_slope(truth))[:, None]
        if x.requires_grad:
            natural = up.sum(dim=1) / torch.where(size > 0, size, 1)
            rule, up_scaled = "margin_softmax_logits: gradient of embeddings", scales_up(upstream)
            judge.close(rule, "x", x.grad, natural[:, None], sound[:, None], scaled_up=up_scaled)
        if w.requires_grad:
            size = lengths(clean.double()) if bank.normalize else torch.ones(len(clean), dtype=torch.float64)
            natural = up.sum(dim=0) / torch.where(size > 0, size, 1)
            judge.close("margin_softmax_logits: gradient of prototypes", "w", w.grad, natural[:, None], in_parts=True)
