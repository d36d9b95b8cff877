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

# Architecture -> factors -> engine -> operations per second, 1e12, that its products reach, everything that a call does
# besides counted in: exponentials, the way of logits through caches and, for "chunked", an eager launch of each step.
RATES: dict[int, dict[str, dict[str, float]]] = {
    80: {
        HALF: {"cuda": 130, "triton": 120, "chunked": 90},
        TF32: {"cuda": 65, "triton": 55, "chunked": 55},
        FLOAT32: {"chunked": 16},
        FLOAT64: {"triton": 4, "chunked": 12},
    },
    86: {
        HALF: {"cuda": 55, "triton": 45, "chunked": 40},
        TF32: {"cuda": 27, "triton": 22, "chunked": 24},
        FLOAT32: {"chunked": 20},
        FLOAT64: {"triton": 0.2, "chunked": 0.4},
    },
    90: {
        HALF: {"triton": 290, "cuda": 280, "chunked": 200},
        TF32: {"cuda": 140, "triton": 130, "chunked": 110},
        FLOAT32: {"chunked": 42},
        FLOAT64: {"triton": 15, "chunked": 40},
    },
    100: {
        HALF: {"triton": 550, "cuda": 350, "chunked": 300},
        TF32: {"triton": 260, "cuda": 170, "chunked": 180},
        FLOAT32: {"chunked": 55},
        FLOAT64: {"triton": 10, "chunked": 25},
    },
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


def predicted(engine: str, products: Products | None, architecture: int) -> float:
    """Return the predicted seconds of a call per 2e12 B M D; infinite for an engine that forms no such products."""
    rate = None if products is None else RATES[column(architecture)][products.factors].get(engine)
    return NEVER if products is None or rate is None else products.number / rate
