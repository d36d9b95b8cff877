"""Every margin against its formula, written anew in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protomem_kernels import (
    AdaFace,
    ArcFace,
    CombinedMargin,
    CosFace,
    DSoftmax,
    ElasticFace,
    LabelMargins,
    MagFace,
    MarginSoftmaxLoss,
    PrototypeMemoryLoss,
    SphereFace,
    margin_softmax_logits,
    margin_softmax_loss,
)
from tests import oracles

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 3e-6}, torch.float64: {"rtol": 1e-12, "atol": 1e-12}}


def cosines(dtype=torch.float64, n=201):
    return torch.linspace(-1, 1, n, dtype=torch.float64).to(dtype)


def norms_like(c):
    return torch.linspace(5.0, 150.0, c.shape[0], dtype=c.dtype)


def frozen_adaface(**kwargs):
    return AdaFace(**kwargs).eval()


def combined(c, m1, m2, m3):
    """Equation 4 of ArcFace; past pi a line of slope 1 in the cosine that takes over at -1."""
    angle = m1 * c.acos() + m2
    return torch.where(angle <= math.pi, angle.cos(), c - math.cos((math.pi - m2) / m1) - 1) - m3


FORMULAS = [
    (lambda: ArcFace(), lambda c, n: oracles.arcface(c, 0.5)),
    (lambda: ArcFace(0.0), lambda c, n: c),
    (lambda: ArcFace(1.2), lambda c, n: oracles.arcface(c, 1.2)),
    (lambda: ArcFace(0.5, straight_through=True), lambda c, n: (c.acos() + 0.5).cos()),
    (lambda: CosFace(), lambda c, n: c - 0.4),
    (lambda: CosFace(0.1), lambda c, n: c - 0.1),
    (lambda: CombinedMargin(), lambda c, n: oracles.arcface(c, 0.5)),
    (lambda: CombinedMargin(1.0, 0.3, 0.2), lambda c, n: oracles.arcface(c, 0.3) - 0.2),
    (lambda: CombinedMargin(1.2, 0.3, 0.1), lambda c, n: combined(c, 1.2, 0.3, 0.1)),
    (lambda: CombinedMargin(2.0, 0.0, 0.0), lambda c, n: combined(c, 2.0, 0.0, 0.0)),
    (lambda: SphereFace(), lambda c, n: oracles.sphereface(c, 1.5)),
    (lambda: SphereFace(3.3), lambda c, n: oracles.sphereface(c, 3.3)),
    (lambda: frozen_adaface(), lambda c, n: oracles.adaface(c, n, 0.4, 0.333, 20.0, 100.0)),
    (lambda: frozen_adaface(m=0.3, h=2.0), lambda c, n: oracles.adaface(c, n, 0.3, 2.0, 20.0, 100.0)),
    (lambda: MagFace(), lambda c, n: oracles.arcface(c, oracles.magface_margin(n, 10, 110, 0.45, 0.8))),
    (lambda: ElasticFace(0.5, 0.0), lambda c, n: oracles.arcface(c, 0.5)),
    (lambda: ElasticFace(0.35, 0.0, kind="cos"), lambda c, n: c - 0.35),
]
each_formula = pytest.mark.parametrize(("make", "formula"), FORMULAS, ids=[repr(make()) for make, _ in FORMULAS])


@DTYPES
@each_formula
def test_value_is_the_formula(make, formula, dtype):
    c = cosines(dtype)
    # At a guard's edge the two branches differ by a finite step: keep rounding from deciding which one is taken.
    c = c[((c.double() + math.cos(0.5)).abs() > 1e-4) & ((c.double() + math.cos(1.2)).abs() > 1e-4)]
    got = make()(c, norms_like(c))
    assert got.dtype == dtype
    want = formula(c.double(), norms_like(c).double())
    # cos and sin of acos lose half the digits near |c| = 1: sin theta = sqrt(2 (1 - c)), so compare at its rounding.
    torch.testing.assert_close(got.double(), want, **TOLERANCE[dtype])


@DTYPES
@each_formula
@pytest.mark.parametrize("c", [1.0, -1.0, 0.0])
def test_gradient_is_finite_and_bounded_at_the_poles(make, formula, dtype, c):
    cosine = torch.tensor([c, math.nextafter(c, 0.0), c], dtype=dtype, requires_grad=True)
    norm = torch.tensor([0.5, 30.0, 1e3], dtype=dtype)
    value = make()(cosine, norm)
    value.sum().backward()
    assert torch.isfinite(value).all()
    # 1 / sin theta with 1 - c^2 held at a few eps, times the slope of the angle: nothing larger may come out.
    assert float(cosine.grad.abs().max()) <= 4 / math.sqrt(torch.finfo(dtype).eps)


@pytest.mark.parametrize(  # a straight-through derivative is not that of the value: it has a test of its own
    ("make", "formula"), [case for case in FORMULAS if not getattr(case[0](), "straight_through", False)]
)
def test_gradcheck_inside(make, formula):
    margin = make()
    generator = torch.Generator().manual_seed(3)
    c = (torch.rand(40, dtype=torch.float64, generator=generator) * 1.9 - 0.95).requires_grad_()
    norm = norms_like(c)
    past = torch.autograd.grad(formula(c, norm).sum(), c)[0]
    got = torch.autograd.grad(margin(c, norm).sum(), c)[0]
    assert torch.autograd.gradcheck(lambda x: margin(x, norm), (c,))
    torch.testing.assert_close(got, past, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("m", [0.1, 0.5, 1.0])
def test_arcface_gradient_of_the_fallback_is_one(m):
    c = torch.linspace(-1, -math.cos(m) - 1e-6, 7, dtype=torch.float64, requires_grad=True)
    value = ArcFace(m)(c, torch.ones(7, dtype=torch.float64))
    torch.testing.assert_close(value, c - m * math.sin(m), rtol=1e-14, atol=1e-14)
    (grad,) = torch.autograd.grad(value.sum(), c)
    assert torch.equal(grad, torch.ones_like(c))


@DTYPES
def test_straight_through_has_slope_one_everywhere(dtype):
    c = cosines(dtype).requires_grad_()
    value = ArcFace(0.7, straight_through=True)(c, torch.ones_like(c))
    torch.testing.assert_close(value.double(), (c.detach().double().acos() + 0.7).cos(), **TOLERANCE[dtype])
    upstream = torch.randn(c.shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    (grad,) = torch.autograd.grad(value, c, upstream)
    assert torch.equal(grad, upstream)


@settings(deadline=None, max_examples=60)
@given(st.floats(0, math.pi / 2), st.floats(0, math.pi), st.floats(0, math.pi))
def test_arcface_falls_with_the_angle(m, first, second):
    theta = torch.tensor(sorted([first, second]), dtype=torch.float64)
    near, far = ArcFace(m)(theta.cos(), torch.ones(2, dtype=torch.float64)).tolist()
    assert near >= far - 1e-12


@settings(deadline=None, max_examples=60)
@given(st.floats(1, 6), st.floats(0, math.pi), st.floats(0, math.pi))
def test_sphereface_falls_with_the_angle(m, first, second):
    theta = torch.tensor(sorted([first, second]), dtype=torch.float64)
    near, far = SphereFace(m)(theta.cos(), torch.ones(2, dtype=torch.float64)).tolist()
    assert near >= far - 1e-7  # acos(cos theta) is off by sqrt(eps) at the poles


@pytest.mark.parametrize("m", [1.0, 1.5, 2.0, 3.7])
def test_sphereface_is_continuous_where_k_changes(m):
    for k in range(1, math.floor(m) + 1):
        at = k * math.pi / m
        if at >= math.pi - 1e-3:
            continue
        c = torch.tensor([at - 1e-9, at + 1e-9], dtype=torch.float64).cos()
        below, above = SphereFace(m)(c, torch.ones(2, dtype=torch.float64))
        assert abs(float(below - above)) < 1e-7
        assert float(below) == pytest.approx(1 - 2 * k, abs=1e-7)


def test_sphereface_with_factor_one_is_the_cosine():
    torch.testing.assert_close(SphereFace(1.0)(cosines()[1:], torch.ones(200)), cosines()[1:], rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(st.floats(0, 1.5), st.floats(0, 1))
def test_combined_with_factor_one_is_arcface_minus_m3(m2, m3):
    c, norm = cosines(), torch.ones(201, dtype=torch.float64)
    torch.testing.assert_close(CombinedMargin(1, m2, m3)(c, norm), ArcFace(m2)(c, norm) - m3, rtol=0, atol=1e-14)


@pytest.mark.parametrize("m1", [1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 6.0])
@pytest.mark.parametrize("m2", [0.0, 0.3, 0.5, 1.0])
def test_combined_keeps_falling_past_the_guard_and_is_bounded(m1, m2):
    theta = torch.linspace(1e-3, math.pi - 1e-3, 4001, dtype=torch.float64)
    value = CombinedMargin(m1, m2, 0.25)(theta.cos(), torch.ones_like(theta))
    assert float(value.min()) >= -3 - 0.25 - 1e-9  # c - (1 + cos of the edge) - m3
    assert float(value.max()) <= 1
    assert float(value.diff().max()) <= 1e-9, "T rises with theta"


# AdaFace


def test_adaface_defaults_and_buffers():
    margin = AdaFace()
    assert (margin.m, margin.h, margin.momentum) == (0.4, 0.333, 0.01)
    assert {name: float(v) for name, v in margin.state_dict().items()} == {"mean": 20.0, "std": 100.0}
    assert repr(margin) == "AdaFace(m=0.4, h=0.333, momentum=0.01)"


@DTYPES
def test_adaface_updates_its_statistics_before_it_uses_them(dtype):
    margin = AdaFace(momentum=0.3)
    mean, std = 20.0, 100.0
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        norm = torch.rand(9, generator=generator, dtype=dtype) * 160  # some are clipped at 100
        c = torch.rand(9, generator=generator, dtype=dtype) * 1.8 - 0.9
        clipped = [min(max(float(v), 1e-3), 100.0) for v in norm]
        batch_mean = sum(clipped) / 9
        batch_std = math.sqrt(sum((v - batch_mean) ** 2 for v in clipped) / 8)
        mean, std = 0.3 * batch_mean + 0.7 * mean, 0.3 * batch_std + 0.7 * std
        got = margin(c, norm)
        want = oracles.adaface(c.double(), norm.double(), 0.4, 0.333, mean, std)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=3e-6)
        assert float(margin.mean) == pytest.approx(mean, rel=1e-6)
        assert float(margin.std) == pytest.approx(std, rel=1e-6)


@pytest.mark.parametrize(
    "norm",
    [[7.0], [], [0.0, 0.0, 0.0], [0.0, 7.0, 0.0], [math.nan, 7.0]],
    ids=["one", "none", "all ignored", "one counts", "one finite"],
)
def test_adaface_statistics_need_two_samples(norm):
    margin = AdaFace()
    before = oracles.snapshot(margin)
    margin(torch.zeros(len(norm)), torch.tensor(norm))
    assert oracles.same(before, margin.state_dict())


def test_adaface_zero_norms_take_no_part():
    with_zeros, without = AdaFace(momentum=0.5), AdaFace(momentum=0.5)
    with_zeros(torch.zeros(5), torch.tensor([0.0, 30.0, 0.0, 50.0, 40.0]))
    without(torch.zeros(3), torch.tensor([30.0, 50.0, 40.0]))
    assert oracles.same(with_zeros.state_dict(), without.state_dict())
    assert float(without.mean) == pytest.approx(30.0)
    assert float(without.std) == pytest.approx(55.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_adaface_statistics_are_not_touched_by_a_sample_that_is_not_finite(bad):
    with_bad, without = AdaFace(momentum=0.5), AdaFace(momentum=0.5)
    with_bad(torch.zeros(4), torch.tensor([30.0, bad, 50.0, 40.0]))
    without(torch.zeros(3), torch.tensor([30.0, 50.0, 40.0]))
    assert oracles.same(with_bad.state_dict(), without.state_dict())


def test_adaface_eval_is_frozen():
    margin = AdaFace().eval()
    before = oracles.snapshot(margin)
    margin(torch.zeros(5), torch.rand(5) * 50)
    assert oracles.same(before, margin.state_dict())


def test_adaface_state_dict_round_trip_continues_bit_for_bit():
    generator = torch.Generator().manual_seed(5)
    batches = [(torch.rand(6, generator=generator), torch.rand(6, generator=generator) * 80) for _ in range(6)]
    whole = AdaFace(momentum=0.2)
    values = [whole(*batch) for batch in batches]
    first = AdaFace(momentum=0.2)
    for batch in batches[:3]:
        first(*batch)
    second = AdaFace(momentum=0.2)
    second.load_state_dict(first.state_dict())
    for batch, want in zip(batches[3:], values[3:], strict=True):
        assert torch.equal(second(*batch), want)


def test_adaface_does_not_differentiate_the_norm():
    c = torch.tensor([0.3, 0.5], requires_grad=True)
    norm = torch.tensor([30.0, 60.0], requires_grad=True)
    (grad,) = torch.autograd.grad(AdaFace()(c, norm).sum(), norm, allow_unused=True)
    assert grad is None


# MagFace


def test_magface_margin_is_linear_in_the_norm_and_clipped():
    margin = MagFace(10.0, 110.0, 0.45, 0.8)
    norm = torch.tensor([0.0, 10.0, 35.0, 60.0, 110.0, 500.0], dtype=torch.float64)
    got = margin(torch.full((6,), 0.2, dtype=torch.float64), norm).acos() - math.acos(0.2)
    want = torch.tensor([0.45, 0.45, 0.5375, 0.625, 0.8, 0.8], dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_magface_differentiates_the_norm():
    margin = MagFace()
    c = torch.tensor([0.3, -0.4, 0.9], dtype=torch.float64, requires_grad=True)
    norm = torch.tensor([20.0, 50.0, 100.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(margin, (c, norm))
    assert torch.autograd.gradcheck(margin.penalty, (norm,))
    (grad,) = torch.autograd.grad(margin(c, norm).sum(), norm)
    want = -(c.acos() + oracles.magface_margin(norm, 10, 110, 0.45, 0.8)).sin() * 0.35 / 100
    torch.testing.assert_close(grad, want)


@DTYPES
def test_magface_penalty(dtype):
    norm = torch.tensor([1.0, 10.0, 42.0, 110.0, 300.0], dtype=dtype)
    want = oracles.magface_penalty(norm.double(), 10, 110, 35.0)
    torch.testing.assert_close(MagFace().penalty(norm).double(), want, **TOLERANCE[dtype])
    # The regulariser rewards a longer embedding up to u_a.
    assert (MagFace().penalty(torch.linspace(10, 110, 20)).diff() < 0).all()


# ElasticFace


@pytest.mark.parametrize("kind", ["arc", "cos"])
def test_elasticface_draws_are_reproducible_and_normal(kind):
    n = 20_000
    c, norm = torch.full((n,), 0.1, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
    first, again = (ElasticFace(0.5, 0.05, kind, torch.Generator().manual_seed(7))(c, norm) for _ in range(2))
    other = ElasticFace(0.5, 0.05, kind, torch.Generator().manual_seed(8))(c, norm)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    drawn = first.acos() - math.acos(0.1) if kind == "arc" else 0.1 - first
    assert float(drawn.mean()) == pytest.approx(0.5, abs=4 * 0.05 / math.sqrt(n))
    assert float(drawn.std()) == pytest.approx(0.05, rel=0.03)
    kurtosis = float(((drawn - drawn.mean()) ** 4).mean() / drawn.var() ** 2)
    assert kurtosis == pytest.approx(3, abs=0.2)


def test_elasticface_draws_anew_every_call_and_once_per_bind():
    margin = ElasticFace(generator=torch.Generator().manual_seed(0))
    c, norm = torch.zeros(5), torch.ones(5)
    assert not torch.equal(margin(c, norm), margin(c, norm))
    bound = margin.bind(norm)
    assert torch.equal(bound(c), bound(c))


def test_elasticface_leaves_the_global_generator_alone_when_it_has_its_own():
    before = torch.get_rng_state()
    ElasticFace(generator=torch.Generator().manual_seed(0))(torch.zeros(5), torch.ones(5))
    assert torch.equal(before, torch.get_rng_state())


def test_margins_without_state_are_frozen_values():
    for make in (ArcFace, CosFace, CombinedMargin, SphereFace, MagFace, DSoftmax):
        assert make() == make()
        assert hash(make()) == hash(make())
        name = next(iter(make.__dataclass_fields__))
        with pytest.raises(AttributeError):
            setattr(make(), name, 1.0)


def test_defaults_are_those_of_the_contract():
    assert ArcFace() == ArcFace(0.5, False)
    assert CosFace() == CosFace(0.40)
    assert CombinedMargin() == CombinedMargin(1, 0.5, 0)
    assert SphereFace() == SphereFace(1.5)
    assert MagFace() == MagFace(10, 110, 0.45, 0.8, 35)
    assert repr(ElasticFace()) == "ElasticFace(m=0.5, std=0.05, kind='arc')"
    assert DSoftmax() == DSoftmax(0.9)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: ArcFace(-0.1), ValueError, r"m must be in \[0, inf\), got -0.1"),
        (lambda: ArcFace(28.6), ValueError, r"m is an angle in radians.*got 28.6 \(degrees\?\)"),
        (lambda: ArcFace(math.nan), ValueError, "m must be"),
        (lambda: ArcFace("0.5"), TypeError, "m must be a number, got str"),
        (lambda: ArcFace(True), TypeError, "m must be a number, got bool"),
        (lambda: CosFace(-1), ValueError, "m must be"),
        (lambda: CosFace(math.inf), ValueError, "m must be"),
        (lambda: CosFace(None), TypeError, "m must be a number, got NoneType"),
        (lambda: CombinedMargin(0.9), ValueError, "m1 must be"),
        (lambda: CombinedMargin(1, 4.0), ValueError, "m2 is an angle"),
        (lambda: CombinedMargin(1, -1), ValueError, "m2 must be"),
        (lambda: CombinedMargin(1, 0, -0.1), ValueError, "m3 must be"),
        (lambda: SphereFace(0.5), ValueError, "m must be"),
        (lambda: AdaFace(m=-0.4), ValueError, "m must be"),
        (lambda: AdaFace(h=-1), ValueError, "h must be"),
        (lambda: AdaFace(momentum=0), ValueError, r"momentum must be in \(0, 1\], got 0"),
        (lambda: AdaFace(momentum=1.1), ValueError, "momentum must be"),
        (lambda: MagFace(l_a=0), ValueError, "l_a must be"),
        (lambda: MagFace(l_a=10, u_a=10), ValueError, "u_a must be"),
        (lambda: MagFace(l_m=-1), ValueError, "l_m must be"),
        (lambda: MagFace(u_m=3.2), ValueError, "u_m is an angle"),
        (lambda: MagFace(regularizer=-1), ValueError, "regularizer must be"),
        (lambda: ElasticFace(-1), ValueError, "m must be"),
        (lambda: ElasticFace(0.5, -1), ValueError, "std must be"),
        (lambda: ElasticFace(kind="angle"), ValueError, "kind must be one of 'arc', 'cos', got 'angle'"),
        (lambda: DSoftmax(1.5), ValueError, r"d must be in \[-1, 1\], got 1.5"),
        (lambda: DSoftmax("0.9"), TypeError, "d must be a number"),
    ],
)
def test_constructor_errors_name_the_argument(make, error, words):
    with pytest.raises(error, match=words):
        make()


# Margins by label


OF_EACH = torch.tensor([0.1, 0.5, 0.0, 0.3], dtype=torch.float64)


@pytest.mark.parametrize(("kind", "plain"), [("arc", ArcFace), ("cos", CosFace)])
@pytest.mark.parametrize("head", ["operator", "logits", "classes", "sampled classes", "memory"])
def test_each_label_has_its_own_margin(head, kind, plain):
    """Beside one call with the plain margin for each sample."""
    torch.manual_seed(0)
    embeddings = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([3, 0, 1, -1, 2, 1])
    identities = torch.where(labels < 0, -1, labels + 100)  # a memory knows no classes, and takes a function
    weight = torch.randn(4, 5, dtype=torch.float64)

    def losses(margin):
        if head == "operator":
            return margin_softmax_loss(
                embeddings, weight, labels, margin=margin, scale=8, normalize_prototypes=True, reduction="none"
            )
        if head == "logits":
            logits = margin_softmax_logits(
                embeddings, weight, labels, margin=margin, scale=8, normalize_prototypes=True
            )
            return torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=-1)
        if head == "memory":
            loss_fn = PrototypeMemoryLoss(
                5, 4, margin=margin, scale=8, reduction="none", dtype=torch.float64, prototype_gradient="fresh"
            )
            return loss_fn(embeddings, identities)
        sample_rate = 0.9 if head == "sampled classes" else 1.0
        loss_fn = MarginSoftmaxLoss(
            4, 5, margin=margin, scale=8, reduction="none", sample_rate=sample_rate, dtype=torch.float64
        )
        loss_fn.load_state_dict({"weight": weight})
        return loss_fn(embeddings, labels)

    margins = (lambda labels: OF_EACH[(labels - 100).clamp(min=0)]) if head == "memory" else OF_EACH
    found = losses(LabelMargins(margins, kind))
    (gradient,) = torch.autograd.grad(found.sum(), embeddings)
    each = [losses(plain(float(OF_EACH[label])))[at] for at, label in enumerate(labels)]
    (expected,) = torch.autograd.grad(torch.stack(each).sum(), embeddings)
    alike = losses(plain(float(OF_EACH.mean())))
    assert ((found - alike).abs() > 1e-3).sum() >= 3, "the margins would make no difference"
    assert (expected.abs() > 1e-3).any(dim=1).sum() >= 4, "there would be no gradient to compare"
    torch.testing.assert_close(found, torch.stack(each), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_label_margins_that_cannot_be():
    with pytest.raises(ValueError, match=r"smallest of margins must be in \[0, inf\)"):
        LabelMargins(torch.tensor([0.1, -0.2]))
    with pytest.raises(ValueError, match=r"largest of margins is an angle.*got 28"):
        LabelMargins(torch.tensor([0.1, 28.0]))
    with pytest.raises(TypeError, match="margins must be a tensor or a function of labels, got float"):
        LabelMargins(0.5)
    with pytest.raises(ValueError, match="kind must be"):
        LabelMargins(OF_EACH, "sphere")
    with pytest.raises(ValueError, match=r"margins must give \(2,\), one for each label, got \(2, 1\)"):
        margin_softmax_loss(
            torch.randn(2, 3), torch.eye(3), torch.tensor([0, 1]), margin=LabelMargins(lambda labels: labels[:, None])
        )
    with pytest.raises(TypeError, match="needs labels"):
        LabelMargins(OF_EACH)(cosines(), cosines())
