"""Which engine is asked first for an operator on the whole memory: the one whose products take the least time.

An engine says how many products of batch and memory, 2 B M D operations each, it forms of which factors
(``Backend.products``); ``RATES`` says how fast. **All rates are predicted**, from data sheets and from published times
of kernels like these (docs/gpu.md has the derivation); no GPU has confirmed one. ``protomem gpu-check`` brings the
figures that will replace them. ``PROTOMEM_AUTOTUNE=1`` asks the GPU itself (``trial``).
"""

from __future__ import annotations

from typing import NamedTuple

HALF, TF32, FLOAT32, FLOAT64 = "half", "tf32", "float32", "float64"  # what products are of
NEVER = float("inf")

# Architecture -> factors -> engine -> operations per second, 1e12, that its products reach.
RATES: dict[int, dict[str, dict[str, float]]] = {
    80: {
        HALF: {"chunked": 250, "cuda": 130, "triton": 120},
        TF32: {"chunked": 125, "cuda": 65, "triton": 55},
        FLOAT32: {"chunked": 17},
        FLOAT64: {"chunked": 14, "triton": 4},
    },
    86: {
        HALF: {"chunked": 60, "cuda": 40, "triton": 35},
        TF32: {"chunked": 30, "cuda": 20, "triton": 17},
        FLOAT32: {"chunked": 24},
        FLOAT64: {"chunked": 0.4, "triton": 0.2},
    },
    90: {
        HALF: {"chunked": 690, "triton": 290, "cuda": 280},
        TF32: {"chunked": 340, "cuda": 140, "triton": 130},
        FLOAT32: {"chunked": 48},
        FLOAT64: {"chunked": 45, "triton": 15},
    },
    100: {
        HALF: {"chunked": 1575, "triton": 560, "cuda": 360},
        TF32: {"chunked": 780, "triton": 270, "cuda": 170},
        FLOAT32: {"chunked": 60},
        FLOAT64: {"chunked": 30, "triton": 10},
    },
}
# Architecture -> engine -> picoseconds that a logit takes besides: its way to the next kernel and back, through caches
# and memory, and its share of the launches of a chunk from Python.
BESIDES: dict[int, dict[str, float]] = {
    80: {"chunked": 14},
    86: {"chunked": 30},
    90: {"chunked": 9},
    100: {"chunked": 9},
}


class Products(NamedTuple):
    """What an engine does for one call: how many products of batch and memory, and of which factors."""

    number: float
    factors: str


def column(architecture: int) -> int:
    """Return the architecture of ``RATES`` that stands for a compute capability, 90 for 9.0."""
    if architecture in (80, 87):
        return 80
    return 90 if 90 <= architecture < 100 else 100 if 100 <= architecture < 120 else 86


def predicted(engine: str, products: Products | None, dim: int, architecture: int) -> float:
    """Return the predicted picoseconds of a call per logit; infinite for an engine of which nothing is known."""
    arch = column(architecture)
    rate = None if products is None else RATES[arch][products.factors].get(engine)
    if products is None or rate is None:
        return NEVER
    return products.number * 2 * dim / rate + BESIDES[arch].get(engine, 0.0)
