"""Contract of ``margin_softmax_logits``, on every backend: the loss's own logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import protomem_kernels as pmk
from tests.ops.cases import assert_as_close_as, assert_gradients_hold, each_backend, each_dtype, each_shape, strided
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
@pytest.mark.parametrize("form", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kinds", ["float64 float64", "float32 float64", "float32 float32"])
def test_many_tiles_equal_the_reference(
    backend: str, form: bool, normalize: bool, kinds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than one tile of samples, of slots and of columns, with a broken sample and rubbish in empty slots."""
    kind, memory_kind = (getattr(torch, name) for name in kinds.split())
    x, w, targets, occupied = inputs((300, 1100, 300), seed=3)
    x, w = functional.normalize(x).to(kind), (w * 1.3 if normalize else w).to(memory_kind)
    x[5] = float("nan")
    w[~occupied] = float("inf")
    occupied[targets[3]] = False
    generator = torch.Generator().manual_seed(2)
    upstream, z = torch.randn(300, 1100, generator=generator, dtype=kind), torch.linspace(-9, 9, 300, dtype=kind)
    tau = torch.linspace(-0.1, 0.1, 300, dtype=kind) if form else None
    coefficients = torch.tensor([1.2, 0.2, 0.5], dtype=kind) if form else None
    if backend == "triton":
        from protomem_kernels.backends.triton import margin_softmax_logits

        monkeypatch.setattr(margin_softmax_logits, "SCRATCH_BYTES", 1)  # the memory in as many chunks as can be

    def run(name: str, dtype: torch.dtype) -> list[Tensor]:
        x_, w_, z_, g_, tau_, coefficients_ = (
            None if t is None else t.to(dtype if dtype == torch.float64 else t.dtype)
            for t in (x, w, z, upstream, tau, coefficients)
        )
        form_ = (tau_, coefficients_, 12.0, normalize)
        with pmk.use_backend(name):
            logits = torch.ops.protomem.margin_softmax_logits(x_, w_, targets, z_, occupied, *form_)
            grads = torch.ops.protomem.margin_softmax_logits_backward(g_, x_, w_, targets, occupied, *form_, True)
        assert logits[5][occupied].isnan().sum() >= occupied.sum() - 1  # its target's logit was given
        logits[5], grads[0][5] = 0, 0  # what else is in its logits, and its own gradient, may be any non-finite number
        return [logits, *grads]

    truth, peer = run("reference", torch.float64), run("reference", kind)
    # The CUDA kernels form float32 products of three in tf32, right to 2^-21 (csrc/cuda/stream.cuh); others in float32.
    tiny = 1e-12 if kind == torch.float64 else 2.0**-21 if backend == "cuda" else 1e-7
    for ours, theirs, right in zip(run(backend, kind), peer, truth, strict=True):
        assert_as_close_as(ours, theirs, right, tiny=tiny)


@each_backend
@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck(backend: str, normalize: bool) -> None:
    x, w, targets, _ = inputs((4, 7, 3), seed=7)
    x.requires_grad_()
    w = (w * 1.4 if normalize else w).requires_grad_()

    def call(x: Tensor, w: Tensor) -> Tensor:
        return pmk.margin_softmax_logits(
            x, w, targets, scale=3.0, mining=pmk.NoisyNegativeFilter(0.2), normalize_prototypes=normalize
        )

    assert_gradients_hold(backend, call, (x, w))


@each_backend
@pytest.mark.parametrize("normalize", [False, True])
def test_a_broken_embedding_passes_nothing_on_to_prototypes(backend: str, normalize: bool) -> None:
    x, w, targets, occupied = inputs((5, 30, 4))
    targets = targets.clamp(min=0)
    grads = []
    for poison in (None, float("nan"), float("inf")):
        xx, ww = x.clone(), w.clone().requires_grad_()
        xx[2] = 0 if poison is None else poison
        with pmk.use_backend(backend):
            logits = pmk.margin_softmax_logits(xx, ww, targets, occupied=occupied, normalize_prototypes=normalize)
        upstream = torch.ones_like(logits)
        upstream[2] = 0
        logits.backward(torch.where(logits.isfinite(), upstream, 0))
        grads.append(ww.grad)
        assert poison is None or not torch.isfinite(logits[2, targets[2]])  # shown, never hidden
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


@each_backend
def test_gradients_of_targets_and_negatives_stay_in_float16_together(backend: str) -> None:
    x = torch.tensor([[3.0, 4.0], [4.0, 3.0]])
    w = torch.tensor([[1e-3, 0.0]], dtype=torch.float16, requires_grad=True)
    with pmk.use_backend(backend):  # a target of one sample and a negative of the other: each alone is beyond 65504
        logits = pmk.margin_softmax_logits(
            x, w, torch.tensor([0, -1]), margin=pmk.CosFace(0.0), scale=1000, normalize_prototypes=True
        )
    logits.sum().backward()
    assert w.grad.tolist() == [[0.0, 65504.0]]


@each_backend
def test_garbage_in_empty_slots_reaches_no_gradient(backend: str) -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    w = torch.full((5, 4), float("nan"), dtype=torch.float64)
    w[3:] = torch.eye(4, dtype=torch.float64)[:2]
    w.requires_grad_()
    with pmk.use_backend(backend):  # without a target, slot 0 is looked up in its place
        logits = pmk.margin_softmax_logits(x, w, torch.tensor([3, -1, 4]), occupied=torch.arange(5) >= 3)
    logits[:, 3:].sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(w.grad).all()


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
