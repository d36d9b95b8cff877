"""Contract of ``margin_softmax_loss`` and of ``negative_logsumexp`` under it, on every backend."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import protomem_kernels as pmk
from protomem_kernels.objective import Bank, Banks, loss_over_banks
from protomem_kernels.ops.negative_logsumexp import EXPONENTS, exponent_offset, negative_logsumexp
from protomem_kernels.types import HardNegativeForm
from tests.ops.cases import (
    assert_as_close_as,
    assert_gradients_hold,
    each_backend,
    each_dtype,
    each_shape,
    strided,
    unit,
)
from tests.ops.dense import dense_loss
from tests.ops.properties import given, settings, st


def inputs(
    shape: tuple[int, int, int], dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embeddings, unit prototypes, targets (some negative) and occupied (about three quarters)."""
    batch, capacity, dim = shape
    g = torch.Generator().manual_seed(seed)
    x = (3 * torch.randn(batch, dim, generator=g, dtype=torch.float64)).to(dtype)
    w = unit(torch.randn(capacity, dim, generator=g, dtype=torch.float64)).to(dtype)
    targets = torch.randint(-1, max(capacity, 1), (batch,), generator=g) if capacity else torch.full((batch,), -1)
    occupied = torch.rand(capacity, generator=g) < 0.75
    return x, w, targets, occupied


@each_backend
def test_worked_example(backend: str) -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, -2.0], [1.0, 1.0]])
    w = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    with pmk.use_backend(backend):
        loss = pmk.margin_softmax_loss(
            x, w, torch.tensor([0, 1, -1]), margin=pmk.CosFace(0.1), scale=2.0, reduction="none"
        )
    # sample 0: cosines .6, .8, -.6; sample 1: cosines 0, -1, 0; sample 2: ignored
    first = math.log(1 + (math.exp(1.6) + math.exp(-1.2)) / math.exp(1.0))
    second = math.log(1 + 2 / math.exp(-2.2))
    assert loss.tolist() == pytest.approx([first, second, 0.0], rel=1e-6)


@each_backend
@each_dtype
@each_shape
@pytest.mark.parametrize("normalize", [False, True])
def test_value_and_gradients_against_dense_logits(
    backend: str, dtype: torch.dtype, shape: tuple[int, int, int], normalize: bool
) -> None:
    x, w, targets, occupied = inputs(shape, dtype)
    upstream = torch.rand(shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = {}
    for name, kind in (("truth", torch.float64), ("peer", torch.promote_types(dtype, torch.float32))):
        xx, ww = x.to(kind, copy=True).requires_grad_(), w.to(kind, copy=True).requires_grad_()
        loss = dense_loss(xx, ww, targets, occupied=occupied, normalize_prototypes=normalize)
        loss.backward(upstream.to(kind))
        results[name] = (loss.detach(), xx.grad, ww.grad if ww.grad is not None else torch.zeros_like(ww))
    xx, ww = strided(x).requires_grad_(), strided(w).requires_grad_()
    with pmk.use_backend(backend):
        loss = pmk.margin_softmax_loss(
            xx, ww, targets.int(), occupied=strided(occupied), normalize_prototypes=normalize, reduction="none"
        )
        loss.backward(upstream.to(loss.dtype))
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    for ours, peer, truth, kind in zip(
        (loss.detach(), xx.grad, ww.grad), results["peer"], results["truth"], (loss.dtype, dtype, dtype), strict=True
    ):
        assert ours.dtype == kind
        rounding = torch.finfo(kind).eps
        assert_as_close_as(ours, peer, truth, tiny=max(1e-6 if kind != torch.float64 else 1e-12, 2 * rounding))


@each_backend
def test_reductions_and_stats(backend: str) -> None:
    x, w, targets, occupied = inputs((6, 20, 4))
    targets[1] = -1
    targets[2] = 3
    truth = dense_loss(x, w, targets, occupied=occupied, scale=8.0)
    kept = targets >= 0
    with pmk.use_backend(backend):
        call = {
            r: pmk.margin_softmax_loss(x, w, targets, occupied=occupied, scale=8.0, reduction=r)
            for r in ("none", "sum", "mean")
        }
        loss, stats = pmk.margin_softmax_loss(
            x, w, targets, occupied=occupied, scale=8.0, reduction="none", return_stats=True
        )
    torch.testing.assert_close(call["none"], truth)
    torch.testing.assert_close(call["sum"], truth.sum())
    torch.testing.assert_close(call["mean"], truth[kept].mean())
    assert torch.equal(loss, call["none"])
    cosine = (unit(x) * w[targets]).sum(dim=1)
    torch.testing.assert_close(stats.target_cosine, torch.where(kept, cosine, 0))
    torch.testing.assert_close(stats.target_probability, torch.where(kept, (-truth).exp(), 0))
    cosines = unit(x) @ w.T
    negative = occupied & (torch.arange(20) != targets[:, None])
    n = torch.where(negative, 8.0 * cosines, -torch.inf).logsumexp(dim=1)
    torch.testing.assert_close(stats.negative_logsumexp, torch.where(kept, n, 0))
    assert not any(field.requires_grad for field in stats)


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("batch", [0, 4])
def test_all_ignored_is_zero(backend: str, reduction: str, batch: int) -> None:
    x = torch.randn(batch, 3, requires_grad=True)
    with torch.no_grad():
        x[:1] = float("nan")
    with pmk.use_backend(backend):
        loss = pmk.margin_softmax_loss(x, torch.eye(3), torch.full((batch,), -1), reduction=reduction)
    loss.sum().backward()
    assert not loss.any()
    assert x.grad is not None
    assert not x.grad.any()


@each_backend
def test_no_negatives_at_all(backend: str) -> None:
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    w = unit(torch.randn(2, 3, dtype=torch.float64)).requires_grad_()
    with pmk.use_backend(backend):
        loss, stats = pmk.margin_softmax_loss(
            x, w, torch.tensor([0, 0]), occupied=torch.tensor([True, False]), return_stats=True
        )
    loss.backward()
    assert loss.item() == 0
    assert stats.negative_logsumexp.tolist() == [-math.inf] * 2
    assert not x.grad.any()
    assert not w.grad.any()


@each_backend
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_target_cosine_of_exactly_one(backend: str, sign: float) -> None:
    for dtype in (torch.float32, torch.float64):
        x = torch.eye(3, dtype=dtype)[:2].requires_grad_()
        w = sign * torch.eye(3, dtype=dtype)
        w.requires_grad_()
        with pmk.use_backend(backend):
            loss = pmk.margin_softmax_loss(x, w, torch.tensor([0, 1]))
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(x.grad).all()
        assert torch.isfinite(w.grad).all()
        expected = dense_loss(x.detach().double(), w.detach().double(), torch.tensor([0, 1])).mean()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@each_backend
def test_a_zero_embedding_has_cosine_zero_and_gradient_zero(backend: str) -> None:
    x = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    w = unit(torch.randn(5, 4, dtype=torch.float64))
    with pmk.use_backend(backend):
        loss, stats = pmk.margin_softmax_loss(x, w, torch.tensor([2]), margin=pmk.CosFace(0.2), return_stats=True)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(math.exp(64 * -0.2) + 4) - 64 * -0.2)
    assert stats.target_cosine.item() == 0
    assert not x.grad.any()


@each_backend
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_broken_embedding_hurts_only_itself(backend: str, poison: float) -> None:
    x, w, targets, occupied = inputs((5, 30, 4))
    targets = targets.clamp(min=0)
    clean = x.clone().requires_grad_()
    broken = x.clone()
    broken[2, 1] = poison
    broken.requires_grad_()
    with pmk.use_backend(backend):
        kwargs = {"occupied": occupied, "reduction": "none"}
        good = pmk.margin_softmax_loss(clean, w, targets, **kwargs)
        bad = pmk.margin_softmax_loss(broken, w, targets, **kwargs)
    good.sum().backward()
    bad.sum().backward()
    others = [0, 1, 3, 4]
    assert not torch.isfinite(bad[2])
    torch.testing.assert_close(bad[others], good[others], rtol=0, atol=0)
    torch.testing.assert_close(broken.grad[others], clean.grad[others], rtol=0, atol=0)


@each_backend
def test_garbage_in_empty_slots_is_never_seen(backend: str) -> None:
    x, w, targets, occupied = inputs((5, 300, 4))
    targets = torch.where(targets >= 0, torch.where(occupied[targets.clamp(min=0)], targets, -1), -1)
    dirty = torch.where(occupied[:, None], w, float("nan"))
    for normalize in (False, True):
        grads = []
        for memory in (w.clone(), dirty.clone()):
            xx, ww = x.clone().requires_grad_(), memory.requires_grad_()
            with pmk.use_backend(backend):
                loss = pmk.margin_softmax_loss(xx, ww, targets, occupied=occupied, normalize_prototypes=normalize)
            loss.backward()
            grads.append((loss.detach(), xx.grad, ww.grad))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@each_backend
def test_a_target_counts_as_present_whatever_occupied_says(backend: str) -> None:
    x, w, targets, _ = inputs((4, 9, 3))
    targets = targets.clamp(min=0)
    empty = torch.zeros(9, dtype=torch.bool)
    empty[targets] = False
    xx, ww = x.clone().requires_grad_(), w.clone().requires_grad_()
    with pmk.use_backend(backend):
        loss, stats = pmk.margin_softmax_loss(
            xx, ww, targets, occupied=~empty & (torch.arange(9) == 8), return_stats=True
        )
    cosine = (unit(x) * w[targets]).sum(dim=1)
    torch.testing.assert_close(stats.target_cosine, cosine)
    truth = dense_loss(x, w, targets, occupied=torch.arange(9) == 8).mean()
    torch.testing.assert_close(loss.detach(), truth)


@each_backend
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mode", ["plain", "hard", "chosen", "hard chosen"])
def test_gradcheck_of_the_heavy_operator(backend: str, normalize: bool, mode: str) -> None:
    x, w, targets, occupied = inputs((5, 7, 3), seed=5)
    x = unit(x).requires_grad_()
    w = (w * (1.7 if normalize else 1.0)).requires_grad_()
    threshold = torch.tensor([-0.9, 0.0, 0.1, 0.3, 2.0], dtype=torch.float64)
    coefficients = torch.tensor([0.9, 0.2, 0.7], dtype=torch.float64)
    form = HardNegativeForm(threshold, coefficients, -2.0, 2.0, 3.0) if "hard" in mode else None
    negatives = torch.tensor([[0, 4, -1]] * 4 + [[-1, -1, -1]]) if "chosen" in mode else None
    mask = None if "chosen" in mode else occupied

    def call(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        c, n = negative_logsumexp(
            x,
            w,
            targets,
            scale=3.0,
            occupied=mask,
            negatives=negatives,
            form=form,
            normalize_prototypes=normalize,
        )
        return c, torch.where(n.isneginf(), 0, n)

    assert_gradients_hold(backend, call, (x, w))


@each_backend
def test_hard_form_and_chosen_negatives_against_the_formula(backend: str) -> None:
    x, w, targets, occupied = inputs((6, 40, 5), seed=5)
    x = unit(x)
    cosine = x @ w.T
    tau = torch.linspace(-0.5, 0.9, 6, dtype=torch.float64)
    a, b, g = 1.2, 0.2, 0.5
    h = torch.where(cosine > tau[:, None], a * cosine + b + g * cosine**2, cosine)
    form = HardNegativeForm(tau, torch.tensor([a, b, g], dtype=torch.float64), -1.0, 1.9, 2.2)
    slot = torch.arange(40)
    with pmk.use_backend(backend):
        _, over_all = negative_logsumexp(x, w, targets, scale=30.0, occupied=occupied, form=form)
        chosen = torch.tensor([[1, 7, -1, 30]]).repeat(6, 1)
        _, over_some = negative_logsumexp(x, w, targets, scale=30.0, negatives=chosen, form=form)
    allowed = occupied & (slot != targets[:, None])
    torch.testing.assert_close(over_all, torch.where(allowed, 30 * h, -torch.inf).logsumexp(dim=1))
    some = torch.isin(slot, torch.tensor([1, 7, 30])) & (slot != targets[:, None])
    torch.testing.assert_close(over_some, torch.where(some, 30 * h, -torch.inf).logsumexp(dim=1))


@each_backend
@pytest.mark.parametrize("scale", [0.5, 64.0, 80.0, 90.0, 128.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_scale_from_one_negative_to_many(backend: str, scale: float, dtype: torch.dtype) -> None:
    for capacity in (2, 9001):  # more than two tiles
        x, w, targets, occupied = inputs((8, capacity, 3), dtype, seed=int(scale))
        targets = targets.clamp(min=0)
        x[0], w[0], w[1] = torch.tensor([1.0, 0, 0]), torch.tensor([-1.0, 0, 0]), torch.tensor([-1.0, 0, 0])
        targets[0] = 0
        xx = x.clone().requires_grad_()
        with pmk.use_backend(backend):
            loss = pmk.margin_softmax_loss(xx, w, targets, occupied=occupied, scale=scale, reduction="none")
        loss.sum().backward()
        x64 = x.double().requires_grad_()
        truth = dense_loss(x64, w.double(), targets, occupied=occupied, scale=scale)
        truth.sum().backward()
        tight = {"rtol": 2e-4, "atol": 2e-5 * scale} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
        torch.testing.assert_close(loss.double(), truth.detach(), **tight)
        torch.testing.assert_close(xx.grad.double(), x64.grad, **tight)


def test_exponent_offset_keeps_every_sum_in_range() -> None:
    for dtype, (bottom, top) in EXPONENTS.items():
        tiny, huge = math.log(torch.finfo(dtype).tiny), math.log(torch.finfo(dtype).max)
        assert tiny <= bottom < 0 < top <= huge
    assert exponent_offset(64.0, 1_000_000, None, torch.float32) == 0
    assert exponent_offset(70.0, 100_000_000, None, torch.float32) == pytest.approx(70 + math.log(1e8) - 88)
    assert exponent_offset(85.0, 100_000, None, torch.float32) is None
    assert exponent_offset(128.0, 1000, None, torch.float64) == 0
    mv = pmk.MVSoftmax().hard_negatives(
        lambda: torch.zeros(1), torch.ones(1, dtype=torch.bool), pmk.ArcFace().bind(torch.ones(1))
    )
    offset = exponent_offset(64.0, 100_000, mv, torch.float32)
    assert offset == pytest.approx(64 * 1.4 + math.log(1e5) + math.log(1.2) - 88)


@each_backend
@settings(max_examples=60, deadline=None)
@given(data=st.data(), scale=st.sampled_from([1.0, 16.0, 64.0]))
def test_any_small_batch_matches_dense_logits(backend: str, data: st.DataObject, scale: float) -> None:
    batch, capacity, dim = (data.draw(st.integers(1, 5)) for _ in range(3))
    entry = st.integers(-3, 3).map(float)
    draw = lambda rows: torch.tensor(  # noqa: E731
        data.draw(st.lists(st.lists(entry, min_size=dim, max_size=dim), min_size=rows, max_size=rows)),
        dtype=torch.float64,
    )
    x, w = draw(batch), draw(capacity)
    targets = torch.tensor(data.draw(st.lists(st.integers(-1, capacity - 1), min_size=batch, max_size=batch)))
    occupied = torch.tensor(data.draw(st.lists(st.booleans(), min_size=capacity, max_size=capacity)))
    with pmk.use_backend(backend):
        loss = pmk.margin_softmax_loss(
            x, w, targets, occupied=occupied, scale=scale, normalize_prototypes=True, reduction="none"
        )
    truth = dense_loss(x, w, targets, occupied=occupied, scale=scale, normalize_prototypes=True)
    torch.testing.assert_close(loss, truth, rtol=1e-6, atol=1e-6 * scale)


@each_backend
@pytest.mark.parametrize("mining", [None, pmk.HardestNegatives(3), pmk.MVSoftmax()])
def test_two_banks_equal_one(backend: str, mining: object) -> None:
    x, w, targets, occupied = inputs((7, 25, 4), seed=2)
    one_x, two_x, w1, w2 = (t.clone().requires_grad_() for t in (x, x, w, w))
    options = {
        "margin": pmk.ArcFace(),
        "scale": 16.0,
        "mining": mining,
        "reduction": "none",
        "return_stats": False,
    }
    with pmk.use_backend(backend):
        one = loss_over_banks(one_x, Banks([Bank(w1, targets, occupied)], False), **options)
        first = torch.where(targets < 10, targets, -1)
        second = torch.where(targets >= 10, targets - 10, -1)
        banks = Banks([Bank(w2[:10], first, occupied[:10]), Bank(w2[10:], second, occupied[10:])], False)
        two = loss_over_banks(two_x, banks, **options)
    torch.testing.assert_close(one, two)
    upstream = torch.rand(7, dtype=torch.float64)
    one.backward(upstream)
    two.backward(upstream)
    torch.testing.assert_close(one_x.grad, two_x.grad)
    torch.testing.assert_close(w1.grad, w2.grad)


@each_backend
@pytest.mark.parametrize("which", [0, 1], ids=["embeddings", "prototypes"])
def test_double_backward_raises(backend: str, which: int) -> None:
    x, w, targets, _ = inputs((3, 6, 2))
    x.requires_grad_()
    w.requires_grad_()
    with pmk.use_backend(backend):
        loss = pmk.margin_softmax_loss(x, w, targets.clamp(min=0))
        (grad,) = torch.autograd.grad(loss, (x, w)[which], create_graph=True)
    with pytest.raises(RuntimeError, match="negative_logsumexp can be differentiated once"):
        grad.sum().backward()


@each_backend
@pytest.mark.parametrize("batch", [5, 40], ids=["all kept", "some kept"])
def test_backward_twice_and_nested(backend: str, batch: int) -> None:
    """What forward keeps lies where backward writes the gradient: a second backward pass must not read it there."""
    x, w, targets, occupied = inputs((batch, 200, 16))
    x.requires_grad_()
    w.requires_grad_()
    upstream = torch.rand(2, batch, dtype=torch.float64)

    def losses(x: Tensor, w: Tensor) -> Tensor:
        return pmk.margin_softmax_loss(x, w, targets, occupied=occupied, reduction="none", scale=16.0)

    with pmk.use_backend(backend):
        loss = losses(x, w)
        first = torch.autograd.grad(loss, (x, w), upstream[0], retain_graph=True)
        copies = [grad.clone() for grad in first]
        second = torch.autograd.grad(loss, (x, w), upstream[1], retain_graph=True)
        again = torch.autograd.grad(loss, (x, w), upstream[0])
        transformed = torch.func.grad(lambda *leaves: (upstream[0] * losses(*leaves)).sum(), (0, 1))(x, w)
    truth = torch.autograd.grad(dense_loss(x, w, targets, occupied=occupied, scale=16.0), (x, w), upstream[1])
    for ours, ours_again, copy, by_function in zip(first, again, copies, transformed, strict=True):
        assert torch.equal(ours, copy)  # nobody wrote into a gradient that was handed out
        torch.testing.assert_close(ours, ours_again)
        torch.testing.assert_close(ours, by_function.detach())
    for ours, expected in zip(second, truth, strict=True):
        torch.testing.assert_close(ours, expected)


@each_backend
def test_a_step_through_saved_tensor_hooks_and_checkpointing(backend: str) -> None:
    x, w, targets, _ = inputs((6, 50, 8))

    def gradients(run: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        with pmk.use_backend(backend):
            return torch.autograd.grad(run(*leaves), leaves)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return pmk.margin_softmax_loss(x, w, targets)

    def copied(x: Tensor, w: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor.clone()):
            return loss(x, w)

    expected = gradients(loss)
    for run in (copied, lambda x, w: checkpoint(loss, x, w, use_reentrant=False)):
        for ours, plain in zip(gradients(run), expected, strict=True):
            assert torch.equal(ours, plain)


@each_backend
def test_autocast_changes_nothing(backend: str) -> None:
    x, w, targets, _ = inputs((16, 500, 32), torch.float32)
    results = []
    for enabled in (False, True):
        xx, ww = x.clone().requires_grad_(), w.clone().requires_grad_()
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=enabled), pmk.use_backend(backend):
            loss = pmk.margin_softmax_loss(xx, ww, targets)
            hardest = pmk.hardest_negatives(xx, ww, k=3).cosines
        (loss + hardest.sum()).backward()
        results.append((loss, hardest, xx.grad, ww.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@each_backend
def test_prototypes_may_be_overwritten_before_backward(backend: str) -> None:
    x, w, targets, _ = inputs((4, 9, 3))
    before = x.clone().requires_grad_()
    after = x.clone().requires_grad_()
    with pmk.use_backend(backend):
        pmk.margin_softmax_loss(before, w, targets).backward()
        loss = pmk.margin_softmax_loss(after, w, targets)
        w.zero_()
        loss.backward()
    assert torch.equal(before.grad, after.grad)


MEASURE = """
import resource, torch, protomem_kernels as pmk
def step(batch, capacity):
    x = torch.randn(batch, 512, requires_grad=True)
    targets = torch.randint(0, capacity, (batch,))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pmk.margin_softmax_loss(x, w[:capacity], targets).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
w = torch.full((100_000, 512), 512**-0.5)
step(512, 2048)  # libraries allocate their own at the first call
print(step(512, 100_000) // 1024)
"""


def test_memory_beyond_inputs_stays_under_100_mib() -> None:
    """At B = 512, M = 100,000, D = 512 the logits alone would take 195 MiB, eager code three times that."""
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100


X, W, T = torch.randn(4, 3), torch.eye(3), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("error", "message", "args", "kwargs"),
    [
        (TypeError, r"embeddings must be a tensor of shape \(B, D\), got NoneType", (None, W, T), {}),
        (ValueError, r"targets must have shape \(4,\) to match embeddings \(4, 3\), got \(3,\)", (X, W, T[:3]), {}),
        (TypeError, "targets must be int64 or int32, got torch.float32", (X, W, T.float()), {}),
        (ValueError, "targets must be below 3, the number of prototypes, got 7", (X, W, T + 5), {}),
        (
            ValueError,
            r"prototypes must have shape \(M, 3\) to match embeddings \(4, 3\), got \(3, 2\)",
            (X, W[:, :2], T),
            {},
        ),
        (TypeError, "prototypes must be floating point, got torch.bool", (X, W.bool(), T), {}),
        (ValueError, "prototypes must be on cpu like embeddings, got meta", (X, W.to("meta"), T), {}),
        (
            TypeError,
            r"occupied must be a bool tensor of shape \(M,\), got torch.float32",
            (X, W, T),
            {"occupied": W[0]},
        ),
        (TypeError, r"occupied must be a bool tensor of shape \(M,\), got list", (X, W, T), {"occupied": [True]}),
        (ValueError, r"occupied must have shape \(3,\) to match prototypes", (X, W, T), {"occupied": T.bool()}),
        (TypeError, "margin must be a callable .*, got float", (X, W, T), {"margin": 0.5}),
        (TypeError, "margin must be an instance, got the class ArcFace", (X, W, T), {"margin": pmk.ArcFace}),
        (TypeError, "mining must be an instance, got the class MVSoftmax", (X, W, T), {"mining": pmk.MVSoftmax}),
        (TypeError, "mining must be a rule of protomem_kernels.mining or None, got int", (X, W, T), {"mining": 64}),
        (ValueError, r"scale must be in \(0, inf\), got 0", (X, W, T), {"scale": 0}),
        (ValueError, r"scale must be in \(0, inf\), got inf", (X, W, T), {"scale": math.inf}),
        (TypeError, "scale must be a number, got Tensor", (X, W, T), {"scale": torch.tensor(64.0)}),
        (
            ValueError,
            "reduction must be one of 'mean', 'sum', 'none', got 'batchmean'",
            (X, W, T),
            {"reduction": "batchmean"},
        ),
    ],
)
def test_bad_input(error: type[Exception], message: str, args: tuple, kwargs: dict) -> None:
    with pytest.raises(error, match=message):
        pmk.margin_softmax_loss(*args, **kwargs)


@each_backend
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("function", ["loss", "chosen", "logits", "hardest"])
@pytest.mark.parametrize("loss_scale", [1, 65536])
def test_float16_gradients_stay_in_range(backend: str, function: str, normalize: bool, loss_scale: int) -> None:
    """At cosines of -1 they are finite, as in float32, and the nearest that float16 has.

    Where the loss was scaled up, as a ``GradScaler`` does, embeddings' gradients overflow as they do in PyTorch:
    hidden, the scaler would never back off. Parameters in float16 are none of its business.
    """
    direction = torch.tensor([[0.6, 0.8], [0.6, -0.8], [1.0, 0.0]]).half()
    targets = torch.tensor([0, 1, -1])
    margin = {"margin": pmk.SphereFace(), "scale": 64.0}
    run = {
        "loss": lambda x, w, **kw: pmk.margin_softmax_loss(x, w, targets, **margin, **kw),
        "chosen": lambda x, w, **kw: pmk.margin_softmax_loss(
            x, w, targets, mining=pmk.HardestNegatives(1), **margin, **kw
        ),
        "logits": lambda x, w, **kw: -pmk.margin_softmax_logits(x, w, targets, **margin, **kw)[0, 0],
        "hardest": lambda x, w, **kw: pmk.hardest_negatives(x, w, k=2, **kw).cosines[:, 0].sum(),
    }[function]
    results = []
    for dtype in (torch.float16, torch.float32):
        x, w = ((-1e-4 * direction).to(dtype), direction.to(dtype))
        x.requires_grad_()
        w.requires_grad_()
        with pmk.use_backend(backend):
            value = run(x, w, normalize_prototypes=normalize)
            results.append(torch.autograd.grad(loss_scale * value, (x, w)))
    (ours_x, ours_w), (wide_x, wide_w) = results
    assert torch.isfinite(wide_x).all()
    assert torch.isfinite(wide_w).all()
    overflows = wide_x.abs() > 65520
    if loss_scale == 1:
        assert torch.isfinite(ours_x).all()
    else:
        assert bool(overflows.any())  # or this shows nothing
        assert (torch.isinf(ours_x) == overflows).all()
        ours_x = torch.where(overflows, 65504 * ours_x.sign(), ours_x)
    pairs = [(ours_x, wide_x), (ours_w, wide_w)]
    if normalize and loss_scale == 1:  # what is left of the prototypes' at a cosine of -1 is rounding, a thousandfold
        assert torch.isfinite(ours_w).all()
        del pairs[1]
    for ours, wide in pairs:
        expected = wide.clamp(-65504, 65504)
        torch.testing.assert_close(ours.float(), expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))
