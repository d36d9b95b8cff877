"""Calls that cannot be meant: an error that names the argument, and nothing changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import protomem_kernels as pmk
from tests.fuzz.draw import Draw
from tests.fuzz.places import somewhere
from tests.fuzz.subjects.enqueue import copied, draw_state, same_bits
from tests.fuzz.verdict import refused

Options = dict[str, Any]
NO_TENSOR = (None, 3, "x", 2.5, object())


def _floating(draw: Draw, x: Tensor) -> Any:
    """Return what cannot stand for a floating (N, D) or (N,) tensor."""
    return draw.pick(*NO_TENSOR, x.long(), x.bool(), x[None], x.new_zeros(()), x.to(torch.complex64), x.to("meta"))


def _integers(draw: Draw, x: Tensor) -> Any:
    return draw.pick(3, "x", object(), x[:, None], x[None], torch.zeros(()), x.to("meta"), x[:-1])


def _number(draw: Draw) -> Any:
    return draw.pick("a", None, float("nan"), float("inf"), -1.0, torch.ones(2), [1.0])


class Calls:
    """A call of each public function that is right, and ways to spoil each of its arguments."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.B, self.M, self.D = draw.integer(1, 6), draw.integer(1, 8), draw.integer(1, 7)
        self.x = draw.normal(self.B, self.D).float()
        self.w = draw.unit(self.M, self.D, torch.float32)
        self.labels = torch.tensor([draw.integer(0, self.M - 1) for _ in range(self.B)])
        self.weights = draw.uniform(self.B)
        self.state = draw_state(draw, self.M, self.D, torch.float32, draw.identities(self.M + 2))

    def embeddings(self) -> Any:
        return self.draw.pick(_floating(self.draw, self.x), self.x[:, :0])

    def bad_labels(self) -> Any:
        return self.draw.pick(_integers(self.draw, self.labels), torch.zeros(self.B + 1, dtype=torch.int64))

    def bad_targets(self) -> Any:
        past = self.labels.clone()
        past[-1] = self.draw.pick(self.M, self.M + 7, 2**62)
        return self.draw.pick(self.bad_labels(), past)

    def bad_prototypes(self) -> Any:
        return self.draw.pick(_floating(self.draw, self.w), torch.zeros(self.M, self.D + 1))

    def bad_weights(self) -> Any:
        spoilt = self.weights.clone()
        spoilt[-1] = self.draw.pick(-1.0, float("nan"), float("inf"))
        return self.draw.pick(3, "x", spoilt, self.weights[None], self.weights.long(), torch.ones(self.B + 2))

    def bad_occupied(self) -> Any:
        mask = torch.ones(self.M, dtype=torch.bool)
        return self.draw.pick(
            3, [True], mask.int(), mask[None], torch.ones(self.M + 1, dtype=torch.bool), mask.to("meta")
        )

    def bad_count(self) -> Any:
        return self.draw.pick(0, -3, 1.5, "x", True, None)

    def calls(self) -> list[tuple[Callable[..., Any], Options, dict[str, Callable[[], Any]]]]:
        draw, bad = self.draw, {"scale": lambda: draw.pick(_number(draw), 0, -3)}
        bad["margin"] = lambda: draw.pick(0.5, None, pmk.ArcFace, "arc")
        bad["mining"] = lambda: draw.pick(64, pmk.MVSoftmax, "mv", pmk.ArcFace())
        against = {
            "embeddings": self.embeddings,
            "prototypes": self.bad_prototypes,
            "targets": self.bad_targets,
            "occupied": self.bad_occupied,
        }
        batch = {"embeddings": self.x, "prototypes": self.w, "targets": self.labels}
        memory = pmk.PrototypeMemory(self.M, self.D)
        memory.update(self.x, self.labels)
        self.memory = memory
        loss = pmk.PrototypeMemoryLoss(self.D, self.M)
        labelled = {"embeddings": self.embeddings, "labels": self.bad_labels, "weights": self.bad_weights}
        given = {"embeddings": self.x, "labels": self.labels, "weights": self.weights}
        rows = min(self.M, 2)
        return [
            (pmk.margin_softmax_loss, batch, {**against, **bad, "reduction": lambda: draw.pick("batchmean", None, 3)}),
            (pmk.margin_softmax_logits, batch, {**against, **bad}),
            (pmk.hardest_negatives, {**batch, "k": 2}, {**against, "k": self.bad_count}),
            (
                pmk.aggregate_prototypes,
                given,
                {**labelled, "max_identities": lambda: draw.pick(-1, 1.5, "x", True, [])},
            ),
            (
                lambda **options: pmk.enqueue_(self.state, **options),
                {"prototypes": self.w[:rows], "identities": torch.arange(rows)},
                {
                    "prototypes": lambda: draw.pick(_floating(draw, self.w[:rows]), torch.zeros(rows, self.D + 1)),
                    "identities": lambda: _integers(draw, torch.arange(rows)),
                    "refresh_ratio": lambda: draw.pick(_number(draw), 1.5),
                    "policy": lambda: draw.pick("random", None, 3),
                },
            ),
            (memory.update, given, labelled),
            (loss, given, labelled),
            (memory.lookup, {"labels": self.labels}, {"labels": lambda: draw.pick(3, "x", self.labels[None], self.x)}),
            (memory.doppelgangers, {"labels": self.labels, "k": 2}, {"k": self.bad_count}),
        ]


def bad_calls(draw: Draw) -> None:
    with somewhere(draw):
        made = Calls(draw)
        call, options, ways = draw.pick(*made.calls())
        name = draw.pick(*ways)
        value = ways[name]()
        shown = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        draw.note(call=getattr(call, "__name__", str(call)), argument=name, value=shown)
        before, memory = copied(made.state), copied(made.memory.state)
        refused("bad call", lambda: call(**{**options, name: value}), name)
        same_bits("bad call: nothing changed", before, made.state)
        same_bits("bad call: nothing changed", memory, made.memory.state)
