"""Every mining rule as a whole loss, against explicit (B, M) logits: value, gradients to embeddings and prototypes."""

from __future__ import annotations

import math
from datetime import timedelta
from fractions import Fraction

import pytest
import torch
import torch.distributed as dist
from torch import nn

from protomem_kernels import (
    ArcFace,
    CombinedMargin,
    CosFace,
    CurricularFace,
    DSoftmax,
    HardestNegatives,
    HardSamples,
    MVSoftmax,
    NoisyNegativeFilter,
    margin_softmax_logits,
    margin_softmax_loss,
)
from tests import oracles

SCALE = 8.0


class Problem:
    """Embeddings, unit prototypes, targets (some ignored) and occupied slots, with cosines spread over [-1, 1]."""

    def __init__(self, seed=0, batch=13, slots=29, dim=4, dtype=torch.float64, ignored=(2, 9), sparse=True):
        generator = torch.Generator().manual_seed(seed)
        self.embeddings = torch.randn(batch, dim, generator=generator, dtype=torch.float64).mul(3).to(dtype)
        self.prototypes = oracles.unit(torch.randn(slots, dim, generator=generator, dtype=torch.float64)).to(dtype)
        self.targets = torch.randint(0, slots, (batch,), generator=generator)
        # Half of the samples lie near their target, so that easy and hard negatives both occur.
        near = self.prototypes[self.targets] * 3 + 0.4 * self.embeddings
        self.embeddings = torch.where(torch.arange(batch)[:, None] % 2 == 0, near, self.embeddings)
        self.targets[list(ignored)] = -1
        self.occupied = torch.rand(slots, generator=generator) < 0.8 if sparse else torch.ones(slots, dtype=torch.bool)
        self.occupied[self.targets[self.targets >= 0]] = True
        self.leaves = (self.embeddings, self.prototypes)

    def ours(self, mining, margin=ArcFace(0.5), reduction="none", **kwargs):  # noqa: B008
        e, w = (leaf.clone().requires_grad_() for leaf in self.leaves)
        losses = margin_softmax_loss(
            e,
            w,
            self.targets,
            margin=margin,
            scale=SCALE,
            mining=mining,
            occupied=self.occupied,
            reduction=reduction,
            **kwargs,
        )
        return losses, e, w

    def expected(self, negatives, formula):
        e, w = (leaf.double().clone().requires_grad_() for leaf in self.leaves)
        losses = oracles.dense_losses(e, w, self.targets, formula, SCALE, negatives=negatives, occupied=self.occupied)
        return losses, e, w


def assert_same_loss(ours, expected, tolerance=1e-10):
    """Compare losses and, for one random upstream gradient, both gradients."""
    (got, e, w), (want, e_want, w_want) = ours, expected
    upstream = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(11))
    grads = torch.autograd.grad(got, (e, w), upstream.to(got.dtype))
    wanted = torch.autograd.grad(want, (e_want, w_want), upstream)
    for a, b in zip((got, *grads), (want, *wanted), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * 10)


def arc(c, norm):
    return oracles.arcface(c, 0.5)


def unguarded(c, m=0.5):
    return c * math.cos(m) - (1 - c * c).sqrt() * math.sin(m)


def mv(t, kind):
    def form(cos, c, modified):
        hard = (t + 1) * cos + t if kind == "adaptive" else cos + t
        return torch.where(cos > modified[:, None], hard, cos)

    return form


def curricular(t, m=0.5):
    return lambda cos, c, modified: torch.where(cos > unguarded(c, m)[:, None], cos * (t + cos), cos)


def noisy(threshold):
    return lambda cos, c, modified: torch.where(cos > threshold, 0.0, cos)


def top(k, problem):
    """Return a form that leaves only each sample's k largest occupied negatives, found by sorting all of them."""

    def form(cos, c, modified):
        values = cos.detach()
        kept = torch.full_like(values, float("-inf"))
        for i, target in enumerate(problem.targets.tolist()):
            others = [j for j in range(cos.shape[1]) if j != target and bool(problem.occupied[j])]
            for j in sorted(others, key=lambda j: (-float(values[i, j]), j))[:k]:
                kept[i, j] = 0
        return cos + kept

    return form


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", ["adaptive", "fixed"])
@pytest.mark.parametrize("t", [0.0, 0.2, 1.0])
def test_mv_softmax(t, kind, seed):
    problem = Problem(seed)
    expected = problem.expected(mv(t, kind), arc)
    assert_same_loss(problem.ours(MVSoftmax(t, kind)), expected)


def test_mv_softmax_takes_the_modified_cosine_as_threshold_whatever_the_margin():
    problem = Problem(3)
    expected = problem.expected(mv(0.3, "adaptive"), lambda c, norm: c - 0.35)
    assert_same_loss(problem.ours(MVSoftmax(0.3), CosFace(0.35)), expected)


def test_mv_softmax_float32():
    problem = Problem(4, dtype=torch.float32)
    assert_same_loss(problem.ours(MVSoftmax()), problem.expected(mv(0.2, "adaptive"), arc), 2e-5)


def test_some_negatives_are_hard_and_some_are_not():
    problem = Problem(0)
    cosines = oracles.unit(problem.embeddings) @ problem.prototypes.T
    c = cosines.gather(1, problem.targets.clamp(min=0)[:, None])
    hard = cosines > oracles.arcface(c, 0.5)
    assert 0.1 < float(hard.double().mean()) < 0.9


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("t", [0.0, 0.3, -0.4])
def test_curricular_face_in_eval_uses_the_saved_t(seed, t):
    problem = Problem(seed)
    rule = CurricularFace().eval()
    rule.t.fill_(t)
    assert_same_loss(problem.ours(rule), problem.expected(curricular(float(rule.t)), arc))
    assert float(rule.t) == pytest.approx(t)


def test_curricular_face_updates_t_before_use_from_the_samples_that_count():
    rule, t = CurricularFace(momentum=0.25), 0.0
    for seed in range(4):
        problem = Problem(seed)
        cosines = oracles.unit(problem.embeddings) @ problem.prototypes.T
        of = [float(cosines[i, j]) for i, j in enumerate(problem.targets.tolist()) if j >= 0]
        t = 0.25 * sum(of) / len(of) + 0.75 * t
        losses, e, w = problem.ours(rule)
        assert float(rule.t) == pytest.approx(t, abs=1e-7)
        assert_same_loss((losses, e, w), problem.expected(curricular(float(rule.t)), arc))


def test_curricular_face_defaults():
    rule = CurricularFace()
    assert rule.momentum == 0.01
    assert {name: float(t) for name, t in rule.state_dict().items()} == {"t": 0.0}
    assert repr(rule) == "CurricularFace(momentum=0.01)"


def test_curricular_face_loads_what_it_makes_of_a_bfloat16_memory():
    """Whose rows are a little longer than 1, and so are cosines to them."""
    turns = torch.linspace(0, 2 * math.pi, 1000, dtype=torch.float64)
    rows = torch.stack([turns.cos(), turns.sin()], dim=1).bfloat16()
    longest = rows[rows.double().norm(dim=1).argmax()][None]
    rule = CurricularFace(momentum=1.0)
    margin_softmax_loss(longest.float(), longest, torch.tensor([0]), mining=rule)
    assert float(rule.t) > 1.001
    loaded = CurricularFace()
    loaded.load_state_dict(rule.state_dict())
    assert torch.equal(loaded.t, rule.t)


@pytest.mark.parametrize("ignored", [range(13), range(0)], ids=["all ignored", "empty batch"])
def test_curricular_face_t_stays_without_samples(ignored):
    problem = Problem(0, batch=len(ignored), ignored=ignored)
    rule = CurricularFace(0.5)
    rule.t.fill_(0.25)
    losses, _, _ = problem.ours(rule, reduction="mean")
    assert losses.item() == 0
    assert float(rule.t) == 0.25


def test_curricular_face_t_is_not_touched_by_a_sample_that_is_not_finite():
    rule, without = CurricularFace(0.5), CurricularFace(0.5)
    problem = Problem(0)
    problem.embeddings[0] = math.nan
    losses, _, _ = problem.ours(rule)
    problem.targets[0] = -1
    others, _, _ = problem.ours(without)
    assert oracles.same(rule.state_dict(), without.state_dict())
    assert torch.isnan(losses[0])
    assert torch.equal(losses[1:], others[1:])


def test_curricular_face_threshold_has_no_guard():
    """A sample at theta + m > pi: cos(theta + m) turns back up, c - m sin m does not."""
    e = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    angles = torch.tensor([math.pi, 0.9 * math.pi, 0.3 * math.pi], dtype=torch.float64)
    w = torch.stack([angles.cos(), angles.sin()], dim=1)  # the target lies opposite; one negative between the two taus
    assert -1 - 0.5 * math.sin(0.5) < float(w[1, 0]) < math.cos(math.pi + 0.5)
    rule = CurricularFace().eval()
    rule.t.fill_(0.2)
    got = margin_softmax_loss(e, w, torch.tensor([0]), scale=4.0, mining=rule)
    x1, x2, t = float(w[1, 0]), float(w[2, 0]), float(rule.t)
    z = 4 * (-1 - 0.5 * math.sin(0.5))
    want = math.log(math.exp(z) + math.exp(4 * x1) + math.exp(4 * x2 * (t + x2))) - z
    assert got.item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("margin", [ArcFace(0.5, straight_through=True), CombinedMargin(1.0, 0.5, 0.0)], ids=repr)
def test_curricular_face_threshold_has_no_guard_with_other_forms_of_arcface(margin):
    """CombinedMargin(1, m, 0) is ArcFace(m): the contract's threshold cos(theta + m) is the same, unguarded."""
    angles = torch.tensor([math.pi - 1e-3, 0.9 * math.pi, 0.3 * math.pi], dtype=torch.float64)
    w = torch.stack([angles.cos(), angles.sin()], dim=1)
    e = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    rule = CurricularFace().eval()
    rule.t.fill_(0.2)
    _, stats = margin_softmax_loss(e, w, torch.tensor([0]), margin=margin, scale=4.0, mining=rule, return_stats=True)
    x1, x2, t = float(w[1, 0]), float(w[2, 0]), float(rule.t)
    want = math.log(math.exp(4 * x1) + math.exp(4 * x2 * (t + x2)))
    assert float(stats.negative_logsumexp[0]) == pytest.approx(want, rel=1e-12)


def test_curricular_face_with_a_cosine_margin_takes_it_as_threshold():
    problem = Problem(5)
    rule = CurricularFace().eval()
    rule.t.fill_(0.1)

    def form(cos, c, modified):
        t = float(rule.t)
        return torch.where(cos > (c - 0.3)[:, None], cos * (t + cos), cos)

    assert_same_loss(problem.ours(rule, CosFace(0.3)), problem.expected(form, lambda c, norm: c - 0.3))


def test_curricular_face_state_dict_continues_bit_for_bit():
    whole, first, second = CurricularFace(0.3), CurricularFace(0.3), CurricularFace(0.3)
    wanted = [Problem(seed).ours(whole, reduction="mean")[0] for seed in range(6)]
    for seed in range(3):
        Problem(seed).ours(first)
    second.load_state_dict(first.state_dict())
    for seed in range(3, 6):
        assert torch.equal(Problem(seed).ours(second, reduction="mean")[0], wanted[seed])


def _two_ranks(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2, timeout=timedelta(seconds=90)
    )
    alone, rule = CurricularFace(0.5), CurricularFace(0.5, process_group=dist.group.WORLD)
    if rank == 0:  # a collective of one rank would wait for the other in vain, or meet the wrong one
        Problem(0, batch=13, ignored=(2,)).ours(alone)
    for seed in range(2):
        # Ragged: rank 1 holds fewer samples, and none that counts in the second step.
        problem = Problem(10 * rank + seed, batch=13 - 4 * rank, ignored=range(9) if rank and seed else (2,))
        problem.ours(rule)
    torch.save((rule.t, alone.t), f"{folder}/t{rank}.pt")
    dist.destroy_process_group()


def test_curricular_face_averages_over_the_ranks_of_its_group(tmp_path):
    torch.multiprocessing.spawn(_two_ranks, args=(str(tmp_path),), nprocs=2)
    t = first_of_rank_0 = 0.0
    for seed in range(2):
        of = []
        for rank in range(2):
            problem = Problem(10 * rank + seed, batch=13 - 4 * rank, ignored=range(9) if rank and seed else (2,))
            cosines = oracles.unit(problem.embeddings) @ problem.prototypes.T
            of += [float(cosines[i, j]) for i, j in enumerate(problem.targets.tolist()) if j >= 0]
            if rank == seed == 0:
                first_of_rank_0 = 0.5 * sum(of) / len(of)
        assert len(of) == (20 if seed == 0 else 12)
        t = 0.5 * sum(of) / len(of) + 0.5 * t
    for rank in range(2):
        shared, alone = torch.load(tmp_path / f"t{rank}.pt")
        assert float(shared) == pytest.approx(t, abs=1e-6)
        assert float(alone) == pytest.approx(first_of_rank_0 if rank == 0 else 0, abs=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("threshold", [0.4, 0.0, -0.3, 1.0, -1.0])
def test_noisy_negative_filter(threshold, seed):
    problem = Problem(seed)
    assert_same_loss(problem.ours(NoisyNegativeFilter(threshold)), problem.expected(noisy(threshold), arc))


def test_noisy_negatives_pass_no_gradient():
    e, w = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.96, 0.28], [-0.6, 0.8]], requires_grad=True)
    loss = margin_softmax_loss(e, w, torch.tensor([0]), scale=4.0, mining=NoisyNegativeFilter(0.5))
    (grad,) = torch.autograd.grad(loss, w)
    assert torch.equal(grad[1], torch.zeros(2))
    assert float(grad[2].abs().sum()) > 0


@pytest.mark.parametrize("k", [1, 3, 64])
@pytest.mark.parametrize("seed", [0, 1])
def test_hardest_negatives(k, seed):
    problem = Problem(seed)
    assert_same_loss(problem.ours(HardestNegatives(k)), problem.expected(top(k, problem), arc))


def test_hardest_negatives_touch_only_the_chosen_rows():
    problem = Problem(0, batch=2, ignored=())
    losses, _, w = problem.ours(HardestNegatives(2), reduction="sum")
    (grad,) = torch.autograd.grad(losses, w)
    touched = {int(j) for j in (grad != 0).any(dim=1).nonzero()}
    cosines = oracles.unit(problem.embeddings) @ problem.prototypes.T
    wanted = {int(j) for j in problem.targets}
    kept = top(2, problem)(cosines, None, None)
    wanted |= {int(j) for j in torch.isfinite(kept).any(dim=0).nonzero()}
    assert touched == wanted


@pytest.mark.parametrize("rule", [MVSoftmax(), NoisyNegativeFilter(), HardestNegatives(3), CurricularFace().eval()])
def test_logits_and_loss_agree_with_the_explicit_logits(rule):
    problem = Problem(6, ignored=())
    forms = {
        MVSoftmax: mv(0.2, "adaptive"),
        NoisyNegativeFilter: noisy(0.4),
        HardestNegatives: top(3, problem),
        CurricularFace: curricular(0.0),
    }
    got = margin_softmax_logits(*problem.leaves, problem.targets, scale=SCALE, mining=rule, occupied=problem.occupied)
    want = oracles.dense_logits(
        *problem.leaves, problem.targets, arc, SCALE, negatives=forms[type(rule)], occupied=problem.occupied
    )
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    losses, _, _ = problem.ours(rule)
    torch.testing.assert_close(losses, nn.functional.cross_entropy(want, problem.targets, reduction="none"))


@pytest.mark.parametrize("rule", [MVSoftmax(0.3), NoisyNegativeFilter(0.2), HardestNegatives(4)], ids=repr)
def test_mining_with_d_softmax(rule):
    """softplus(s (d - c)) + softplus(n) over the reshaped negatives; the threshold of MVSoftmax is c itself."""
    problem = Problem(7)
    forms = {MVSoftmax: mv(0.3, "adaptive"), NoisyNegativeFilter: noisy(0.2), HardestNegatives: top(4, problem)}
    e, w = (leaf.clone().requires_grad_() for leaf in problem.leaves)
    logits = oracles.dense_logits(
        e,
        w,
        problem.targets,
        lambda c, norm: c,
        SCALE,
        negatives=forms[type(rule)],
        occupied=problem.occupied,
    )
    is_target = nn.functional.one_hot(problem.targets.clamp(min=0), logits.shape[1]).bool()
    c = (oracles.unit(e) @ w.T).gather(1, problem.targets.clamp(min=0)[:, None])[:, 0]
    n = logits.masked_fill(is_target, float("-inf")).logsumexp(dim=1)
    want = nn.functional.softplus(SCALE * (0.8 - c)) + nn.functional.softplus(n)
    want = torch.where(problem.targets >= 0, want, 0)
    assert_same_loss(problem.ours(rule, DSoftmax(0.8)), (want, e, w))


# HardSamples


def rounded_up(keep: str, count: int) -> int:
    share = Fraction(keep) * count
    return -(-share.numerator // share.denominator)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("keep", ["0.9", "0.5", "0.1", "1.0", "0.01"])
def test_hard_samples(keep, reduction):
    problem = Problem(0)
    plain, e, w = problem.expected(None, arc)
    counting = [i for i, target in enumerate(problem.targets.tolist()) if target >= 0]
    number = rounded_up(keep, len(counting))
    kept = sorted(counting, key=lambda i: -plain[i].item())[:number]
    mask = torch.zeros(len(plain), dtype=torch.float64)
    mask[kept] = 1
    want = {"none": plain * mask, "sum": (plain * mask).sum(), "mean": (plain * mask).sum() / number}[reduction]
    assert_same_loss(problem.ours(HardSamples(float(keep)), reduction=reduction), (want, e, w))


@pytest.mark.parametrize(
    ("keep", "count"), [("0.55", 100), ("0.9", 10), ("0.9", 7), ("0.3", 10), ("0.07", 100), ("0.7", 1000)]
)
def test_hard_samples_keep_whole_samples_rounded_up(keep, count):
    losses = torch.rand(count, generator=torch.Generator().manual_seed(0))
    kept = HardSamples(float(keep)).kept(losses, torch.ones(count, dtype=torch.bool))
    assert int(kept.sum()) == rounded_up(keep, count)
    assert sorted(losses[kept].tolist()) == sorted(losses.tolist())[count - rounded_up(keep, count) :]


@pytest.mark.parametrize("keep", [1e-3, 1e-8, 1e-10])
def test_hard_samples_keep_at_least_one_of_any_batch(keep):
    kept = HardSamples(keep).kept(torch.tensor([1.0, 2.0, 3.0]), torch.ones(3, dtype=torch.bool))
    assert kept.tolist() == [False, False, True]


def test_hard_samples_ties_go_to_the_earlier():
    losses = torch.tensor([1.0, 2.0, 2.0, 2.0, 5.0])
    counts = torch.tensor([True, False, True, True, True])
    assert HardSamples(0.5).kept(losses, counts).tolist() == [False, False, True, False, True]


def test_hard_samples_never_keep_what_is_ignored():
    kept = HardSamples(1.0).kept(torch.tensor([-1.0, 0.0, 9.0]), torch.tensor([True, True, False]))
    assert kept.tolist() == [True, True, False]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_hard_samples_keep_a_nan_visible(reduction):
    problem = Problem(0)
    problem.embeddings[12] = math.nan
    losses, _, _ = problem.ours(HardSamples(0.2), reduction=reduction)
    assert torch.isnan(losses[12] if reduction == "none" else losses)


def test_hard_samples_of_nothing():
    problem = Problem(0, ignored=range(13))
    losses, e, _ = problem.ours(HardSamples(0.5), reduction="mean")
    (grad,) = torch.autograd.grad(losses, e)
    assert losses.item() == 0
    assert torch.equal(grad, torch.zeros_like(grad))


def test_defaults_are_those_of_the_contract():
    assert MVSoftmax() == MVSoftmax(0.2, "adaptive")
    assert HardestNegatives() == HardestNegatives(64)
    assert NoisyNegativeFilter() == NoisyNegativeFilter(0.4)
    assert HardSamples() == HardSamples(0.9)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: MVSoftmax(-0.1), ValueError, r"t must be in \[0, inf\), got -0.1"),
        (lambda: MVSoftmax("0.2"), TypeError, "t must be a number, got str"),
        (lambda: MVSoftmax(kind="soft"), ValueError, "kind must be one of 'adaptive', 'fixed', got 'soft'"),
        (lambda: CurricularFace(0.0), ValueError, r"momentum must be in \(0, 1\], got 0"),
        (lambda: CurricularFace(2), ValueError, "momentum must be"),
        (lambda: NoisyNegativeFilter(1.5), ValueError, r"threshold must be in \[-1, 1\], got 1.5"),
        (lambda: HardestNegatives(0), ValueError, "k must be at least 1, got 0"),
        (lambda: HardestNegatives(2.0), TypeError, "k must be an int, got float"),
        (lambda: HardestNegatives(True), TypeError, "k must be an int, got bool"),
        (lambda: HardSamples(0.0), ValueError, "keep must be"),
        (lambda: HardSamples(1.1), ValueError, r"keep must be in \(0, 1\], got 1.1"),
        (lambda: HardSamples(math.nan), ValueError, "keep must be"),
        (lambda: Problem().ours(0.5), TypeError, "mining must be a rule of protomem_kernels.mining or None, got float"),
        (lambda: Problem().ours(MVSoftmax), TypeError, "mining must be an instance, got the class MVSoftmax"),
        (lambda: Problem().ours(HardSamples), TypeError, "mining must be .*HardSamples|mining must be .*type"),
    ],
)
def test_errors_name_the_argument(make, error, words):
    with pytest.raises(error, match=words):
        make()
