"""What each ``matmul_precision`` costs: errors against float64, of the chunked backend, in three regimes of data.

``TRITON_INTERPRET=1 python -m benchmarks.precision`` prints the table of docs/gpu.md. On a CPU: the small kernels run
in Triton's interpreter, products of 16-bit numbers are formed in float32, which holds each of them exactly, as a tensor
core does, and for products of tf32 both factors are cut to its 10 bits before, as the hardware cuts them. What a GPU's
own order of sums adds is of the size of float32's rounding.

- "trained": targets at cosine 0.7, a few look-alikes of 0.5 (``benchmarks.inputs``). "random": every direction alike.
- "adversarial": negatives that lie along what rounding takes from their sample, half of them against it: each exponent
  is off by as much as it can be, in both directions, so that the correction of n to first order has nothing to work on.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import protomem_kernels as pmk
from benchmarks.inputs import Size, problem, unit_rows
from protomem_kernels.backends.choice import BACKENDS

REGIMES = ("trained", "random", "adversarial")
PRECISIONS = ("highest", "high", "medium")
SIZE, SCALE = Size(64, 4096, 512), 64.0


class Errors(NamedTuple):
    """The largest error of a cosine, of n, and the error of dL/dx and of dL/dw relative to their largest entry."""

    cosine: float
    n: float
    grad_x: float
    grad_w: float


def tensors(regime: str, dtype: torch.dtype, size: Size = SIZE) -> tuple[Tensor, Tensor, Tensor]:
    """Return unit embeddings in float32, prototypes in ``dtype`` and targets."""
    raw = problem(size, {"random": "fresh"}.get(regime, "trained"))
    x, w = torch.nn.functional.normalize(raw.embeddings), raw.prototypes.clone()
    if regime == "adversarial":
        lost = x - (tf32(x) if dtype == torch.float32 else x.to(dtype).float())
        along = torch.nn.functional.normalize(lost)
        signs = torch.where(torch.arange(size.M) % 2 == 0, 1.0, -1.0)
        around = unit_rows(size.M, size.D, seed=9) * 0.05
        near = 0.3 * x.repeat(math.ceil(size.M / size.B), 1)[: size.M]
        w = near + around + signs[:, None] * along.repeat(math.ceil(size.M / size.B), 1)[: size.M]
        w = torch.nn.functional.normalize(w)
    return x, w.to(dtype), raw.targets


def tf32(x: Tensor) -> Tensor:
    """Return float32 numbers cut to the 10 bits of tf32."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def errors(precision: str, regime: str, dtype: torch.dtype, size: Size = SIZE) -> Errors:
    """Return how far a call in this precision is from float64."""
    x, w, targets = tensors(regime, dtype, size)
    rest: tuple[Any, ...] = (None, None, None, None, SCALE, 0.0, False)
    back = torch.cos(torch.arange(len(x), dtype=torch.float64)), torch.sin(torch.arange(len(x), dtype=torch.float64))
    results = []
    for backend, wide in (("chunked", False), ("reference", True)):
        kernels = BACKENDS[backend].kernels
        a, b = (x.double(), w.double()) if wide else (x, w)
        with pmk.matmul_precision(precision), _cut_as_tf32(dtype == torch.float32 and precision != "highest"):
            logits = kernels["margin_softmax_logits"](a, b, targets - len(w), a[:, 0], None, None, None, 1.0, False)
            _, n, _, o, _ = kernels["negative_logsumexp"](a, b, targets, *rest, True, 0)
            grad = torch.empty_like(b)
            kernels["negative_logsumexp_backward_"](
                grad, *(g.to(a.dtype) for g in back), a, b, targets, *rest[:4], n, *rest[4:], 0
            )
        results.append([logits, n, o, grad])
    (logits, n, o, grad), (*truth,) = results
    return Errors(
        _largest(logits, truth[0]),
        _largest(n, truth[1]),
        _largest(o, truth[2]) / float(truth[2].abs().max()),
        _largest(grad, truth[3]) / float(truth[3].abs().max()),
    )


def _largest(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth).abs().max())


@contextlib.contextmanager
def _cut_as_tf32(yes: bool) -> Iterator[None]:
    """Within the block have the chunked backend's products of float32 cut their factors, if ``yes``."""
    from protomem_kernels.backends.chunked import negative_logsumexp, products

    multiply, add = products.multiply, products.add_product_
    with contextlib.ExitStack() as patches:
        if yes:
            cut = mock.patch.object(products, "multiply", lambda a, b, out: multiply(tf32(a), tf32(b), out))
            patches.enter_context(cut)
            cut = mock.patch.object(negative_logsumexp, "add_product_", lambda out, a, b: add(out, tf32(a), tf32(b)))
            patches.enter_context(cut)
        yield


def rows(size: Size = SIZE) -> Iterator[tuple[str, str, str, Errors]]:
    """Yield dtype, precision and regime with their errors; beside a 16-bit memory "high" is like "highest" for n."""
    for kind in ("bfloat16", "float16", "float32"):
        for precision in PRECISIONS:
            if (kind, precision) != ("float32", "medium"):  # which is "high"
                for regime in REGIMES:
                    yield kind, precision, regime, errors(precision, regime, getattr(torch, kind), size)


def main() -> None:
    """Print the table."""
    print("| memory | precision | data | cosine | n | dL/dx | dL/dw |\n|---|---|---|---|---|---|---|")
    for kind, precision, regime, found in rows():
        print(f"| {kind} | {precision} | {regime} | " + " | ".join(f"{value:.1e}" for value in found) + " |")


if __name__ == "__main__":
    sys.exit(main())
