"""The Triton kernels of ``negative_logsumexp`` in small blocks: many tiles, splits and chunks."""

from __future__ import annotations

import pytest
import torch

from protomem_kernels.backends import reference, triton
from protomem_kernels.backends.triton import launch
from tests.ops.cases import far_apart, strided, unit

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not triton.interpreted(), reason="needs Triton's interpreter: TRITON_INTERPRET=1"),
]
WHOLE = launch.Launch(rows=16, slots=32, depth=64, columns=64, warps=4, stages=1)
IN_PARTS = launch.Launch(rows=16, slots=32, depth=32, columns=32, warps=4, stages=1)


@pytest.mark.parametrize(
    ("dtype", "options", "how"),
    [
        *((torch.float64, options, WHOLE) for options in ("plain", "occupied", "hard", "normalized", "running", "all")),
        *((torch.float64, options, IN_PARTS) for options in ("plain", "all")),
        *((dtype, options, WHOLE) for dtype in (torch.bfloat16, torch.float16) for options in ("plain", "all")),
        (torch.bfloat16, "all", IN_PARTS),
    ],
)
def test_small_blocks(dtype: torch.dtype, options: str, how: launch.Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    from protomem_kernels.backends.triton.negative_logsumexp import negative_logsumexp, negative_logsumexp_backward_

    kinds = "stream with moment", "gradient of slots"
    small = dict.fromkeys(["stream", *kinds, *(f"{kind}, every option" for kind in kinds)], how)
    small["reduction"] = launch.Launch(rows=8)
    choose = launch.choose
    monkeypatch.setattr(launch, "choose", lambda kind, *rest: small[kind] if kind in small else choose(kind, *rest))
    monkeypatch.setattr(launch, "processors", lambda _: 8)
    assert launch.split(110, how.slots, 2, 8) == (4, 32)  # the last split is not full
    g = torch.Generator().manual_seed(7)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    x = strided(unit(torch.randn(20, 40, generator=g, dtype=torch.float64)).to(acc))
    w = unit(torch.randn(110, 40, generator=g, dtype=torch.float64))
    targets = strided(torch.randint(-1, 110, (20,), generator=g))
    occupied = threshold = coefficients = None
    normalize = options in ("normalized", "all")
    if normalize:
        w *= torch.logspace(-2, 2, 110, dtype=torch.float64)[:, None]
    w = strided(w.to(dtype))
    if options in ("occupied", "all"):
        occupied = torch.rand(110, generator=g) < 0.7
        w[~occupied & ~torch.isin(torch.arange(110), targets)] = float("nan")
        occupied = strided(occupied)
    if options in ("hard", "all"):
        threshold = strided(torch.linspace(-0.2, 0.2, 20, dtype=acc))
        coefficients = strided(torch.tensor([1.1, 0.1, 0.4], dtype=acc))
    offset = None if options in ("running", "all") else 2.0
    given = (x, w, targets, occupied, None, threshold, coefficients, 20.0, offset, normalize, True, 0)
    double = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in given]
    ours, truth = negative_logsumexp(*given), reference.BACKEND.kernels["negative_logsumexp"](*double)
    tight = {torch.float64: 1e-12, torch.bfloat16: 2e-6, torch.float16: 2e-6}[dtype]
    loose = {torch.float64: 1e-12, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    for name, a, b, close in zip(("c", "n", "dc/dx", "o"), ours, truth, (tight, tight, tight, loose), strict=False):
        assert_near(a, b, close, name)
    grad_cosine, grad_n = torch.randn(2, 20, generator=g, dtype=torch.float64)
    results = []
    for function, arguments, n, kind in (
        (negative_logsumexp_backward_, given, ours[1], acc),
        (reference.BACKEND.kernels["negative_logsumexp_backward_"], double, truth[1], torch.float64),
    ):
        grad = torch.full(w.shape, float("nan"), dtype=dtype if kind == acc else torch.float64)
        function(grad, grad_cosine.to(kind), grad_n.to(kind), *arguments[:7], n, *arguments[7:10], 0)
        results.append(grad)
    length = w.double().nan_to_num().norm(dim=1, keepdim=True) if normalize else 1.0  # 1 / |w| is in the gradient
    assert_near(results[0].double() * length, results[1] * length, 2 * loose, "dL/dw")
    light = negative_logsumexp(*given[:-2], False, 0)
    assert torch.equal(light[0], ours[0])
    assert_near(light[1], truth[1], tight, "n without gradient")
    assert light[3].numel() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_factors_cost_n_no_accuracy(dtype: torch.dtype) -> None:
    """Two halves of bfloat16 hold 17 bits of x: alone they would leave errors of 1e-4 in n at this scale."""
    from protomem_kernels.backends.triton.negative_logsumexp import negative_logsumexp

    g = torch.Generator().manual_seed(5)
    x, w = unit(torch.randn(64, 8, generator=g)), unit(torch.randn(500, 8, generator=g)).to(dtype)
    rest = torch.full((64,), -1), None, None, None, None, 64.0, 0.0, False, True, 0
    ours = negative_logsumexp(x, w, *rest)[1]
    truth = reference.BACKEND.kernels["negative_logsumexp"](x.double(), w.double(), *rest)[1]
    assert (ours - truth).abs().max() < 2e-5


def assert_near(ours: torch.Tensor, truth: torch.Tensor, close: float, name: str) -> None:
    """Hold the largest error against the largest entry; the same entries are infinite."""
    finite = torch.isfinite(truth)
    assert torch.equal(torch.isfinite(ours), finite), name
    error = (ours.double() - truth)[finite].abs().max() / truth[finite].abs().max().clamp(min=1)
    assert error <= close, f"{name}: {float(error)}"


def test_rows_past_two_to_the_31_elements() -> None:
    from protomem_kernels.backends.triton.negative_logsumexp import negative_logsumexp, negative_logsumexp_backward_

    x = unit(torch.randn(3, 6))
    near = unit(torch.randn(5, 6)).bfloat16()
    targets, chosen = torch.tensor([4, 0, 3]), torch.tensor([[4, 1], [3, 4], [0, 4]])
    for negatives in (None, chosen):
        results = []
        for w in (near, far_apart(near)):
            outputs = negative_logsumexp(x, w, targets, None, negatives, None, None, 8.0, 0.0, True, True, 0)
            grad = torch.empty(5, 6, dtype=torch.bfloat16)
            ones = torch.ones(3)
            negative_logsumexp_backward_(
                grad, ones, ones, x, w, targets, None, negatives, None, None, outputs[1], 8.0, 0.0, True, 0
            )
            results.append((*outputs, grad))
        for ours, expected in zip(*results, strict=True):
            assert torch.equal(ours, expected)
