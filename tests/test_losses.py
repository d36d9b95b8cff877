"""The training heads beside slow models: a dict memory, explicit logits, and autograd for the gradients."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from pytorch_metric_learning import losses as peer
from torch import nn
from torch.nn import functional

from protomem_kernels import (
    AdaFace,
    ArcFace,
    CenterQuality,
    CosFace,
    CurricularFace,
    DSoftmax,
    DSoftmaxLoss,
    ElasticFace,
    HardestNegatives,
    HardSamples,
    MagFace,
    MarginSoftmaxLoss,
    MVSoftmax,
    NoisyNegativeFilter,
    NormQuality,
    PrototypeMemoryLoss,
    RecognizabilityQuality,
    SoftmaxQuality,
    SphereFace,
)
from tests import oracles

MODES = ("none", "fresh", "memory")
each_mode = pytest.mark.parametrize("mode", MODES)
NAN, INF = math.nan, math.inf
DIM = 6


def head(mode="none", *, capacity=10, dim=DIM, attach=True, **options):
    """A head in float64 unless told otherwise; in mode "memory" an optimiser that stands still is attached."""
    options = {"margin": ArcFace(0.3), "scale": 8.0, "dtype": torch.float64, **options}
    loss_fn = PrototypeMemoryLoss(dim, capacity, prototype_gradient=mode, **options)
    if mode == "memory" and attach:
        loss_fn.attach_optimizer(torch.optim.SGD(loss_fn.parameters(), lr=0.0))
    return loss_fn


def batches(steps, *, identities=12, per_batch=3, images=3, seed=0, dtype=torch.float64, dim=DIM):
    """Batches of ``images`` images of each of ``per_batch`` identities, one ignored sample among them."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(identities, dim, generator=generator, dtype=torch.float64)
    for _ in range(steps):
        chosen = torch.randperm(identities, generator=generator)[:per_batch]
        labels = chosen.repeat(images)[torch.randperm(per_batch * images, generator=generator)]
        noise = torch.randn(len(labels), dim, generator=generator, dtype=torch.float64)
        e = (centers[labels] + 0.8 * noise) * (1 + 5 * torch.rand(len(labels), 1, generator=generator))
        yield e.to(dtype), torch.where(torch.arange(len(labels)) == 4, -1, labels * 1_000_000_007)


def arc(c, norm):
    return oracles.arcface(c, 0.3)


class Model:
    """A step as the contract tells it: aggregate, write, loss against the whole memory, gradients by autograd."""

    def __init__(self, mode, *, capacity=10, ratio=0.5, policy="fifo", scale=8.0, formula=arc, negatives=None):
        self.mode, self.scale, self.formula, self.negatives = mode, scale, formula, negatives
        self.memory = oracles.DictMemory(capacity, DIM, ratio=ratio, policy=policy)

    def step(self, embeddings, labels, weights=None, penalty=None):
        """Return losses, the prototypes they ran over, and the targets; ``embeddings`` may require grad."""
        self.memory.detach()
        made = embeddings if self.mode == "fresh" else embeddings.detach()
        given = weights if self.mode == "fresh" or weights is None else weights.detach()
        targets = self.memory.step(made, labels, given)
        rows = self.memory.rows
        if self.mode == "memory":
            rows = rows.detach().requires_grad_()
        losses = oracles.dense_losses(
            embeddings,
            rows,
            targets,
            self.formula,
            self.scale,
            negatives=self.negatives,
            occupied=self.memory.occupied,
        )
        if penalty is not None:
            losses = losses + torch.where(targets >= 0, penalty(embeddings.norm(dim=1)), 0)
        return losses, rows, targets


def assert_steps_agree(loss_fn, model, data, *, reduction, weights=None, quality=None, penalty=None, tolerance=1e-10):
    for step, (e, labels) in enumerate(data):
        ours, wanted = e.clone().requires_grad_(), e.double().clone().requires_grad_()
        q = None if weights is None else weights[step]
        loss = loss_fn(ours, labels, q)
        if quality is not None:
            q = quality(wanted, labels)
        losses, rows, targets = model.step(wanted, labels, q, penalty)
        want = oracles.reduce(losses, targets, reduction)
        assert torch.isfinite(want).all()
        torch.testing.assert_close(loss.double(), want, rtol=tolerance, atol=tolerance)
        upstream = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        loss_fn.zero_grad()
        loss.backward(upstream.to(loss.dtype))
        want.backward(upstream)
        torch.testing.assert_close(ours.grad.double(), wanted.grad, rtol=10 * tolerance, atol=10 * tolerance)
        if model.mode == "memory":
            grad = loss_fn.memory.prototypes.grad
            torch.testing.assert_close(grad.double(), rows.grad, rtol=10 * tolerance, atol=10 * tolerance)
        else:
            assert list(loss_fn.memory.parameters()) == []
        model.memory.detach()
        model.memory.equals(loss_fn.memory, rtol=0, atol=tolerance)


@each_mode
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("policy", ["fifo", "lru"])
def test_training_steps_equal_the_model(mode, reduction, policy):
    loss_fn = head(mode, reduction=reduction, policy=policy)
    assert_steps_agree(loss_fn, Model(mode, policy=policy), batches(8), reduction=reduction)


@each_mode
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_any_refresh_ratio(mode, ratio):
    loss_fn, model = head(mode, refresh_ratio=ratio), Model(mode, ratio=ratio)
    assert_steps_agree(loss_fn, model, batches(6, identities=6, seed=1), reduction="mean")


@each_mode
def test_float32_steps(mode):
    loss_fn = head(mode, dtype=torch.float32)
    data = batches(6, dtype=torch.float32, seed=2)
    assert_steps_agree(loss_fn, Model(mode), data, reduction="mean", tolerance=1e-5)


@each_mode
def test_more_samples_than_slots(mode):
    loss_fn, model = head(mode, capacity=4, reduction="none"), Model(mode, capacity=4)
    assert_steps_agree(loss_fn, model, batches(6, images=6, seed=3), reduction="none")


@each_mode
def test_the_callers_own_weights(mode):
    data = list(batches(5, seed=4))
    generator = torch.Generator().manual_seed(0)
    weights = [torch.rand(len(labels), generator=generator, dtype=torch.float64) for _, labels in data]
    weights[2].zero_()
    assert_steps_agree(head(mode), Model(mode), data, reduction="mean", weights=weights)


@each_mode
@pytest.mark.parametrize("detach", [True, False])
def test_a_quality_estimator(mode, detach):
    def quality(e, labels):
        norms = e.norm(dim=1)
        q = norms / norms[labels >= 0].max()
        return q.detach() if detach else q

    loss_fn = head(mode, quality=NormQuality(detach=detach))
    assert_steps_agree(loss_fn, Model(mode), batches(4, seed=5), reduction="mean", quality=quality)


def test_weights_given_go_before_the_quality_estimator():
    (e, labels), weights = next(batches(1)), torch.rand(9, dtype=torch.float64)
    with_quality, without = head(quality=NormQuality()), head()
    assert torch.equal(with_quality(e, labels, weights), without(e, labels, weights))
    assert oracles.same(with_quality.state_dict(), without.state_dict())


def test_weights_pass_their_own_gradient_in_mode_fresh():
    data = list(batches(3, seed=6))
    loss_fn, model = head("fresh"), Model("fresh")
    for e, labels in data:
        q = torch.rand(len(labels), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        ours, wanted = q.clone().requires_grad_(), q.clone().requires_grad_()
        (got,) = torch.autograd.grad(loss_fn(e, labels, ours), ours)
        losses, _, targets = model.step(e, labels, wanted)
        (want,) = torch.autograd.grad(oracles.reduce(losses, targets, "mean"), wanted)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def hard_form(cos, c, modified):
    return torch.where(cos > modified[:, None], 1.2 * cos + 0.2, cos)


def twin_form(cos, c, modified):
    return torch.where(cos > 0.4, 0.0, cos)


@each_mode
@pytest.mark.parametrize(("rule", "form"), [(MVSoftmax(0.2), hard_form), (NoisyNegativeFilter(0.4), twin_form)])
def test_mining_in_every_mode(mode, rule, form):
    loss_fn, model = head(mode, mining=rule, reduction="none"), Model(mode, negatives=form)
    assert_steps_agree(loss_fn, model, batches(5, seed=7), reduction="none")


@each_mode
@pytest.mark.parametrize("k", [1, 3, 50])
def test_hardest_negatives_in_every_mode(mode, k):
    model = Model(mode)

    def form(cos, c, modified):
        cos_of = cos.detach().clone()
        targets = torch.tensor([model.memory.slot(label) for label in labels.tolist()])
        cos_of[:, ~model.memory.occupied] = -INF
        cos_of.scatter_(1, targets.clamp(min=0)[:, None], -INF)
        kept = torch.zeros_like(cos_of, dtype=torch.bool)
        kept.scatter_(1, cos_of.topk(min(k, cos_of.shape[1]), dim=1).indices, True)
        return torch.where(kept, cos, -INF)

    model.negatives = form
    loss_fn = head(mode, mining=HardestNegatives(k))
    for e, labels in batches(5, seed=8):  # `form` reads the labels
        assert_steps_agree(loss_fn, model, [(e, labels)], reduction="mean")


@each_mode
def test_hard_samples_in_every_mode(mode):
    loss_fn, model = head(mode, mining=HardSamples(0.5), reduction="none"), Model(mode)
    for e, labels in batches(3, seed=9):
        losses, _, _ = model.step(e, labels)
        kept = losses.argsort(descending=True)[:4]  # 8 samples count
        want = torch.zeros_like(losses).index_copy(0, kept, losses[kept])
        torch.testing.assert_close(loss_fn(e, labels), want, rtol=1e-10, atol=1e-10)


@each_mode
def test_magface_with_its_regulariser(mode):
    def formula(c, norm):
        return oracles.arcface(c, oracles.magface_margin(norm, 2.0, 20.0, 0.1, 0.4))

    loss_fn = head(mode, margin=MagFace(2.0, 20.0, 0.1, 0.4, 3.0))
    assert_steps_agree(
        loss_fn,
        Model(mode, formula=formula),
        batches(4, seed=10),
        reduction="mean",
        penalty=lambda norm: oracles.magface_penalty(norm, 2.0, 20.0, 3.0),
    )


@each_mode
def test_d_softmax_against_the_memory(mode):
    loss_fn = head(mode, margin=DSoftmax(0.7), reduction="none")
    model = Model(mode)
    for e, labels in batches(4, seed=11):
        ours, wanted = e.clone().requires_grad_(), e.clone().requires_grad_()
        _, rows, targets = model.step(wanted, labels)
        cos = oracles.unit(wanted) @ rows.T
        c = cos.gather(1, targets.clamp(min=0)[:, None])[:, 0]
        is_target = functional.one_hot(targets.clamp(min=0), 10).bool()
        n = (8 * cos).masked_fill(is_target | ~model.memory.occupied, -INF).logsumexp(dim=1)
        want = torch.where(targets >= 0, functional.softplus(8 * (0.7 - c)) + functional.softplus(n), 0)
        got = loss_fn(ours, labels)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        (got_grad,), (grad,) = (torch.autograd.grad(loss.sum(), leaf) for loss, leaf in ((got, ours), (want, wanted)))
        torch.testing.assert_close(got_grad, grad, rtol=1e-9, atol=1e-9)


def test_all_modes_see_the_same_loss():
    heads = [head(mode, reduction="none") for mode in MODES]
    for e, labels in batches(6, seed=12):
        none, fresh, memory = (loss_fn(e, labels) for loss_fn in heads)
        assert torch.equal(none, memory)
        torch.testing.assert_close(none, fresh, rtol=1e-12, atol=1e-12)


# Mode "memory": the optimiser


OPTIMIZERS = {
    "sgd with momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.3, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.05),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_optimiser_steps_rows_that_stay_of_unit_length(make):
    loss_fn = head("memory", attach=False)
    optimizer = make(loss_fn.parameters())
    loss_fn.attach_optimizer(optimizer)
    held, replaced = [-1] * 10, 0
    for e, labels in batches(12, identities=16, seed=13):
        before = loss_fn.memory.prototypes.detach().clone()
        state_before = {k: v.clone() for k, v in optimizer.state[loss_fn.memory.prototypes].items() if v is not None}
        loss_fn(e, labels).backward()
        written = loss_fn.memory.prototypes.detach().clone()
        now = loss_fn.memory.identities.tolist()
        taken = [s for s in range(10) if now[s] != held[s]]
        replaced += sum(held[s] >= 0 for s in taken)
        for name, value in optimizer.state[loss_fn.memory.prototypes].items():
            if name == "step":
                assert torch.equal(value, state_before[name])
                continue
            assert not value[taken].any(), "the state of a slot that a new identity took"
            kept = [s for s in range(10) if s not in taken]
            assert torch.equal(value[kept], state_before[name][kept])
        optimizer.step()
        optimizer.zero_grad()
        after = loss_fn.memory.prototypes.detach()
        occupied = loss_fn.memory.occupied
        assert not torch.equal(after, written)
        assert not torch.equal(after, before)
        torch.testing.assert_close(after[occupied].norm(dim=1), torch.ones(int(occupied.sum()), dtype=torch.float64))
        assert not after[~occupied].any()
        held = now
    assert replaced >= 3


def test_the_optimiser_moves_rows_as_written_by_hand():
    """Plain SGD: row <- unit(row - lr dL/drow), by autograd on the explicit logits."""
    loss_fn, model = head("memory", attach=False), Model("memory")
    optimizer = torch.optim.SGD(loss_fn.parameters(), lr=0.5)
    loss_fn.attach_optimizer(optimizer)
    for e, labels in batches(5, seed=14):
        loss_fn(e, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses, rows, targets = model.step(e, labels)
        (grad,) = torch.autograd.grad(oracles.reduce(losses, targets, "mean"), rows)
        model.memory.row = list(oracles.unit(rows.detach() - 0.5 * grad))
        model.memory.equals(loss_fn.memory, rtol=0, atol=1e-10)


def test_mode_memory_needs_its_optimiser():
    loss_fn = head("memory", attach=False)
    e, labels = next(batches(1))
    before = oracles.snapshot(loss_fn)
    with pytest.raises(RuntimeError, match=r"prototype_gradient='memory' needs attach_optimizer\(optimizer\)"):
        loss_fn(e, labels)
    assert oracles.same(before, loss_fn.state_dict())
    with pytest.raises(ValueError, match=r"optimizer must hold memory.prototypes"):
        loss_fn.attach_optimizer(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"prototype_gradient must be 'memory' to attach an optimizer, got 'none'"):
        head().attach_optimizer(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    assert math.isnan(loss_fn.eval()(e, labels).item())  # reading needs none; nobody is known


# eval()


@each_mode
def test_eval_never_writes_and_ignores_unknown_identities(mode):
    loss_fn = head(mode, margin=AdaFace(0.2), mining=CurricularFace(), reduction="none")
    for e, labels in batches(4):
        loss_fn(e, labels)
    loss_fn.eval()
    before = oracles.snapshot(loss_fn)
    t, mean, std = float(loss_fn.mining.t), float(loss_fn.margin.mean), float(loss_fn.margin.std)
    identities = loss_fn.memory.identities.tolist()
    e, labels = next(batches(1, seed=40))
    labels = torch.tensor([identities[0], identities[3], 5, -1, identities[1], 2**62, 5, identities[0], -3])
    targets = torch.tensor([0, 3, -1, -1, 1, -1, -1, 0, -1])

    def formula(c, norm):
        return oracles.adaface(c, norm, 0.2, 0.333, mean, std)

    def form(cos, c, modified):
        return torch.where(cos > modified[:, None], cos * (t + cos), cos)

    ours, wanted = e.clone().requires_grad_(), e.clone().requires_grad_()
    got = loss_fn(ours, labels)
    want = oracles.dense_losses(
        wanted,
        loss_fn.memory.prototypes.detach(),
        targets,
        formula,
        8.0,
        negatives=form,
        occupied=loss_fn.memory.occupied,
    )
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # AdaFace's statistics are float32
    assert (got[targets < 0] == 0).all()
    (grad,), (want_grad,) = (torch.autograd.grad(loss.sum(), leaf) for loss, leaf in ((got, ours), (want, wanted)))
    torch.testing.assert_close(grad, want_grad, rtol=1e-5, atol=1e-6)
    loss_fn(e, labels, return_stats=True)
    assert oracles.same(before, loss_fn.state_dict())


# The very first batches, and nothing at all


@each_mode
@pytest.mark.parametrize(
    "margin",
    [ArcFace(0.5), ArcFace(0.5, straight_through=True), AdaFace(), MagFace(), ElasticFace(), DSoftmax(0.9)],
    ids=lambda margin: type(margin).__name__,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_first_batches_are_finite(mode, margin, dtype):
    """Empty memory; one identity; one image of an identity with refresh_ratio=1, whose prototype is itself."""
    loss_fn = head(mode, margin=margin, scale=64.0, refresh_ratio=1.0, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for labels in ([7], [7], [7, 8], [-1, -1], [8, 9, 10]):
        e = torch.randn(len(labels), DIM, generator=generator, dtype=dtype).requires_grad_()
        loss, stats = loss_fn(e, torch.tensor(labels), return_stats=True)
        loss_fn.zero_grad()
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(e.grad).all()
        if mode == "memory":
            assert torch.isfinite(loss_fn.memory.prototypes.grad).all()
        counts = torch.tensor(labels) >= 0
        expected = torch.where(counts, 1.0, 0.0).to(dtype)
        torch.testing.assert_close(stats.target_cosine, expected, rtol=0, atol=2 * torch.finfo(dtype).eps)


def test_an_only_identity_has_loss_zero_and_an_only_image_cosine_one():
    loss_fn = head(scale=64.0, refresh_ratio=1.0, dtype=torch.float32, dim=2)
    e = torch.tensor([[3.0, 4.0]], requires_grad=True)
    loss, stats = loss_fn(e, torch.tensor([5]), return_stats=True)
    (grad,) = torch.autograd.grad(loss, e)
    assert loss.item() == 0
    assert grad.abs().max() == 0
    assert stats.target_cosine.item() == 1.0
    assert stats.target_probability.item() == 1.0
    assert stats.hardest_cosine.item() == -INF
    assert stats.hardest_identity.item() == -1


@each_mode
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("state", ["empty", "filled"])
@pytest.mark.parametrize("rows", [0, 5])
def test_all_ignored_is_zero_with_zero_gradients(mode, reduction, state, rows):
    loss_fn = head(mode, reduction=reduction)
    if state == "filled":
        for e, labels in batches(3):
            loss_fn(e, labels)
    before = loss_fn.memory.identities.clone()
    e = torch.randn(rows, DIM, dtype=torch.float64, requires_grad=True)
    loss = loss_fn(e, torch.full((rows,), -1))
    assert loss.shape == ((rows,) if reduction == "none" else ())
    assert not loss.detach().any()
    loss.sum().backward()
    assert torch.equal(e.grad, torch.zeros_like(e))
    assert torch.equal(before, loss_fn.memory.identities)
    if mode == "memory":
        assert not loss_fn.memory.prototypes.grad.any()


@each_mode
def test_a_zero_embedding_is_harmless(mode):
    loss_fn, model = head(mode, reduction="none"), Model(mode)
    (first, second), (e, labels) = batches(2)
    loss_fn(first, second)
    model.step(first, second)
    e[0] = 0
    e.requires_grad_()
    losses = loss_fn(e, labels)
    want, _, _ = model.step(e.detach(), labels)
    torch.testing.assert_close(losses, want, rtol=1e-10, atol=1e-10)
    (grad,) = torch.autograd.grad(losses.sum(), e)
    assert not grad[0].any()
    assert torch.isfinite(grad).all()


# Non-finite embeddings


def nan_run(mode, bad, upstream, label, **options):
    """Train two steps, then one with sample 0 broken; return losses, gradient and the head."""
    loss_fn = head(mode, reduction="none", capacity=20, **options)
    for e, labels in batches(2, seed=15):
        loss_fn(e, labels)
    e, labels = list(batches(3, seed=15))[-1]
    labels[0] = label if bad is not None else -1
    if bad is not None:
        e[0, 1] = bad
    e.requires_grad_()
    losses = loss_fn(e, labels)
    (losses * upstream).sum().backward() if upstream is not None else losses[1:].sum().backward()
    return losses.detach(), e.grad, loss_fn


@each_mode
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("label", [555, 0], ids=["a new identity", "a known one"])
@pytest.mark.parametrize("margin", [ArcFace(0.3), CosFace(0.2), DSoftmax(0.9)], ids=lambda m: type(m).__name__)
def test_a_non_finite_embedding_shows_in_its_own_loss_alone(mode, bad, label, margin):
    known = head(mode, capacity=20)
    for e, labels in batches(2, seed=15):
        known(e, labels)
    present = set(list(batches(3, seed=15))[-1][1].tolist())
    if label == 0:  # an identity of the memory that this batch does not hold otherwise
        label = next(i for i in known.memory.identities.tolist() if i >= 0 and i not in present)
    losses, _, loss_fn = nan_run(mode, bad, None, label, margin=margin)
    without, _, undisturbed = nan_run(mode, None, None, label, margin=margin)
    assert not torch.isfinite(losses[0])
    assert torch.isfinite(losses[1:]).all()
    torch.testing.assert_close(losses[1:], without[1:], rtol=1e-13, atol=1e-13)
    assert oracles.same(loss_fn.state_dict(), undisturbed.state_dict())
    assert torch.isfinite(loss_fn.memory.prototypes).all()


@each_mode
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("upstream", ["the finite losses", "all losses"])
def test_a_non_finite_embedding_touches_no_other_gradient(mode, bad, upstream):
    """Operator 3: it "touches no other sample's loss or gradient"."""
    weights = None if upstream == "the finite losses" else torch.ones(9, dtype=torch.float64)
    _, grad, _ = nan_run(mode, bad, weights, 555)
    _, want, _ = nan_run(mode, None, weights, 555)
    assert torch.isfinite(grad[1:]).all()
    torch.testing.assert_close(grad[1:], want[1:], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_non_finite_embedding_masked_by_the_caller_leaves_the_prototypes_gradient_finite(bad):
    """Only the finite losses are summed: the broken sample's upstream gradient is 0, the optimiser steps the memory."""
    _, _, loss_fn = nan_run("memory", bad, None, 555)
    _, _, undisturbed = nan_run("memory", None, None, 555)
    torch.testing.assert_close(loss_fn.memory.prototypes.grad, undisturbed.memory.prototypes.grad)


@pytest.mark.parametrize(("size", "counted"), [(1e-30, 1e-3), (1e30, 100.0)])
def test_adaface_counts_norms_whose_squares_leave_float32(size, counted):
    loss_fn = PrototypeMemoryLoss(2, 4, margin=AdaFace(momentum=1.0))
    loss_fn(size * torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([1, 2]))
    assert float(loss_fn.margin.mean) == pytest.approx(counted)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("margin", [AdaFace, MagFace])
def test_a_non_finite_embedding_and_margins_that_read_norms(bad, margin):
    losses, grad, loss_fn = nan_run("none", bad, None, 555, margin=margin())
    without, want, undisturbed = nan_run("none", None, None, 555, margin=margin())
    assert not torch.isfinite(losses[0])
    torch.testing.assert_close(losses[1:], without[1:], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad[1:], want[1:], rtol=1e-12, atol=1e-12)
    assert oracles.same(loss_fn.state_dict(), undisturbed.state_dict())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_non_finite_embedding_is_not_hidden_in_the_mean(reduction):
    for training in (True, False):
        loss_fn = head(reduction=reduction).train(training)
        e, labels = next(batches(1))
        e[0] = NAN
        labels[0] = 555
        assert not torch.isfinite(loss_fn(e, labels))


def test_a_non_finite_embedding_of_an_ignored_sample_is_ignored():
    loss_fn, other = head(reduction="none"), head(reduction="none")
    e, labels = next(batches(1))
    broken = e.clone()
    broken[4] = NAN
    assert labels[4] == -1
    broken.requires_grad_()
    losses = loss_fn(broken, labels)
    assert torch.equal(losses, other(e, labels))
    (grad,) = torch.autograd.grad(losses.sum(), broken)
    assert not grad[4].any()
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("mode", ["none", "fresh"])
def test_two_forwards_before_one_backward(mode):
    first, second = batches(2, identities=4, seed=16)
    loss_fn, model = head(mode), Model(mode)
    leaves = [[e.clone().requires_grad_() for e, _ in (first, second)] for _ in range(2)]
    (loss_fn(leaves[0][0], first[1]) + loss_fn(leaves[0][1], second[1])).backward()
    total = 0
    for leaf, (_, labels) in zip(leaves[1], (first, second), strict=True):
        losses, _, targets = model.step(leaf, labels)
        total = total + oracles.reduce(losses, targets, "mean")
    total.backward()
    for ours, wanted in zip(*leaves, strict=True):
        torch.testing.assert_close(ours.grad, wanted.grad, rtol=1e-9, atol=1e-10)


# Stats


@each_mode
@pytest.mark.parametrize("training", [True, False])
def test_stats(mode, training):
    loss_fn, model, plain = head(mode), Model(mode), head(mode)
    for step, (e, labels) in enumerate(batches(8, seed=17)):
        if step == 7:
            loss_fn.train(training)
            plain.train(training)
        e.requires_grad_()
        loss, stats = loss_fn(e, labels, return_stats=True)
        assert torch.equal(loss, plain(e, labels))
        if step == 7 and not training:
            rows, occupied = model.memory.rows.detach(), model.memory.occupied
            targets = torch.tensor([model.memory.slot(label) for label in labels.tolist()])
            counts = (0, 0, 0)
        else:
            _, rows, targets = model.step(e.detach(), labels)
            rows, occupied = rows.detach(), model.memory.occupied
            counts = (model.memory.entered, model.memory.refreshed, model.memory.left)
        assert (int(stats.entered), int(stats.refreshed), int(stats.left)) == counts
        assert all(not value.requires_grad for value in stats)
        cos = oracles.unit(e.detach()) @ rows.T
        logits = oracles.dense_logits(e.detach(), rows, targets, arc, 8.0, occupied=occupied)
        for i, target in enumerate(targets.tolist()):
            others = [j for j in range(10) if bool(occupied[j]) and j != target]
            nearest = max(others, key=lambda j: float(cos[i, j]))
            assert stats.hardest_cosine[i].item() == pytest.approx(float(cos[i, nearest]), abs=1e-10)
            assert int(stats.hardest_identity[i]) == model.memory.identity[nearest]
            if target < 0:
                assert stats.target_cosine[i].item() == stats.target_probability[i].item() == 0
                continue
            assert stats.target_cosine[i].item() == pytest.approx(float(cos[i, target]), abs=1e-10)
            probability = float(logits[i].softmax(dim=0)[target])
            assert stats.target_probability[i].item() == pytest.approx(probability, abs=1e-10)


def test_stats_do_not_change_what_is_written():
    with_stats, without = head("fresh"), head("fresh")
    for e, labels in batches(5):
        with_stats(e, labels, return_stats=True)
        without(e, labels)
        assert oracles.same(with_stats.state_dict(), without.state_dict())


# State


@each_mode
def test_resuming_from_a_state_dict_is_exact(mode, tmp_path):
    def make():
        return head(
            mode,
            margin=AdaFace(momentum=0.2),
            mining=CurricularFace(0.3),
            quality=RecognizabilityQuality(DIM),
            dtype=torch.float32,
            attach=False,
        )

    def train(loss_fn, optimizer, data):
        result = []
        for e, labels in data:
            loss_fn.quality.update_unrecognizable(e[:2].detach())
            e = e.clone().requires_grad_()
            loss = loss_fn(e, labels)
            loss.backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
            result += [loss.detach(), e.grad]
        return result

    def with_optimizer(loss_fn):
        if mode != "memory":
            return None
        optimizer = torch.optim.Adam(loss_fn.parameters(), lr=0.01)
        loss_fn.attach_optimizer(optimizer)
        return optimizer

    data = list(batches(10, seed=18, dtype=torch.float32))
    whole = make()
    wanted = train(whole, with_optimizer(whole), data)[10:]
    first = make()
    optimizer = with_optimizer(first)
    train(first, optimizer, data[:5])
    saved = {"head": first.state_dict(), "optimizer": optimizer and optimizer.state_dict()}
    torch.save(saved, tmp_path / "checkpoint.pt")
    train(first, optimizer, data[:2])  # whatever happens to the first one afterwards

    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    second = make()
    optimizer = with_optimizer(second)
    second.load_state_dict(saved["head"])
    if optimizer is not None:
        optimizer.load_state_dict(saved["optimizer"])
    got = train(second, optimizer, data[5:])
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert oracles.same(second.state_dict(), whole.state_dict())
    assert {"margin.mean", "margin.std", "mining.t", "quality.unrecognizable", "memory.cursor"} <= set(saved["head"])


def test_all_state_is_in_the_state_dict_even_of_a_nested_quality_estimator():
    """ "All state is in ``state_dict()``": the running prototype of an estimator inside ``SoftmaxQuality`` too."""
    inner = RecognizabilityQuality(DIM)
    inner.update_unrecognizable(torch.randn(3, DIM))
    loss_fn = head(quality=SoftmaxQuality(inner))
    assert any(torch.equal(value, inner.unrecognizable) for value in loss_fn.state_dict().values())


@pytest.mark.parametrize(
    "quality",
    [None, NormQuality(), CenterQuality(), RecognizabilityQuality(DIM), SoftmaxQuality(CenterQuality())],
    ids=lambda q: type(q).__name__,
)
@pytest.mark.parametrize("mode", ["none", "fresh"])
@pytest.mark.parametrize("training", [True, False])
def test_autocast_does_not_change_the_result(mode, quality, training):
    if isinstance(quality, RecognizabilityQuality):
        quality.update_unrecognizable(torch.randn(4, DIM, generator=torch.Generator().manual_seed(0)))
    plain, cast = (head(mode, quality=quality, dtype=torch.float32) for _ in range(2))
    for step, (e, labels) in enumerate(batches(4, seed=19, dtype=torch.float32)):
        for loss_fn in (plain, cast):
            loss_fn.train(training or step < 3)
        leaves = [e.clone().requires_grad_() for _ in range(2)]
        want = plain(leaves[0], labels)
        with torch.autocast("cpu", torch.bfloat16):
            got = cast(leaves[1], labels)
        assert got.dtype == torch.float32
        assert torch.equal(got, want)
        got.backward()
        want.backward()
        assert torch.equal(leaves[0].grad, leaves[1].grad)
        assert oracles.same(plain.state_dict(), cast.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_embeddings_and_a_narrow_memory(dtype):
    """Against the model on the same (exactly representable) numbers, the memory's rounding taken over."""
    loss_fn, model = head(dtype=dtype, reduction="none"), Model("none")
    for e, labels in batches(5, seed=20, dtype=dtype):
        leaf = e.clone().requires_grad_()
        losses = loss_fn(leaf, labels)
        assert losses.dtype == torch.float32
        model.memory.step(e.double(), labels)
        torch.testing.assert_close(
            loss_fn.memory.prototypes.double(), model.memory.rows, rtol=0, atol=torch.finfo(dtype).eps
        )
        model.memory.row = list(loss_fn.memory.prototypes.double())
        targets = torch.tensor([model.memory.slot(label) for label in labels.tolist()])
        wanted = e.double().requires_grad_()
        want = oracles.dense_losses(wanted, model.memory.rows, targets, arc, 8.0, occupied=model.memory.occupied)
        torch.testing.assert_close(losses.double(), want, rtol=1e-5, atol=1e-5)
        (grad,), (want_grad,) = (torch.autograd.grad(loss.sum(), x) for loss, x in ((losses, leaf), (want, wanted)))
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), want_grad, rtol=torch.finfo(dtype).eps, atol=1e-4)


# Class weights


def class_problem(seed=0, batch=16, classes=11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    e = torch.randn(batch, DIM, generator=generator, dtype=torch.float64).to(dtype)
    w = torch.randn(classes, DIM, generator=generator, dtype=torch.float64).to(dtype) * 0.3
    return e, w, torch.randint(0, classes, (batch,), generator=generator)


def heads_agree(ours, e, labels, want_of, tolerance=1e-9):
    """Compare loss and both gradients with ``want_of(embeddings, weights)``."""
    a, b = e.clone().requires_grad_(), e.double().clone().requires_grad_()
    w = ours.weight.detach().double().clone().requires_grad_()
    ours.zero_grad()
    got, want = ours(a, labels), want_of(b, w)
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    upstream = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    got.backward(upstream.to(got.dtype))
    want.backward(upstream)
    torch.testing.assert_close(a.grad.double(), b.grad, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.weight.grad.double(), w.grad, rtol=tolerance, atol=tolerance)


def set_weight(module, w):
    with torch.no_grad():
        module.weight.copy_(w)
    return module


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_margin_softmax_loss_against_explicit_logits(reduction, dtype):
    e, w, labels = class_problem(dtype=dtype)
    labels[3] = -1
    ours = set_weight(MarginSoftmaxLoss(11, DIM, margin=ArcFace(0.4), scale=8.0, reduction=reduction, dtype=dtype), w)

    def want(x, weights):
        losses = oracles.dense_losses(x, oracles.unit(weights), labels, lambda c, norm: oracles.arcface(c, 0.4), 8.0)
        return oracles.reduce(losses, labels, reduction)

    heads_agree(ours, e, labels, want, 1e-9 if dtype == torch.float64 else 3e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("d", [0.9, 0.2])
def test_d_softmax_loss_against_its_formula(reduction, d):
    e, w, labels = class_problem(1)
    labels[0] = -1
    ours = set_weight(DSoftmaxLoss(11, DIM, d=d, scale=9.0, reduction=reduction, dtype=torch.float64), w)

    def want(x, weights):
        cos = oracles.unit(x) @ oracles.unit(weights).T
        is_target = functional.one_hot(labels.clamp(min=0), 11).bool()
        pull = torch.log1p((9.0 * (d - cos[is_target])).exp())
        push = torch.log1p((9.0 * cos).exp().masked_fill(is_target, 0).sum(dim=1))
        return oracles.reduce(torch.where(labels >= 0, pull + push, 0), labels, reduction)

    heads_agree(ours, e, labels, want)


@pytest.mark.parametrize("degrees", [28.6, 5.0, 70.0])
@pytest.mark.parametrize("scale", [64.0, 4.0])
def test_arcface_equals_pytorch_metric_learning(degrees, scale):
    e, w, labels = class_problem(2)
    theirs = peer.ArcFaceLoss(11, DIM, margin=degrees, scale=scale)
    ours = set_weight(
        MarginSoftmaxLoss(11, DIM, margin=ArcFace(math.radians(degrees)), scale=scale, dtype=torch.float64), w
    )
    against_peer(ours, theirs, e, w, labels)


@pytest.mark.parametrize("margin", [0.35, 0.1])
def test_cosface_equals_pytorch_metric_learning(margin):
    e, w, labels = class_problem(3)
    theirs = peer.CosFaceLoss(11, DIM, margin=margin, scale=64)
    ours = set_weight(MarginSoftmaxLoss(11, DIM, margin=CosFace(margin), scale=64, dtype=torch.float64), w)
    against_peer(ours, theirs, e, w, labels)


def against_peer(ours, theirs, e, w, labels):
    theirs.W = nn.Parameter(w.T.clone())
    a, b = e.clone().requires_grad_(), e.clone().requires_grad_()
    got, want = ours(a, labels), theirs(b, labels)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    got.backward()
    want.backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(ours.weight.grad, theirs.W.grad.T, rtol=1e-7, atol=1e-9)


def test_class_weights_and_defaults():
    module = MarginSoftmaxLoss(500, 64)
    assert module.weight.shape == (500, 64)
    assert (module.margin, module.scale, module.mining, module.reduction) == (ArcFace(0.5), 64.0, None, "mean")
    assert float(module.weight.detach().std()) == pytest.approx(0.01, rel=0.05)
    assert set(module.state_dict()) == {"weight"}
    assert repr(module) == (
        "MarginSoftmaxLoss(num_classes=500, embedding_dim=64, margin=ArcFace(m=0.5, straight_through=False), scale=64)"
    )
    before = module.weight.detach().clone()
    module.reset_parameters()
    assert not torch.equal(before, module.weight)
    pull = DSoftmaxLoss(3, 4)
    assert (pull.margin, pull.scale) == (DSoftmax(0.9), 30.0)


def test_margin_softmax_loss_stats():
    e, w, labels = class_problem(4)
    ours = set_weight(MarginSoftmaxLoss(11, DIM, margin=CosFace(0.2), scale=8.0, dtype=torch.float64), w)
    loss, stats = ours(e, labels, return_stats=True)
    logits = oracles.dense_logits(e, oracles.unit(w), labels, lambda c, norm: c - 0.2, 8.0)
    probability = logits.softmax(dim=1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(stats.target_probability, probability)
    torch.testing.assert_close(loss.detach(), -probability.log().mean())


def test_head_defaults_and_repr():
    loss_fn = PrototypeMemoryLoss(4, 8)
    assert (loss_fn.margin, loss_fn.scale, loss_fn.mining, loss_fn.quality) == (ArcFace(0.5), 64.0, None, None)
    assert (loss_fn.prototype_gradient, loss_fn.reduction) == ("none", "mean")
    assert (loss_fn.memory.refresh_ratio, loss_fn.memory.policy) == (0.5, "fifo")
    assert list(loss_fn.parameters()) == []
    assert "margin=ArcFace(m=0.5" in repr(loss_fn)
    assert "0/8 identities" in repr(loss_fn)
    assert "(margin): AdaFace(m=0.4" in repr(PrototypeMemoryLoss(4, 8, margin=AdaFace()))
    assert [name for name, _ in PrototypeMemoryLoss(4, 8, prototype_gradient="memory").named_parameters()] == [
        "memory.prototypes"
    ]


E, Y = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)


def small(**options):
    return PrototypeMemoryLoss(4, 5, **options)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: PrototypeMemoryLoss(0, 5), ValueError, "embedding_dim must be at least 1, got 0"),
        (lambda: PrototypeMemoryLoss(4, 0), ValueError, "capacity must be at least 1, got 0"),
        (lambda: PrototypeMemoryLoss(4, 5.0), TypeError, "capacity must be an int, got float"),
        (lambda: small(margin=0.5), TypeError, r"margin must be a callable .* or a Margin, got float"),
        (lambda: small(margin=ArcFace), TypeError, "margin must be an instance, got the class ArcFace"),
        (lambda: small(scale=0), ValueError, r"scale must be in \(0, inf\), got 0"),
        (lambda: small(scale="64"), TypeError, "scale must be a number, got str"),
        (lambda: small(scale=INF), ValueError, "scale must be"),
        (lambda: small(mining=ArcFace()), TypeError, "mining must be a rule of protomem_kernels.mining or None, got"),
        (lambda: small(mining=CurricularFace), TypeError, "mining must be an instance, got the class CurricularFace"),
        (lambda: small(quality=1.0), TypeError, "quality must be a quality estimator or None, got 1.0"),
        (lambda: small(quality=NormQuality), TypeError, "quality must be a quality estimator or None, got <class"),
        (lambda: small(refresh_ratio=2), ValueError, r"refresh_ratio must be in \[0, 1\], got 2"),
        (lambda: small(policy="random"), ValueError, "policy must be one of 'fifo', 'lru', got 'random'"),
        (
            lambda: small(prototype_gradient="all"),
            ValueError,
            "prototype_gradient must be one of 'none', 'fresh', 'memory', got 'all'",
        ),
        (lambda: small(reduction="max"), ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'max'"),
        (lambda: small(dtype=torch.int32), TypeError, "dtype must be a floating point type, got torch.int32"),
        (lambda: small()(E[:, :3], Y), ValueError, r"embeddings must have shape \(B, 4\) .* got \(3, 3\)"),
        (lambda: small()(E, Y[:2]), ValueError, r"labels must have shape \(3,\) to match embeddings \(3, 4\), got"),
        (lambda: small()(E, Y.float()), TypeError, "labels must be int64 or int32, got torch.float32"),
        (lambda: small()(E.long(), Y), TypeError, "embeddings must be floating point, got torch.int64"),
        (lambda: small()(E, Y, torch.ones(3, 1)), ValueError, r"weights must have shape \(B,\), got \(3, 1\)"),
        (lambda: small()(E, Y, -torch.ones(3)), ValueError, "weights must be finite and not negative, got -1.0"),
        (lambda: small().eval()(E[:, :3], Y), ValueError, r"(embeddings|prototypes) must have shape"),
        (lambda: small().eval()(E, Y[:2]), ValueError, r"labels must have shape \(3,\)"),
        (lambda: small().eval()(E, Y[:1]), ValueError, r"labels must have shape \(3,\)"),
        (lambda: small().eval()(E.long(), Y), TypeError, "embeddings must be floating point, got torch.int64"),
        (lambda: small().eval()(E[0], Y), ValueError, r"embeddings must have shape \(B, (D|4)\)"),
        (lambda: small().eval()(E, Y.float()), TypeError, "labels must be int64 or int32, got torch.float32"),
        (lambda: small().eval()([1.0], Y), TypeError, "embeddings must be a tensor"),
        (lambda: MarginSoftmaxLoss(0, 4), ValueError, "num_classes must be at least 1, got 0"),
        (lambda: MarginSoftmaxLoss(4, 0), ValueError, "embedding_dim must be at least 1, got 0"),
        (lambda: MarginSoftmaxLoss(4, 4, margin=3), TypeError, "margin must be a callable"),
        (lambda: MarginSoftmaxLoss(4, 4, reduction="avg"), ValueError, "reduction must be one of"),
        (lambda: MarginSoftmaxLoss(4, 4)(E, Y + 4), ValueError, "must be below 4, the number of prototypes, got 4"),
        (lambda: MarginSoftmaxLoss(4, 4)(E, Y[:2]), ValueError, r"targets must have shape \(3,\)"),
        (lambda: DSoftmaxLoss(4, 4, d=2), ValueError, r"d must be in \[-1, 1\], got 2"),
    ],
)
def test_errors_name_the_argument(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("mode", MODES)
def test_more_identities_than_slots_is_refused_and_changes_nothing(mode):
    loss_fn = head(mode, capacity=3, margin=AdaFace(), mining=CurricularFace())
    for e, labels in batches(2, per_batch=3):
        loss_fn(e, labels)
    before = oracles.snapshot(loss_fn)
    e, labels = next(batches(1, per_batch=4))
    with pytest.raises(ValueError, match="at least 4, the number of identities in labels, got 3"):
        loss_fn(e, labels)
    assert oracles.same(before, loss_fn.state_dict())


@pytest.mark.parametrize("bad", [(E, Y[:2]), (E[:, :2], Y), (E, Y, -torch.ones(3)), (E, Y.float())])
def test_a_refused_call_changes_nothing(bad):
    loss_fn = small(margin=AdaFace(), mining=CurricularFace())
    loss_fn(torch.randn(3, 4), torch.arange(3))
    before = oracles.snapshot(loss_fn)
    with pytest.raises((TypeError, ValueError)):
        loss_fn(*bad)
    assert oracles.same(before, loss_fn.state_dict())


# Compiling takes tens of seconds a case: two cases, one per mode that has a graph of its own.
@pytest.mark.no_cover
@pytest.mark.parametrize("mode", ["none", "fresh"])
def test_compiled_equals_eager(mode):
    eager, compiled_head = (head(mode, dtype=torch.float32) for _ in range(2))
    torch._dynamo.reset()
    compiled = torch.compile(compiled_head, fullgraph=True)
    for e, labels in batches(4, seed=21, dtype=torch.float32):
        assert (labels < 0).any()
        leaves = [e.clone().requires_grad_() for _ in range(2)]
        want, got = eager(leaves[0], labels), compiled(leaves[1], labels)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        want.backward()
        got.backward()
        torch.testing.assert_close(leaves[1].grad, leaves[0].grad, rtol=1e-4, atol=1e-6)
        assert torch.equal(eager.memory.identities, compiled_head.memory.identities)
        torch.testing.assert_close(eager.memory.prototypes, compiled_head.memory.prototypes, rtol=0, atol=1e-6)


def test_a_copy_of_a_learnable_memory_asks_for_its_own_optimizer():
    head = PrototypeMemoryLoss(3, 4, prototype_gradient="memory")
    head.attach_optimizer(torch.optim.SGD(head.parameters(), lr=0.1))
    embeddings, labels = torch.randn(2, 3), torch.tensor([1, 2])
    head(embeddings, labels)
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(PrototypeMemoryLoss(3, 4)))):
        twin.load_state_dict(head.state_dict())
        if twin.prototype_gradient == "memory":
            with pytest.raises(RuntimeError, match="attach_optimizer"):
                twin(embeddings, labels)
            twin.attach_optimizer(torch.optim.SGD(twin.parameters(), lr=0.1))
        assert torch.equal(twin(embeddings, labels), head(embeddings, labels))


@pytest.mark.parametrize("mode", ["none", "fresh"])
def test_float16_gradients_stay_in_range(mode: str) -> None:
    """At cosines of -1, where in "fresh" mode those of the loss and of the aggregation add up."""
    directions = torch.eye(4) - 0.1
    loss_fn = PrototypeMemoryLoss(4, 16, margin=SphereFace(), scale=1024.0, prototype_gradient=mode)
    loss_fn(directions.half(), torch.arange(4))
    embeddings = (-1e-4 * directions).half().requires_grad_()
    loss_fn(embeddings, torch.arange(4)).backward()
    assert torch.isfinite(embeddings.grad).all()
    assert embeddings.grad.abs().max() == 65504


@each_mode
def test_a_grad_scaler_sees_an_overflow(mode):
    loss_fn = PrototypeMemoryLoss(4, 16, margin=SphereFace(), scale=64.0, prototype_gradient=mode)
    if mode == "memory":
        loss_fn.attach_optimizer(torch.optim.SGD(loss_fn.parameters(), lr=0.0))
    directions = torch.eye(4) - 0.1
    loss_fn(directions.half(), torch.arange(4))
    embeddings = (-1e-3 * directions).half().requires_grad_()
    (65536 * loss_fn(embeddings, torch.arange(4))).backward()
    assert torch.isinf(embeddings.grad).any()


@pytest.mark.parametrize(
    ("prototype_gradient", "names"), [("none", []), ("fresh", []), ("memory", ["memory.prototypes"])]
)
def test_only_learnable_prototypes_are_for_an_optimizer(prototype_gradient, names):
    """Nothing else in a head over a memory has a learning rate."""
    loss_fn = PrototypeMemoryLoss(4, 8, prototype_gradient=prototype_gradient)
    assert [name for name, _ in loss_fn.named_parameters()] == names
