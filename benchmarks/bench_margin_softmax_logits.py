"""``margin_softmax_logits`` against eager PyTorch, in units of G."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import protomem_kernels as pmk
from benchmarks.inputs import Problem
from benchmarks.peers import MARGIN, SCALE, Peer, eager_logits, synchronize
from benchmarks.ratio import compare_with_g


@pytest.mark.peers("eager")
def bench_forward(benchmark: Any, problem: Problem, peer: Peer) -> None:
    x, w, targets = problem

    @torch.no_grad()
    def forward() -> None:
        if peer.name == "eager":
            eager_logits(x, w, targets)
        else:
            pmk.margin_softmax_logits(x, w, targets, margin=pmk.ArcFace(MARGIN), scale=SCALE)
        synchronize(x)

    with peer.within():
        compare_with_g(benchmark, forward, problem, operator="margin_softmax_logits", what="forward", peer=peer.name)
