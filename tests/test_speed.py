"""The reference's speed, in units of G = one tiled matrix product of the same sizes in the same process.

Run alone (``make timing``): the best of several interleaved repeats of each, so that a noisy neighbour cannot fail it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import protomem_kernels as pmk

B, M, D = 512, 100_000, 512
TILE = 1024


def tiled_product(x: Tensor, w: Tensor) -> None:
    out = torch.empty(B, TILE)
    for start in range(0, M, TILE):
        rows = w[start : start + TILE]
        torch.mm(x, rows.T, out=out[:, : rows.shape[0]])


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_units_of_g(function: Callable[[], object], x: Tensor, w: Tensor, repeats: int = 7) -> float:
    times = [(seconds(lambda: tiled_product(x, w)), seconds(function)) for _ in range(repeats)]
    return min(ours for _, ours in times) / min(g for g, _ in times)


@pytest.mark.timing
@pytest.mark.parametrize(
    ("regime", "bound"),
    [
        ("plain", 2.6),  # the bound that the project set itself
        ("half empty", 2.9),  # empty slots are masked tile by tile
    ],
)
def test_loss_and_embedding_gradient(regime: str, bound: float) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(B, D), functional.normalize(torch.randn(M, D))
    targets = torch.randint(0, M, (B,))
    occupied = torch.rand(M) < 0.5 if regime == "half empty" else None

    def step() -> None:
        leaf = x.clone().requires_grad_()
        with pmk.use_backend("reference"):
            loss = pmk.margin_softmax_loss(leaf, w, targets, occupied=occupied)
        assert isinstance(loss, Tensor)
        loss.backward()

    ratio = in_units_of_g(step, x, w)
    print(f"{regime}: {ratio:.2f} G")
    assert ratio <= bound
