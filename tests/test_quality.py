"""Quality estimators against their formulas, written anew in float64 with loops over samples."""

from __future__ import annotations

import math

import pytest
import torch

from protomem_kernels import CenterQuality, NormQuality, RecognizabilityQuality, SoftmaxQuality, aggregate_prototypes
from tests import oracles

LABELS = torch.tensor([4, 4, 9, -1, 4, 9, 70, -5])


def batch(seed=0, dim=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(LABELS), dim, generator=generator, dtype=torch.float64)
    return (x * torch.rand(len(LABELS), 1, generator=generator, dtype=torch.float64) * 9).to(dtype)


def norm_quality(x, labels, power=1.0):
    norms = x.norm(dim=1)
    largest = max(float(n) for n, label in zip(norms, labels, strict=True) if label >= 0)
    return torch.where(labels >= 0, (norms / largest) ** power, 0)


def center_quality(x, labels):
    u = oracles.unit(x)
    q = []
    for i, label in enumerate(labels.tolist()):
        others = [j for j, other in enumerate(labels.tolist()) if other == label and j != i]
        if label < 0:
            q.append(torch.zeros((), dtype=x.dtype))
        elif not others:
            q.append(torch.ones((), dtype=x.dtype))
        else:
            mean = u[others].mean(dim=0)
            q.append((u[i] @ mean / mean.norm()).clamp(min=0))
    return torch.stack(q)


def softmax_quality(base, labels, temperature):
    q = []
    for i, label in enumerate(labels.tolist()):
        rivals = [j for j, other in enumerate(labels.tolist()) if other == label]
        total = sum(math.exp((float(base[j]) - float(base[i])) / temperature) for j in rivals)
        q.append(0.0 if label < 0 else 1 / total)
    return torch.tensor(q, dtype=torch.float64)


def recognizability(seed=0, dim=5, **kwargs):
    quality = RecognizabilityQuality(dim, **kwargs)
    quality.update_unrecognizable(torch.randn(6, dim, generator=torch.Generator().manual_seed(seed + 100)))
    return quality


ESTIMATORS = {
    "norm": lambda **kw: NormQuality(**kw),
    "norm squared": lambda **kw: NormQuality(2.0, **kw),
    "soft": lambda **kw: recognizability(**kw),
    "hard": lambda **kw: recognizability(mode="hard", threshold=0.8, **kw),
    "center": lambda **kw: CenterQuality(**kw),
    "softmax": lambda **kw: SoftmaxQuality(CenterQuality(**kw), 0.3, **kw),
}
each_estimator = pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 3.0])
def test_norm_quality(power):
    x = batch()
    torch.testing.assert_close(NormQuality(power)(x, LABELS), norm_quality(x, LABELS, power))


def test_norm_quality_ignored_samples_do_not_set_the_largest_norm():
    x = torch.tensor([[3.0, 4.0], [0.0, 100.0]])
    assert NormQuality()(x, torch.tensor([1, -1])).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_norm_quality_where_squares_leave_float32(size):
    x = torch.tensor([[3.0, 4.0], [0.0, 1.0]]) * size
    torch.testing.assert_close(NormQuality()(x, torch.tensor([1, 1])), torch.tensor([1.0, 0.2]))


@pytest.mark.parametrize("labels", [LABELS, LABELS.int()], ids=["int64", "int32"])
def test_center_quality(labels):
    for seed in range(3):
        x = batch(seed)
        torch.testing.assert_close(CenterQuality()(x, labels), center_quality(x, labels))


def test_center_quality_of_an_only_image_is_one_and_of_an_opposite_one_zero():
    x = torch.tensor([[2.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 5.0], [0.0, -2.0]])
    q = CenterQuality()(x, torch.tensor([7, 1, 1, 1, 7]))
    assert q[0] == 0  # orthogonal to its only fellow
    assert q.tolist() == pytest.approx([0, 0, 0, 0, 0], abs=1e-7)
    assert CenterQuality()(x, torch.tensor([1, 2, 3, 4, 5])).tolist() == [1.0] * 5


@pytest.mark.parametrize("temperature", [0.05, 0.1, 2.0])
def test_softmax_quality(temperature):
    x = batch()
    quality = SoftmaxQuality(NormQuality(), temperature)
    want = softmax_quality(norm_quality(x, LABELS), LABELS, temperature)
    got = quality(x, LABELS)
    torch.testing.assert_close(got, want)
    for label in (4, 9, 70):
        assert float(got[label == LABELS].sum()) == pytest.approx(1)


def test_softmax_quality_at_a_tiny_temperature_is_finite_and_picks_the_best():
    x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0], [7.0, 0.0]])
    q = SoftmaxQuality(NormQuality(), 1e-30)(x, torch.tensor([1, 1, 1, 2]))
    assert q.tolist() == [0.0, 1.0, 0.0, 1.0]


def test_softmax_quality_of_any_callable():
    q = SoftmaxQuality(lambda x, labels: labels.double(), 1.0)(batch(), torch.tensor([1] * 8))
    torch.testing.assert_close(q, torch.full((8,), 1 / 8, dtype=torch.float64))


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_recognizability_quality(mode):
    quality, x = recognizability(mode=mode, threshold=0.9), batch()
    u = quality.unrecognizable.double()
    assert float(u.norm()) == pytest.approx(1, abs=1e-6)
    want = (1 - oracles.unit(x) @ u).clamp(0, 1)
    if mode == "hard":
        want = (want >= 0.9).double()
        assert 0 < float(want.sum()) < len(want)
    got = quality(x, LABELS)
    torch.testing.assert_close(got, torch.where(LABELS >= 0, want, 0))


def test_recognizability_before_the_first_update_weighs_all_alike():
    assert RecognizabilityQuality(5)(batch(), LABELS).tolist() == (LABELS >= 0).double().tolist()


def test_recognizability_running_prototype():
    quality = RecognizabilityQuality(3, momentum=0.2)
    generator = torch.Generator().manual_seed(0)
    u = None
    for step in range(4):
        images = torch.randn(5 + step, 3, generator=generator) + torch.tensor([1.0, 0.0, 0.0])
        direction = oracles.unit(oracles.unit(images.double()).mean(dim=0))
        u = direction if u is None else oracles.unit(0.8 * u + 0.2 * direction)
        quality.update_unrecognizable(images)
        torch.testing.assert_close(quality.unrecognizable.double(), u, rtol=0, atol=1e-6)


@pytest.mark.parametrize("state", ["fresh", "known"])
@pytest.mark.parametrize("images", ["zero", "nan", "none", "antipodal"])
def test_recognizability_prototype_ignores_what_has_no_direction(images, state):
    quality = RecognizabilityQuality(2) if state == "fresh" else recognizability(dim=2)
    before = oracles.snapshot(quality)
    quality.update_unrecognizable(
        {
            "zero": torch.zeros(3, 2),
            "nan": torch.tensor([[math.nan, 1.0], [math.inf, 0.0]]),
            "none": torch.zeros(0, 2),
            "antipodal": torch.tensor([[1.0, 0.0], [-1.0, 0.0]]),
        }[images]
    )
    assert oracles.same(before, quality.state_dict())


def test_recognizability_prototype_leaves_out_a_broken_image():
    one, other = RecognizabilityQuality(2), RecognizabilityQuality(2)
    one.update_unrecognizable(torch.tensor([[1.0, 0.5], [math.nan, 1.0], [0.0, 1.0]]))
    other.update_unrecognizable(torch.tensor([[1.0, 0.5], [0.0, 1.0]]))
    assert torch.equal(one.unrecognizable, other.unrecognizable)


def test_recognizability_state_dict_and_repr():
    quality, restored = recognizability(), RecognizabilityQuality(5)
    restored.load_state_dict(quality.state_dict())
    assert torch.equal(restored(batch(), LABELS), quality(batch(), LABELS))
    assert repr(quality) == "RecognizabilityQuality(embedding_dim=5, mode='soft', threshold=0.5)"


@each_estimator
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_negative_labels_weigh_nothing_and_weights_are_usable(make, dtype):
    q = make()(batch(dtype=dtype), LABELS)
    assert q.shape == LABELS.shape
    assert q.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(q[LABELS < 0], torch.zeros(2, dtype=q.dtype))
    assert (q >= 0).all()
    assert (q <= 1 + 1e-6).all()


@each_estimator
@pytest.mark.parametrize(
    "bad", [0.0, math.nan, math.inf, -math.inf, 3e38, 1e-44], ids=["zero", "nan", "inf", "-inf", "huge", "tiny"]
)
@pytest.mark.parametrize("where", ["one of several", "an only image", "ignored", "every"])
def test_no_embedding_gives_a_weight_that_is_not_finite(make, bad, where):
    x = batch(dtype=torch.float32)
    rows = {"one of several": [0], "an only image": [6], "ignored": [3], "every": list(range(8))}[where]
    x[rows] = bad
    q = make()(x, LABELS)
    assert torch.isfinite(q).all()
    assert (q >= 0).all()
    aggregate_prototypes(x, LABELS, q)  # takes them


@each_estimator
def test_a_broken_embedding_leaves_other_identities_weights_alone(make):
    x = batch(dtype=torch.float32)
    labels = torch.where(LABELS == 70, -1, LABELS)
    without = make()(x, labels)
    x[6] = math.nan
    torch.testing.assert_close(make()(x, LABELS)[:6], without[:6], rtol=0, atol=0)


@each_estimator
@pytest.mark.parametrize("rows", [0, 1])
def test_tiny_batches(make, rows):
    q = make()(batch(dtype=torch.float32)[:rows], LABELS[:rows])
    assert q.shape == (rows,)
    assert torch.isfinite(q).all()


@each_estimator
def test_detached_by_default(make):
    assert not make()(batch().requires_grad_(), LABELS).requires_grad


@pytest.mark.parametrize("name", ["norm", "norm squared", "soft", "center", "softmax"])
def test_gradient_when_asked(name):
    quality = ESTIMATORS[name](detach=False)
    # The largest norm and the clips are kinks; this batch stays clear of them.
    x = batch(4).requires_grad_()
    assert quality(x, LABELS).requires_grad
    assert torch.autograd.gradcheck(lambda e: quality(e, LABELS), (x,), atol=1e-6)


@pytest.mark.parametrize("name", ["norm", "soft", "center", "softmax"])
def test_gradient_of_a_zero_embedding_is_finite(name):
    x = batch()
    x[0] = 0
    x.requires_grad_()
    (grad,) = torch.autograd.grad(ESTIMATORS[name](detach=False)(x, LABELS).sum(), x)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_gradient_of_the_norm_quality_stays_finite_at_zero(power):
    x = batch()
    x[0] = 0
    x.requires_grad_()
    (grad,) = torch.autograd.grad(NormQuality(power, detach=False)(x, LABELS).sum(), x)
    assert torch.isfinite(grad).all()


X, Y = torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: NormQuality(-1), ValueError, r"power must be in \[0, inf\), got -1"),
        (lambda: NormQuality("1"), TypeError, "power must be a number, got str"),
        (lambda: RecognizabilityQuality(0), ValueError, "embedding_dim must be at least 1, got 0"),
        (lambda: RecognizabilityQuality(2.5), TypeError, "embedding_dim must be an int, got float"),
        (lambda: RecognizabilityQuality(4, "medium"), ValueError, "mode must be one of 'soft', 'hard', got 'medium'"),
        (lambda: RecognizabilityQuality(4, threshold=2), ValueError, r"threshold must be in \[0, 1\], got 2"),
        (lambda: RecognizabilityQuality(4, momentum=0), ValueError, r"momentum must be in \(0, 1\], got 0"),
        (lambda: SoftmaxQuality(None), TypeError, "base must be a quality estimator, got NoneType"),
        (lambda: SoftmaxQuality(NormQuality(), 0), ValueError, r"temperature must be in \(0, inf\), got 0"),
        (
            lambda: RecognizabilityQuality(4)(X, Y),
            ValueError,
            r"embeddings must have shape \(B, 4\) to match embedding_dim, got \(3, 5\)",
        ),
        (
            lambda: RecognizabilityQuality(4).update_unrecognizable(X),
            ValueError,
            r"embeddings must have shape \(B, 4\)",
        ),
        (lambda: RecognizabilityQuality(5).update_unrecognizable(X[0]), ValueError, r"embeddings must have shape"),
        (
            lambda: NormQuality()(X, Y[:2]),
            ValueError,
            r"labels must have shape \(3,\) to match embeddings \(3, 5\), got \(2,\)",
        ),
        (lambda: CenterQuality()(X, Y.float()), TypeError, "labels must be int64 or int32, got torch.float32"),
        (lambda: CenterQuality()(X.long(), Y), TypeError, "embeddings must be floating point, got torch.int64"),
        (lambda: SoftmaxQuality(NormQuality())([1.0], Y), TypeError, r"embeddings must be a tensor .* got list"),
        (lambda: RecognizabilityQuality(5)(X, Y[:2]), ValueError, r"labels must have shape \(3,\)"),
    ],
)
def test_errors_name_the_argument(call, error, words):
    with pytest.raises(error, match=words):
        call()
