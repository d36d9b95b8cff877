"""Whole training heads under ``torch.compile(fullgraph=True)`` equal eager: ignored rows, three steps, their state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import protomem_kernels as pmk

HEADS: dict[str, dict[str, Any]] = {
    "norm quality": {"quality": pmk.NormQuality()},
    "adaface, curricular, center quality": {
        "margin": pmk.AdaFace(),
        "mining": pmk.CurricularFace(),
        "quality": pmk.CenterQuality(),
    },
    "magface, fresh, softmax quality": {
        "margin": pmk.MagFace(),
        "prototype_gradient": "fresh",
        "quality": pmk.SoftmaxQuality(pmk.NormQuality()),
    },
    "elastic cosface, noisy negatives, lru": {
        "margin": pmk.ElasticFace(kind="cos", std=0.0),
        "mining": pmk.NoisyNegativeFilter(0.2),
        "policy": "lru",
    },
    "d-softmax, hard samples": {"margin": pmk.DSoftmax(), "mining": pmk.HardSamples(0.5)},
    "sphereface": {"margin": pmk.SphereFace()},
    "combined margin, memory": {"margin": pmk.CombinedMargin(1.2), "prototype_gradient": "memory"},
}


@pytest.mark.no_cover
@pytest.mark.parametrize("name", HEADS)
def test_a_compiled_head_equals_eager(name: str) -> None:
    results = []
    torch.compiler.reset()
    for compiled in (False, True):
        torch.manual_seed(1)
        head = pmk.PrototypeMemoryLoss(8, 20, scale=16.0, **copy.deepcopy(HEADS[name]))
        seen: list[Tensor] = []
        optimizer = torch.optim.SGD([*head.parameters(), torch.zeros(1)], lr=0.1, momentum=0.9)
        if head.prototype_gradient == "memory":
            head.attach_optimizer(optimizer)
        function = torch.compile(head, fullgraph=True, backend="aot_eager") if compiled else head
        for _ in range(3):
            embeddings = torch.randn(10, 8, requires_grad=True)
            loss = function(embeddings, torch.randint(-1, 9, (10,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert embeddings.grad is not None
            seen += [loss.detach(), embeddings.grad]
        results.append(seen + [tensor.detach() for tensor in head.state_dict().values()])
    for eager, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)
