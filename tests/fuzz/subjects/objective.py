"""Margins and mining rules, drawn together with what they are."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

import protomem_kernels as pmk
from tests.fuzz.draw import Draw
from tests.fuzz.oracles import margins, mining
from tests.fuzz.oracles.margins import MarginOracle
from tests.fuzz.oracles.mining import MiningOracle


class Objective(NamedTuple):
    """A margin, a mining rule and a scale, of the package and of the oracles."""

    margin: Any
    rule: Any
    scale: float
    right_margin: MarginOracle
    right_rule: MiningOracle

    @property
    def options(self) -> dict[str, Any]:
        return {"margin": self.margin, "mining": self.rule, "scale": self.scale}

    def state(self) -> dict[str, float]:
        """Return the statistics as they stand in the package's modules."""
        modules = [part for part in (self.margin, self.rule) if isinstance(part, nn.Module)]
        names = ("mean", "std", "t")
        return {n: float(value) for part in modules for n, value in part.named_buffers() if n in names}

    def train(self, mode: bool) -> None:
        for part in (self.margin, self.rule):
            if isinstance(part, nn.Module):
                part.train(mode)


def draw_margin(draw: Draw, logits: bool) -> tuple[Any, MarginOracle]:
    m = draw.pick(0.5, 0.3, round(draw.uniform(1).item(), 2), 0.0)
    names = ["arc", "arc", "straight", "cos", "combined", "sphere", "ada", "mag", "elastic", "function"]
    name = draw.pick(*names, *([] if logits else ["d"]))
    draw.note(margin=name, m=m)
    if name == "arc":
        return pmk.ArcFace(m), MarginOracle(lambda *_: margins.arc(m))
    if name == "straight":
        return pmk.ArcFace(m, straight_through=True), MarginOracle(lambda *_: margins.straight(m))
    if name == "cos":
        return pmk.CosFace(m), MarginOracle(lambda *_: margins.cos(m))
    if name == "combined":
        m1, m3 = draw.pick(1.0, 1.1, 1.5), draw.pick(0.0, 0.2)
        draw.note(m1=m1, m3=m3)
        return pmk.CombinedMargin(m1, m, m3), MarginOracle(lambda *_: margins.combined(m1, m, m3))
    if name == "sphere":
        m1 = draw.pick(1.0, 1.5, 1.7, 3.0)
        draw.note(m1=m1)
        return pmk.SphereFace(m1), MarginOracle(lambda *_: margins.sphere(m1))
    if name == "ada":
        h, momentum = draw.pick(0.333, 1.0), draw.pick(0.01, 0.5, 1.0)
        return pmk.AdaFace(m, h, momentum), MarginOracle(
            lambda norm, before, training: margins.ada(norm, m, h, momentum, before["mean"], before["std"], training)
        )
    if name == "mag":
        settings = draw.pick((10.0, 110.0, 0.45, 0.8, 35.0), (1.0, 4.0, 0.0, 1.5, 2.0))
        return pmk.MagFace(*settings), MarginOracle(lambda norm, *_: margins.mag(norm, *settings))
    if name == "elastic":  # without spread: what the random margins are is nobody's promise
        kind = draw.pick("arc", "cos")
        return pmk.ElasticFace(m, 0.0, kind), MarginOracle(
            lambda *_: margins.arc(m) if kind == "arc" else margins.cos(m)
        )
    if name == "d":
        d = draw.pick(0.9, 0.5)
        return pmk.DSoftmax(d), MarginOracle(lambda *_: margins.cos(0.0), d)
    return (lambda c, norm: 0.5 * c - 0.1), MarginOracle(
        lambda *_: margins.Bound(lambda c: 0.5 * c - 0.1, lambda c: 0.5 * c - 0.1, margins.never)
    )


def draw_mining(draw: Draw, slots: int) -> tuple[Any, MiningOracle]:
    name = draw.pick("none", "none", "mv", "curricular", "hardest", "noisy", "samples")
    draw.note(mining=name)
    if name == "mv":
        t, kind = draw.pick(0.2, 0.0, 1.0), draw.pick("adaptive", "fixed")
        return pmk.MVSoftmax(t, kind), MiningOracle(mining.misclassified(t, kind))
    if name == "curricular":
        momentum = draw.pick(0.01, 0.5, 1.0)
        return pmk.CurricularFace(momentum), MiningOracle(mining.curricular(momentum))
    if name == "hardest":
        k = draw.pick(1, 2, 5, 64, max(1, slots), max(1, slots - 1))
        draw.note(k=k)
        return pmk.HardestNegatives(k), MiningOracle(k=k)
    if name == "noisy":
        threshold = draw.pick(0.4, 0.0, -0.5, 1.0)
        return pmk.NoisyNegativeFilter(threshold), MiningOracle(mining.filtered(threshold))
    if name == "samples":
        keep = draw.pick(0.9, 0.5, 0.55, 0.01, 1.0)
        return pmk.HardSamples(keep), MiningOracle(keep=keep)
    return None, MiningOracle()


def draw_objective(draw: Draw, slots: int, logits: bool = False) -> Objective:
    margin, right_margin = draw_margin(draw, logits)
    rule, right_rule = draw_mining(draw, slots)
    scale = draw.pick(64.0, 64, 30.0, 1.0, 0.01, 90.0, 200.0, 1000.0)
    draw.note(scale=scale)
    chosen = Objective(margin, rule, scale, right_margin, right_rule)
    training = draw.chance(0.7)
    chosen.train(training)
    draw.note(training=training)
    if isinstance(margin, pmk.AdaFace) and draw.chance(0.7):  # as after some training
        with torch.no_grad():
            margin.mean.fill_(3.0)
            margin.std.fill_(1.5)
    return chosen
