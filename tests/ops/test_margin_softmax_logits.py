"""Contract of ``margin_softmax_logits``, on every backend: the loss's own logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import protomem_kernels as pmk
from tests.ops.cases import assert_as_close_as, each_backend, each_dtype, each_shape, strided
from tests.ops.dense import dense_logits
from tests.ops.test_margin_softmax_loss import inputs


@each_backend
def test_worked_example(backend: str) -> None:
    x = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    w = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    with pmk.use_backend(backend):
        logits = pmk.margin_softmax_logits(
            x, w, torch.tensor([1, -1]), margin=pmk.CosFace(0.5), scale=10, occupied=torch.tensor([True, True, False])
        )
    assert logits.tolist() == [pytest.approx([6.0, 3.0, -math.inf]), pytest.approx([10.0, 0.0, -math.inf])]


@each_backend
@each_dtype
@each_shape
@pytest.mark.parametrize("normalize", [False, True])
def test_value_and_gradients(backend: str, dtype: torch.dtype, shape: tuple[int, int, int], normalize: bool) -> None:
    x, w, targets, occupied = inputs(shape, dtype)
    upstream = torch.randn(shape[:2], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = {}
    for name, kind in (("truth", torch.float64), ("peer", torch.promote_types(dtype, torch.float32))):
        xx, ww = x.to(kind, copy=True).requires_grad_(), w.to(kind, copy=True).requires_grad_()
        logits = dense_logits(xx, ww, targets, occupied=occupied, normalize_prototypes=normalize)
        torch.where(torch.isfinite(logits), logits, 0).backward(upstream.to(kind))
        results[name] = (logits.detach(), xx.grad, ww.grad)
    xx, ww = strided(x).requires_grad_(), strided(w).requires_grad_()
    with pmk.use_backend(backend):
        logits = pmk.margin_softmax_logits(xx, ww, targets.int(), occupied=occupied, normalize_prototypes=normalize)
        logits.backward(upstream.to(logits.dtype))
    assert logits.dtype == torch.promote_types(dtype, torch.float32)
    for ours, peer, truth, kind in zip(
        (logits.detach(), xx.grad, ww.grad),
        results["peer"],
        results["truth"],
        (logits.dtype, dtype, dtype),
        strict=True,
    ):
        assert torch.equal(torch.isfinite(ours), torch.isfinite(truth))
        rounding = torch.finfo(kind).eps
        finite = torch.isfinite(truth)
        tiny = max(1e-6 if kind != torch.float64 else 1e-12, 2 * rounding)
        assert_as_close_as(*(torch.where(finite, t, 0) for t in (ours, peer, truth)), tiny=tiny)


@each_backend
@pytest.mark.parametrize(
    "mining",
    [
        None,
        pmk.MVSoftmax(),
        pmk.MVSoftmax(kind="fixed"),
        pmk.NoisyNegativeFilter(0.1),
        pmk.HardestNegatives(3),
        "curricular",
    ],
)
@pytest.mark.parametrize("margin", [pmk.ArcFace(), pmk.CosFace(), pmk.CombinedMargin(1.1, 0.2, 0.1)])
def test_cross_entropy_equals_the_loss(backend: str, margin: object, mining: object) -> None:
    if mining == "curricular":
        mining = pmk.CurricularFace().eval()
        mining.t.fill_(0.3)
    x, w, targets, occupied = inputs((9, 40, 5), seed=4)
    results = []
    for use_logits in (False, True):
        xx, ww = x.clone().requires_grad_(), w.clone().requires_grad_()
        options = {"margin": margin, "mining": mining, "occupied": occupied, "scale": 20.0}
        with pmk.use_backend(backend):
            if use_logits:
                logits = pmk.margin_softmax_logits(xx, ww, targets, **options)
                loss = functional.cross_entropy(logits, targets, ignore_index=-1)
            else:
                loss = pmk.margin_softmax_loss(xx, ww, targets, **options)
            loss.backward()
        results.append((loss.detach(), xx.grad, ww.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@each_backend
@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck(backend: str, normalize: bool) -> None:
    x, w, targets, _ = inputs((4, 7, 3), seed=7)
    x.requires_grad_()
    w = (w * 1.4 if normalize else w).requires_grad_()

    def call(x: Tensor, w: Tensor) -> Tensor:
        with pmk.use_backend(backend):
            return pmk.margin_softmax_logits(
                x, w, targets, scale=3.0, mining=pmk.NoisyNegativeFilter(0.2), normalize_prototypes=normalize
            )

    assert torch.autograd.gradcheck(call, (x, w))


@each_backend
def test_double_backward_raises(backend: str) -> None:
    x = torch.randn(2, 3, requires_grad=True)
    with pmk.use_backend(backend):
        logits = pmk.margin_softmax_logits(x, torch.eye(3), torch.tensor([0, 1]))
    (grad,) = torch.autograd.grad((logits**2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="margin_softmax_logits can be differentiated once"):
        grad.sum().backward()


X, W, T = torch.randn(4, 3), torch.eye(3), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("error", "message", "args", "kwargs"),
    [
        (
            TypeError,
            "margin must be a margin on the target's logit, got DSoftmax",
            (X, W, T),
            {"margin": pmk.DSoftmax()},
        ),
        (ValueError, "targets must be below 3, the number of prototypes, got 5", (X, W, T + 3), {}),
        (ValueError, r"scale must be in \(0, inf\), got -1", (X, W, T), {"scale": -1}),
        (TypeError, r"occupied must be a bool tensor of shape \(M,\), got torch.int64", (X, W, T), {"occupied": T[:3]}),
        (ValueError, r"prototypes must have shape \(M, 3\)", (X, W[:, :2], T), {}),
    ],
)
def test_bad_input(error: type[Exception], message: str, args: tuple, kwargs: dict) -> None:
    with pytest.raises(error, match=message):
        pmk.margin_softmax_logits(*args, **kwargs)
