"""Contract of ``aggregate_prototypes``, on every backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import protomem_kernels as pmk
from tests.ops.cases import (
    assert_as_close_as,
    assert_gradients_hold,
    each_backend_of_batches,
    each_dtype,
    far_apart,
    interpreted,
    strided,
)
from tests.ops.properties import given, settings, st

LAST = 2**63 - 1


def model(
    embeddings: Tensor, labels: Tensor, weights: Tensor | None, normalize: bool = True
) -> tuple[list[int], dict[int, Tensor], dict[int, float]]:
    """The definition, with Python dictionaries and loops, in the dtype of the embeddings."""
    e = embeddings
    sums: dict[int, Tensor] = {}
    mass: dict[int, float] = {}
    samples: dict[int, list[int]] = {}
    for i, label in enumerate(labels.tolist()):
        if label >= 0:
            samples.setdefault(label, []).append(i)
    for label, rows in samples.items():
        q = [1.0 if weights is None else float(weights[i]) for i in rows]
        mass[label] = sum(q)
        if mass[label] == 0:
            q = [1.0] * len(rows)
        x = [e[i] / e[i].norm() if normalize and e[i].norm() > 0 else e[i] for i in rows]
        m = sum(w * v for w, v in zip(q, x, strict=True))
        budget = sum(w * v.norm() for w, v in zip(q, x, strict=True))
        exists = torch.isfinite(m).all() and m.norm() > 1e-6 * budget
        sums[label] = m / m.norm() if exists else torch.zeros_like(m)
    return sorted(samples), sums, mass


@each_backend_of_batches
def test_worked_example(backend: str) -> None:
    e = torch.tensor([[2.0, 0.0], [0.0, 5.0], [0.0, -3.0], [1.0, 0.0], [9.0, 9.0]])
    labels = torch.tensor([7, 7, 2, 7, -1])
    weights = torch.tensor([1.0, 4.0, 0.5, 2.0, 1.0])
    with pmk.use_backend(backend):
        result = pmk.aggregate_prototypes(e, labels, weights)
    assert result.identities.tolist() == [2, 7]
    assert result.index.tolist() == [1, 1, 0, 1, -1]
    assert result.mass.tolist() == [0.5, 7.0]
    torch.testing.assert_close(result.prototypes, torch.tensor([[0.0, -1.0], [0.6, 0.8]]))


@each_backend_of_batches
@each_dtype
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("batch", "dim", "people"), [(0, 3, 1), (1, 1, 1), (37, 13, 1), (64, 33, 9), (50, 5, 50)])
def test_matches_the_definition(
    backend: str, dtype: torch.dtype, normalize: bool, batch: int, dim: int, people: int
) -> None:
    g = torch.Generator().manual_seed(batch * dim + people)
    e = strided((torch.randn(batch, dim, generator=g) * 3).to(dtype))
    labels = torch.randint(-1, people, (batch,), generator=g, dtype=torch.int32)
    weights = torch.rand(batch, generator=g).to(dtype)
    with pmk.use_backend(backend):
        result = pmk.aggregate_prototypes(e, labels, weights, normalize=normalize)
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    assert result.prototypes.dtype == result.mass.dtype == accumulated
    names, truth, mass = model(e.double(), labels, weights.double(), normalize)
    _, peer, _ = model(e.to(accumulated), labels, weights.to(accumulated), normalize)
    assert result.identities.tolist() == names
    assert result.index.tolist() == [names.index(c) if c >= 0 else -1 for c in labels.tolist()]
    if names:
        ours = result.prototypes
        assert_as_close_as(ours, torch.stack([peer[c] for c in names]), torch.stack([truth[c] for c in names]))
        torch.testing.assert_close(result.mass.double(), torch.tensor([mass[c] for c in names], dtype=torch.float64))
    else:
        assert result.prototypes.shape == (0, dim)


@each_backend_of_batches
def test_embeddings_past_two_to_the_31_elements(backend: str) -> None:
    near = torch.randn(5, 6).bfloat16()
    far = far_apart(near)
    labels, weights = torch.tensor([4, 2, 2, 4, 9]), torch.rand(5)
    results = []
    for e, served_by in ((near, "reference"), (far, backend)):
        e.requires_grad_()
        with pmk.use_backend(served_by):
            p = pmk.aggregate_prototypes(e, labels, weights).prototypes
        (grad,) = torch.autograd.grad(p, e, torch.arange(18.0).view(3, 6))
        results.append((p.detach(), grad))
    for ours, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, expected)


@each_backend_of_batches
def test_max_identities_pads(backend: str) -> None:
    e = torch.randn(5, 4)
    labels = torch.tensor([LAST, 3, -1, 3, LAST - 1])
    with pmk.use_backend(backend):
        exact = pmk.aggregate_prototypes(e, labels)
        padded = pmk.aggregate_prototypes(e, labels, max_identities=5)
        tight = pmk.aggregate_prototypes(e, labels, max_identities=3)
    assert exact.identities.tolist() == [3, LAST - 1, LAST] == tight.identities.tolist()
    assert padded.identities.tolist() == [3, LAST - 1, LAST, -1, -1]
    assert torch.equal(padded.index, exact.index)
    assert torch.equal(padded.prototypes[:3], exact.prototypes)
    assert not padded.prototypes[3:].any()
    assert not padded.mass[3:].any()


@each_backend_of_batches
@pytest.mark.parametrize("none_left", [0, 3])
def test_no_identities_at_all(backend: str, none_left: int) -> None:
    with pmk.use_backend(backend):
        result = pmk.aggregate_prototypes(torch.randn(none_left, 2), torch.full((none_left,), -5), max_identities=2)
    assert result.identities.tolist() == [-1, -1]
    assert result.index.tolist() == [-1] * none_left


@each_backend_of_batches
def test_zero_weights_count_equally(backend: str) -> None:
    e = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    with pmk.use_backend(backend):
        result = pmk.aggregate_prototypes(e, torch.tensor([1, 1, 2]), torch.tensor([0.0, 0.0, 3.0]))
    torch.testing.assert_close(result.prototypes[0], torch.full((2,), 0.5**0.5))
    assert result.mass.tolist() == [0.0, 3.0]


@each_backend_of_batches
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_broken_row_is_zero_and_touches_no_other(backend: str, poison: float, normalize: bool) -> None:
    e = torch.randn(6, 3, dtype=torch.float64)
    e[3] = -e[2]  # antipodal
    e[5, 1] = poison
    e.requires_grad_()
    labels = torch.tensor([0, 0, 1, 1, 0, 2])
    with pmk.use_backend(backend):
        clean = pmk.aggregate_prototypes(e[:5].detach(), labels[:5], normalize=normalize)
        result = pmk.aggregate_prototypes(e, labels, normalize=normalize)
    assert torch.equal(result.prototypes[0], clean.prototypes[0])
    assert not result.prototypes[1:].any()
    grad = torch.randn(3, 3, dtype=torch.float64)
    result.prototypes.backward(grad)
    assert e.grad is not None
    assert torch.isfinite(e.grad).all()
    assert e.grad[[0, 1, 4]].any()
    assert not e.grad[[2, 3, 5]].any()


@each_backend_of_batches
@pytest.mark.parametrize(("remainder", "exists"), [(1e-7, False), (1e-5, True)])
def test_almost_antipodal_images_have_no_direction(backend: str, remainder: float, exists: bool) -> None:
    e = torch.tensor([[1.0, 0.0], [-1.0, remainder]], dtype=torch.float64)
    with pmk.use_backend(backend):
        result = pmk.aggregate_prototypes(e, torch.tensor([3, 3]))
    assert bool(result.prototypes.any()) is exists


@each_backend_of_batches
def test_huge_and_tiny_embeddings_keep_their_direction(backend: str) -> None:
    e = torch.tensor([[3e30, 4e30], [3e-30, 4e-30], [0.0, 0.0]])
    with pmk.use_backend(backend):
        result = pmk.aggregate_prototypes(e, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(result.prototypes, torch.tensor([[0.6, 0.8], [0.6, 0.8], [0.0, 0.0]]))


# Lengths and weights whose squares float32 holds, and some whose squares it does not.
SIZES = [1.0, 1e-37, 1e-30, 1e-24, 1e-20, 1e18, 1e19, 1e24, 1e37]


@each_backend_of_batches
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dim", [1, 4, 33])
def test_no_length_and_no_weight_is_too_large_or_too_small(backend: str, normalize: bool, dim: int) -> None:
    """Only what is not finite or antipodal has no prototype; gradients are right too."""
    g = torch.Generator().manual_seed(dim)
    sizes = torch.tensor(SIZES, dtype=torch.float64)
    one = torch.randn(2 * len(SIZES), dim, generator=g, dtype=torch.float64)
    one[len(SIZES) :] = one[: len(SIZES)] + 0.1 * one[len(SIZES) :]  # the second sample of each identity
    one = one / one.norm(dim=1, keepdim=True)
    labels = torch.arange(len(SIZES)).repeat(2)
    upstream = torch.randn(len(SIZES), dim, generator=g, dtype=torch.float64)
    sums = one[: len(SIZES)] + one[len(SIZES) :]
    truth = sums / sums.norm(dim=1, keepdim=True)
    along = (upstream * truth).sum(dim=1, keepdim=True)
    tangent = ((upstream - along * truth) / sums.norm(dim=1, keepdim=True)).repeat(2, 1)
    if normalize:
        tangent = tangent - (tangent * one).sum(dim=1, keepdim=True) * one
    for weighted in (False, True):
        lengths = torch.ones(2 * len(SIZES), 1) if weighted else sizes.repeat(2)[:, None]
        e = (one * lengths).float().requires_grad_()
        weights = sizes.repeat(2).float() if weighted else None
        with pmk.use_backend(backend):
            made = pmk.aggregate_prototypes(e, labels, weights, normalize=normalize)
            (grad,) = torch.autograd.grad(made.prototypes, e, upstream.float())
        torch.testing.assert_close(made.prototypes.double(), truth, rtol=0, atol=1e-6)
        torch.testing.assert_close(grad.double() * lengths.double(), tangent, rtol=1e-4, atol=3e-6)


@each_backend_of_batches
def test_a_weights_gradient_beyond_the_range_has_a_sign(backend: str) -> None:
    """A huge image that counts for nothing beside a tiny one: x_i . u_c is in range, x_i / |m_c| is not."""
    e = torch.tensor([[3e19, 4e19, 1e19], [3e-20, 1e-20, 2e-20]])
    upstream = torch.tensor([[1.0, -2.0, 0.5]])
    for dtype in (torch.float32, torch.float16):  # what has left float32 is not brought back into float16
        weights = torch.tensor([0.0, 5e-4]).to(dtype).requires_grad_()
        with pmk.use_backend(backend):
            made = pmk.aggregate_prototypes(e, torch.tensor([7, 7]), weights, normalize=False, max_identities=1)
            (grad,) = torch.autograd.grad(made.prototypes, weights, upstream)
        p = e[1].double() / e[1].double().norm()
        across = upstream[0].double() - (upstream[0].double() @ p) * p
        assert e[0].double() @ across / (5e-4 * e[1].double().norm()) < -1e40
        assert grad[0] == -torch.inf
        assert abs(grad[1]) < 1e-2  # what is along the sum alone turns nothing


@each_backend_of_batches
def test_float16_gradients_stay_in_range(backend: str) -> None:
    e = torch.tensor([[6e-6, -3e-6], [1.0, 2.0], [1e-5, 1e-5]]).half().requires_grad_()
    weights = torch.tensor([1.0, 1.0, 6e-8]).half().requires_grad_()
    labels, upstream = torch.tensor([0, 1, 0]), torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    results = []
    for dtype in (torch.float16, torch.float32):
        leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in (e, weights)]
        with pmk.use_backend(backend):
            made = pmk.aggregate_prototypes(leaves[0], labels, leaves[1])
            results.append(torch.autograd.grad(made.prototypes, leaves, upstream))
    assert results[1][0].abs().max() > 65504
    for ours, wide in zip(*results, strict=True):
        torch.testing.assert_close(ours.float(), wide.clamp(-65504, 65504), rtol=2e-3, atol=1e-3)


@each_backend_of_batches
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_gradcheck(backend: str, normalize: bool, weighted: bool) -> None:
    g = torch.Generator().manual_seed(3)
    e = torch.randn(9, 4, generator=g, dtype=torch.float64, requires_grad=True)
    q = (torch.rand(9, generator=g, dtype=torch.float64) + 0.1).requires_grad_()
    labels = torch.tensor([4, 4, 0, -1, 0, 0, 9, 4, -1])

    def call(e: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        result = pmk.aggregate_prototypes(e, labels, q if weighted else None, normalize=normalize, max_identities=5)
        return result.prototypes, result.mass

    assert_gradients_hold(backend, call, (e, q))


@each_backend_of_batches
def test_zero_mass_and_zero_embeddings_pass_zero_gradient(backend: str) -> None:
    e = torch.tensor([[1.0, 2.0], [2.0, 1.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64, requires_grad=True)
    with pmk.use_backend(backend):
        result = pmk.aggregate_prototypes(e, torch.tensor([0, 0, 1]), q)
    result.prototypes.backward(torch.tensor([[1.0, -2.0], [1.0, 1.0]], dtype=torch.float64))
    assert e.grad is not None
    assert q.grad is not None
    assert e.grad[:2].any()  # equal weights carry the gradient of the embeddings
    assert not e.grad[2].any()
    assert not q.grad.any()


@each_backend_of_batches
def test_double_backward_raises(backend: str) -> None:
    e = torch.randn(3, 2, requires_grad=True)
    with pmk.use_backend(backend):
        p = pmk.aggregate_prototypes(e, torch.tensor([0, 0, 1])).prototypes
    (grad,) = torch.autograd.grad(p[0, 0], e, create_graph=True)
    with pytest.raises(RuntimeError, match="aggregate_prototypes can be differentiated once"):
        grad.sum().backward()


@each_backend_of_batches
def test_repeats_are_bit_equal_and_in_batch_order(backend: str) -> None:
    size = 80 if interpreted(backend) else 500  # one interpreted program per sample
    e = torch.randn(size, 32)
    labels = torch.cat([torch.arange(20), torch.randint(0, 20, (size - 20,))])
    with pmk.use_backend(backend):
        first = pmk.aggregate_prototypes(e, labels, normalize=False)
        for _ in range(3):
            assert torch.equal(pmk.aggregate_prototypes(e, labels, normalize=False).prototypes, first.prototypes)
    order = torch.randperm(20)  # renaming people does not change the order in which their samples are added
    with pmk.use_backend(backend):
        renamed = pmk.aggregate_prototypes(e, order[labels], normalize=False)
    assert torch.equal(renamed.prototypes[order], first.prototypes)


@each_backend_of_batches
@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.sampled_from([-(2**63), -1, 0, 1, 5, LAST - 1, LAST]), max_size=12),
    dim=st.integers(1, 5),
    data=st.data(),
)
def test_any_batch_matches_the_definition(backend: str, labels: list[int], dim: int, data: st.DataObject) -> None:
    values = st.floats(-1e3, 1e3, width=32)
    e = torch.tensor(
        data.draw(st.lists(st.lists(values, min_size=dim, max_size=dim), min_size=len(labels), max_size=len(labels))),
        dtype=torch.float64,
    ).view(len(labels), dim)
    q = torch.tensor(
        data.draw(st.lists(st.floats(0, 10, width=32), min_size=len(labels), max_size=len(labels))), dtype=torch.float64
    )
    with pmk.use_backend(backend):
        result = pmk.aggregate_prototypes(e, torch.tensor(labels, dtype=torch.int64), q)
    names, truth, mass = model(e, torch.tensor(labels, dtype=torch.int64), q)
    assert result.identities.tolist() == names
    lengths = result.prototypes.norm(dim=1)
    assert all(abs(n - 1) < 1e-9 or n == 0 for n in lengths.tolist())
    for row, c in enumerate(names):
        assert result.mass[row].item() == pytest.approx(mass[c], rel=1e-12)
        if lengths[row] > 0 and truth[c].any():  # at the very edge of cancellation the two may round differently
            torch.testing.assert_close(result.prototypes[row], truth[c], rtol=1e-5, atol=1e-5)


E, L = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
BAD = torch.tensor([1.0, 0.0, -1.0, 2.0])


@pytest.mark.parametrize(
    ("error", "message", "args", "kwargs"),
    [
        (TypeError, r"embeddings must be a tensor of shape \(B, D\), got list", ([1.0], L), {}),
        (ValueError, r"embeddings must have shape \(B, D\), got \(4,\)", (E[:, 0], L), {}),
        (TypeError, "embeddings must be floating point, got torch.int64", (E.long(), L), {}),
        (ValueError, r"embeddings must have at least one column, got \(4, 0\)", (E[:, :0], L), {}),
        (TypeError, "labels must be int64 or int32, got torch.float32", (E, L.float()), {}),
        (TypeError, "labels must be int64 or int32, got torch.bool", (E, L.bool()), {}),
        (ValueError, r"labels must have shape \(4,\) to match embeddings \(4, 3\), got \(3,\)", (E, L[:3]), {}),
        (ValueError, "labels must be on cpu like embeddings, got meta", (E, L.to("meta")), {}),
        (ValueError, r"weights must have shape \(4,\) to match embeddings \(4, 3\), got \(2,\)", (E, L, E[:2, 0]), {}),
        (TypeError, "weights must be floating point, got torch.int64", (E, L, L), {}),
        (ValueError, r"weights must be finite and not negative, got -1.0 at index 2", (E, L, BAD), {}),
        (ValueError, "weights must be finite and not negative, got nan at index 0", (E, L, E[:, 0] * torch.nan), {}),
        (TypeError, "max_identities must be an int, got float", (E, L), {"max_identities": 2.0}),
        (ValueError, "max_identities must be at least 0, got -1", (E, L), {"max_identities": -1}),
        (ValueError, r"max_identities .* must be at least 2, the number of identities", (E, L), {"max_identities": 1}),
    ],
)
def test_bad_input(error: type[Exception], message: str, args: tuple, kwargs: dict) -> None:
    with pytest.raises(error, match=message):
        pmk.aggregate_prototypes(*args, **kwargs)
