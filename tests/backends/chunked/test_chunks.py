"""The chunked backend in many small chunks: of slots, and of samples; what scratch it takes; that it reads nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from protomem_kernels.backends import reference, triton
from protomem_kernels.backends.choice import BACKENDS
from tests.backends.triton.test_negative_logsumexp import assert_near
from tests.ops.cases import strided, unit

interprets = pytest.mark.skipif(not triton.interpreted(), reason="needs Triton's interpreter: TRITON_INTERPRET=1")
LOOSE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
TIGHT = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
B, M, D = 40, 600, 24


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have chunks of 256 slots by 16 samples, the last of each not full."""
    from protomem_kernels.backends.chunked import products

    monkeypatch.setattr(products, "ROWS", 16)
    monkeypatch.setattr(products, "scratch_bytes", lambda _: 1)
    assert products.slots_of_chunk(torch.device("cpu"), 16, M, 8, 8) == 256


def problem(dtype: torch.dtype, every_option: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return x, prototypes, targets, occupied and a threshold: strided, with garbage in empty slots."""
    g = torch.Generator().manual_seed(3)
    x = strided(unit(torch.randn(B, D, generator=g, dtype=torch.float64)).to(torch.promote_types(dtype, torch.float32)))
    w = unit(torch.randn(M, D, generator=g, dtype=torch.float64))
    targets = strided(torch.randint(-1, M, (B,), generator=g))
    if not every_option:
        return x, w.to(dtype), targets, None, None
    w = strided((w * torch.logspace(-2, 2, M, dtype=torch.float64)[:, None]).to(dtype))
    occupied = torch.rand(M, generator=g) < 0.7
    w[~occupied & ~torch.isin(torch.arange(M), targets)] = float("nan")
    return x, w, targets, strided(occupied), strided(torch.linspace(-0.2, 0.2, B, dtype=x.dtype))


def exact(args: tuple) -> list:
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


@interprets
@pytest.mark.triton
@pytest.mark.parametrize("every_option", [False, True], ids=["plain", "every option"])
@pytest.mark.parametrize("dtype", list(LOOSE), ids=str)
def test_negative_logsumexp(dtype: torch.dtype, every_option: bool, small: None) -> None:
    x, w, targets, occupied, threshold = problem(dtype, every_option)
    coefficients = None if threshold is None else strided(threshold.new_tensor([1.1, 0.1, 0.4]))
    offset = None if every_option else 2.0
    given = (x, w, targets, occupied, None, threshold, coefficients, 20.0, offset, every_option, True, 0)
    ours, truth = (
        BACKENDS["chunked"].kernels["negative_logsumexp"](*given),
        reference.BACKEND.kernels["negative_logsumexp"](*exact(given)),
    )
    for name, a, b, close in zip(
        ("c", "n", "dc/dx", "o"), ours, truth, [TIGHT[dtype]] * 3 + [LOOSE[dtype]], strict=False
    ):
        assert_near(a, b, close, name)
    light = BACKENDS["chunked"].kernels["negative_logsumexp"](*given[:-2], False, 0)
    assert_near(light[1], truth[1], TIGHT[dtype], "n without gradient")
    assert light[3].numel() == 0
    grads = torch.randn(2, B, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(x.dtype)
    results = []
    for backend, n, convert in (("chunked", ours[1], list), ("reference", truth[1], exact)):
        arguments = convert((torch.full(w.shape, float("nan"), dtype=dtype), *grads, *given[:7], n, *given[7:10], 0))
        BACKENDS[backend].kernels["negative_logsumexp_backward_"](*arguments)
        results.append(arguments[0])
    length = w.double().nan_to_num().norm(dim=1, keepdim=True) if every_option else 1.0  # 1 / |w| is in the gradient
    assert_near(results[0].double() * length, results[1] * length, 2 * LOOSE[dtype], "dL/dw")


@interprets
@pytest.mark.triton
@pytest.mark.parametrize("every_option", [False, True], ids=["plain", "every option"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_other_operators(dtype: torch.dtype, every_option: bool, small: None) -> None:
    x, w, targets, occupied, threshold = problem(dtype, every_option)
    coefficients = None if threshold is None else strided(threshold.new_tensor([1.1, 0.1, 0.4]))
    searched = (x, w, targets, occupied, 3, every_option)  # fewer than there are tiles of 128 slots
    cosines, slots = BACKENDS["chunked"].kernels["hardest_negatives"](*searched)
    true_cosines, true_slots = reference.BACKEND.kernels["hardest_negatives"](*exact(searched))
    assert torch.equal(slots, true_slots)
    assert_near(cosines, true_cosines, 1e-6, "cosines")
    options = (occupied, threshold, coefficients, 20.0, every_option)
    given = (x, w, targets, x[:, 0], *options)
    logits = BACKENDS["chunked"].kernels["margin_softmax_logits"](*given)
    truth = reference.BACKEND.kernels["margin_softmax_logits"](*exact(given))
    assert_near(logits, truth, 2e-6, "logits")
    given = (torch.cos(torch.arange(B * M, dtype=x.dtype)).view(B, M), x, w, targets, *options, True)
    ours = BACKENDS["chunked"].kernels["margin_softmax_logits_backward"](*given)
    true = reference.BACKEND.kernels["margin_softmax_logits_backward"](*exact(given))
    length = w.double().nan_to_num().norm(dim=1, keepdim=True) if every_option else 1.0
    assert_near(ours[0], true[0], 2 * LOOSE[dtype], "dL/dx")
    assert_near(ours[1].double() * length, true[1] * length, 2 * LOOSE[dtype], "dL/dw")
    assert torch.equal(ours[2].double(), true[2])


@pytest.mark.parametrize("scratch_bytes", [12 << 20, 80 << 20, 96 << 20])
@pytest.mark.parametrize("batch", [1, 64, 512, 4096, 100_000])
def test_scratch_is_bounded(scratch_bytes: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By twice L2 or what 256 slots take, whatever the batch and the memory are."""
    pytest.importorskip("triton")
    from protomem_kernels.backends.chunked import products

    monkeypatch.setattr(products, "scratch_bytes", lambda _: scratch_bytes)
    rows, per_logit, per_slot = min(batch, products.ROWS), 14, 512 * 8
    for capacity in (1, 1000, 100_000, 1_000_000, 10_000_000):
        slots = products.slots_of_chunk(torch.device("cpu"), rows, capacity, per_logit, per_slot)
        assert slots % 128 == 0
        scratch = slots * (rows * per_logit + per_slot)
        assert scratch <= max(scratch_bytes, 256 * (rows * per_logit + per_slot))
        chunks = -(-capacity // slots)
        assert (chunks - 1) * slots < capacity
        assert chunks == 1 or capacity - (chunks - 1) * slots > slots - 128 * chunks  # the last is hardly smaller


@interprets
@pytest.mark.triton
def test_products_take_no_more_than_scratch(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No product has more than one chunk's rows, and every one is written where the last chunk's was."""
    from protomem_kernels.backends.chunked import products

    seen: list[tuple[int, int, int]] = []
    multiply = products.multiply
    monkeypatch.setattr(
        products, "multiply", lambda a, b, out: (seen.append((*out.shape, out.data_ptr())), multiply(a, b, out))[1]
    )
    x, w, targets, *_ = problem(torch.bfloat16, False)
    rest = (None, None, None, None, 20.0, 2.0, False, True, 0)
    BACKENDS["chunked"].kernels["negative_logsumexp"](x, w, targets, *rest)
    assert {(height, width) for height, width, _ in seen} == {(32, 256), (16, 256), (32, 88), (16, 88)}
    assert len({place for *_, place in seen}) == 1
