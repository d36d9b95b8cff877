"""What ``matmul_precision`` costs: errors against float64 in three regimes of data, and whom it reaches."""

from __future__ import annotations

import threading

import pytest
import torch

import protomem_kernels as pmk
from benchmarks.inputs import Size
from benchmarks.precision import errors
from protomem_kernels.backends import precision, triton

interprets = pytest.mark.skipif(not triton.interpreted(), reason="needs Triton's interpreter: TRITON_INTERPRET=1")
SMALL = Size(16, 512, 256)
WORD, HALF = 2.0**-24, 2.0**-9  # relative rounding of float32 and of bfloat16


@interprets
@pytest.mark.triton
@pytest.mark.parametrize("regime", ["trained", "random", "adversarial"])
@pytest.mark.parametrize(
    ("word", "dtype", "cosine", "n"),
    [
        ("highest", torch.bfloat16, 6 * WORD, 3e-5),
        ("high", torch.bfloat16, 2.0**-16, 3e-5),
        ("medium", torch.bfloat16, HALF, 1e-4),
        ("highest", torch.float16, 16 * WORD, 3e-5),
        ("medium", torch.float16, 2.0**-11, 3e-5),
        ("highest", torch.float32, 16 * WORD, 3e-5),
        ("high", torch.float32, 2.0**-9, 1e-1),
    ],
    ids=str,
)
def test_errors(word: str, dtype: torch.dtype, cosine: float, n: float, regime: str) -> None:
    """Bounds of rounding: 16 of float32 for a sum of 256 terms; n at s = 64, to first order beside a 16-bit memory."""
    found = errors(word, regime, dtype, SMALL)
    assert found.cosine <= cosine
    second_order = (64 * HALF) ** 2 / 2 if (word, dtype, regime) == ("medium", torch.bfloat16, "adversarial") else 0
    assert found.n <= n + second_order
    assert found.grad_x <= {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 2e-2}[dtype]
    if word == "highest" and dtype == torch.float32:
        assert max(found.grad_x, found.grad_w) <= 64 * 16 * WORD  # exponentials of s cos


@interprets
@pytest.mark.triton
def test_exact_by_default_and_less_exact_only_when_asked() -> None:
    by_default = errors(precision.in_force(), "random", torch.bfloat16, SMALL)
    assert precision.in_force() == "highest"
    medium = errors("medium", "random", torch.bfloat16, SMALL)
    assert medium.cosine > 100 * by_default.cosine


@pytest.mark.parametrize("word", ["highest", "high", "medium"])
def test_pytorch_s_own_switch_is_the_default(word: str) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(word)
        assert precision.in_force() == word
        with pmk.matmul_precision("high"):
            assert precision.in_force() == "high"
        assert precision.in_force() == word
    finally:
        torch.set_float32_matmul_precision(before)


def test_an_unknown_word_is_refused() -> None:
    with pytest.raises(ValueError, match="precision must be one of highest, high, medium, got 'low'"):
        pmk.matmul_precision("low").__enter__()


def test_backward_has_the_precision_of_forward() -> None:
    """In another thread too, as on a GPU; no block is in force there."""
    seen = []
    x = torch.randn(3, 4, requires_grad=True)
    w = torch.eye(4, requires_grad=True)
    with pmk.matmul_precision("medium"), pytest.MonkeyPatch.context() as patch:
        from protomem_kernels.backends.choice import BACKENDS

        kernel = BACKENDS["reference"].kernels["negative_logsumexp_backward_"]
        patch.setitem(
            BACKENDS["reference"]._kernels,
            "negative_logsumexp_backward_",
            lambda *args: (seen.append(precision.in_force()), kernel(*args))[1],
        )
        with pmk.use_backend("reference"):
            loss = pmk.margin_softmax_loss(x, w, torch.arange(3))
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    assert seen == ["medium"]


def test_cublas_is_held_and_let_go() -> None:
    assert precision.of_cublas() == "ieee"
    with pmk.matmul_precision("high"), precision.held_by_cublas():
        assert precision.of_cublas() == "tf32"
    assert precision.of_cublas() == "ieee"
    assert torch.get_float32_matmul_precision() == "highest"
