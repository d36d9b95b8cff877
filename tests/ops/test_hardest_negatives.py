"""Contract of ``hardest_negatives``, on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import protomem_kernels as pmk
from tests.ops.cases import AVAILABLE, assert_gradients_hold, each_backend, each_dtype, each_shape, strided, unit
from tests.ops.properties import given, settings, st
from tests.ops.test_margin_softmax_loss import inputs


def model(cosines: Tensor, targets: Tensor, occupied: Tensor | None, k: int) -> tuple[list, list]:
    """Sort every row of (B, M) cosines by (-cosine, slot) with Python's own sort."""
    values, slots = [], []
    free = set() if occupied is None else {j for j, taken in enumerate(occupied.tolist()) if not taken}
    for row, target in zip(cosines.tolist(), targets.tolist(), strict=True):
        ranked = sorted((-c, j) for j, c in enumerate(row) if j != target and j not in free)[:k]
        missing = k - len(ranked)
        values.append([-c for c, _ in ranked] + [-math.inf] * missing)
        slots.append([j for _, j in ranked] + [-1] * missing)
    return values, slots


@each_backend
@pytest.mark.parametrize("normalize", [False, True])
def test_a_broken_embedding_is_told_even_where_there_is_nothing_to_find(backend: str, normalize: bool) -> None:
    x = torch.tensor([[math.nan, 1.0], [1.0, 0.0], [math.inf, 0.0]])
    with pmk.use_backend(backend):
        cosines, slots = pmk.hardest_negatives(x, torch.zeros(0, 2), k=2, normalize_prototypes=normalize)
    assert cosines.isnan().tolist() == [[True] * 2, [False] * 2, [True] * 2]
    assert cosines[1].tolist() == [-math.inf] * 2
    assert slots.tolist() == [[-1] * 2] * 3


@each_backend
@each_dtype
@each_shape
@pytest.mark.parametrize("k", [1, 6])
def test_exact(backend: str, dtype: torch.dtype, shape: tuple[int, int, int], k: int) -> None:
    x, w, targets, occupied = inputs(shape, dtype)
    with pmk.use_backend(backend):
        cosines, slots = pmk.hardest_negatives(strided(x), strided(w), targets.int(), k=k, occupied=occupied)
    accumulated = torch.promote_types(dtype, torch.float32)
    assert cosines.dtype == accumulated
    assert slots.dtype == torch.int64
    assert cosines.shape == slots.shape == (shape[0], k)
    dense = unit(x.double()) @ w.double().T
    values, _ = model(dense, targets, occupied, k)
    expected = torch.tensor(values, dtype=torch.float64).view(-1, k)
    torch.testing.assert_close(cosines.double(), expected, rtol=0, atol=1e-6 if accumulated == torch.float32 else 1e-12)
    found = slots >= 0
    assert torch.equal(found, torch.isfinite(expected))
    assert (cosines[:, 1:] <= cosines[:, :-1]).all()
    for row, target in zip(slots.tolist(), targets.tolist(), strict=True):
        real = [j for j in row if j >= 0]
        assert len(set(real)) == len(real)
        assert target not in real
        assert all(occupied[j] for j in real)
    at = dense.gather(1, slots.clamp(min=0)) if shape[1] else dense.new_empty(shape[0], k)
    torch.testing.assert_close(torch.where(found, at, 0), torch.where(found, cosines.double(), 0), rtol=0, atol=1e-5)


@each_backend
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_ties_go_to_the_lower_slot(backend: str, data: st.DataObject) -> None:
    batch, capacity, k = (data.draw(st.integers(1, n)) for n in (4, 40, 9))
    choice = st.lists(st.integers(0, 3), min_size=capacity, max_size=capacity)
    w = torch.eye(4, dtype=torch.float64)[torch.tensor(data.draw(choice))]
    x = torch.eye(4, dtype=torch.float64)[:batch] * 2
    targets = torch.tensor(data.draw(st.lists(st.integers(-1, capacity - 1), min_size=batch, max_size=batch)))
    occupied = torch.tensor(data.draw(st.lists(st.booleans(), min_size=capacity, max_size=capacity)))
    with pmk.use_backend(backend):
        cosines, slots = pmk.hardest_negatives(x, w, targets, k=k, occupied=occupied)
    values, expected = model(unit(x) @ w.T, targets, occupied, k)
    assert slots.tolist() == expected
    assert cosines.tolist() == values


@each_backend
def test_an_infinite_row_has_no_negatives(backend: str) -> None:
    """Below the unit rows of the public function, an infinite entry can make an infinite cosine instead of NaN."""
    x = torch.tensor([[float("inf"), 0.0], [1.0, 0.0]])
    nobody = torch.tensor([-1, -1])
    with pmk.use_backend(backend):
        cosines, slots = torch.ops.protomem.hardest_negatives(x, torch.eye(2), nobody, None, 1, False)
    assert cosines[:, 0].isnan().tolist() == [True, False]
    assert slots[:, 0].tolist() == [-1, 0]


@each_backend
def test_ties_across_tiles(backend: str) -> None:
    w = torch.eye(2).repeat(4000, 1)  # even slots tie at cosine 1 for the first query
    with pmk.use_backend(backend):
        cosines, slots = pmk.hardest_negatives(torch.eye(2)[:1], w, torch.tensor([4]), k=5)
    assert slots.tolist() == [[0, 2, 6, 8, 10]]
    assert cosines.tolist() == [[1.0] * 5]


@each_backend
@pytest.mark.parametrize("k", [20, 300])
def test_many_ties_at_the_edge_of_the_list(backend: str, k: int) -> None:
    """Fewer and more than there are tiles of 128 slots."""
    generator = torch.Generator().manual_seed(k)
    w = torch.eye(4)[torch.randint(4, (3000,), generator=generator)]
    w[torch.randint(3000, (70,), generator=generator)] *= -1
    targets, occupied = torch.tensor([0, -1, 17]), torch.rand(3000, generator=generator) < 0.5
    with pmk.use_backend(backend):
        cosines, slots = pmk.hardest_negatives(torch.eye(4)[:3], w, targets, k=k, occupied=occupied)
    values, expected = model(torch.eye(4)[:3] @ w.T, targets, occupied, k)
    assert slots.tolist() == expected
    assert cosines.tolist() == values


def nearly_equal(capacity: int, dim: int, generator: torch.Generator) -> Tensor:
    """Return (M, D) prototypes of which many are equal and many others differ by a rounding or two."""
    few = torch.randn(4, dim, generator=generator)
    w = few[torch.randint(4, (capacity,), generator=generator)]
    jitter = torch.randint(-2, 3, (capacity, dim), generator=generator) * (
        torch.rand(capacity, 1, generator=generator) < 0.5
    )
    return w * (1 + jitter * torch.finfo(torch.float32).eps)


@each_backend
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("capacity", "k"), [(300, 300), (300, 131), (520, 6), (41, 60)])
def test_sorted_by_the_very_values_that_are_returned(backend: str, normalize: bool, capacity: int, k: int) -> None:
    """Near ties may come in another order than exact arithmetic's, but in that of what is returned, ties by slot."""
    for seed, (dim, dtype) in enumerate([(33, torch.float32), (5, torch.bfloat16)]):
        generator = torch.Generator().manual_seed(seed)
        w = nearly_equal(capacity, dim, generator).to(dtype)
        w = w if normalize else unit(w.float()).to(dtype)
        queries = torch.cat([w[:3].float(), torch.randn(3, dim, generator=generator)])
        targets = torch.tensor([-1, 1, 0, 5, capacity - 1, -1])
        occupied = torch.rand(capacity, generator=generator) < 0.9 if seed % 2 else None
        with pmk.use_backend(backend):
            cosines, slots = pmk.hardest_negatives(
                queries, w, targets, k=k, occupied=occupied, normalize_prototypes=normalize
            )
        for row, (values, places) in enumerate(zip(cosines.tolist(), slots.tolist(), strict=True)):
            negatives = [j for j in range(capacity) if j != targets[row] and (occupied is None or bool(occupied[j]))]
            count = min(k, len(negatives))
            assert sorted(zip((-v for v in values[:count]), places[:count], strict=True)) == [
                (-v, j) for v, j in zip(values[:count], places[:count], strict=True)
            ]
            assert len(set(places[:count])) == count
            assert set(places[:count]) <= set(negatives)
            assert values[count:] == [-math.inf] * (k - count)
            assert places[count:] == [-1] * (k - count)
        # What is left out is no better than the last that is returned, to rounding.
        dense = unit(queries.double()) @ (unit(w.double()) if normalize else w.double()).T
        found = slots >= 0
        at = dense.gather(1, slots.clamp(min=0))
        torch.testing.assert_close(
            torch.where(found, cosines.double(), 0), torch.where(found, at, 0), rtol=0, atol=2e-6
        )
        left_out = dense.scatter(1, slots.clamp(min=0), -math.inf)
        left_out[~found.all(dim=1)] = -math.inf
        if occupied is not None:
            left_out[:, ~occupied] = -math.inf
        own = targets >= 0
        left_out[own, targets[own]] = -math.inf
        assert (left_out.max(dim=1).values <= cosines[:, -1].double().clamp(min=-2) + 2e-6).all()


@each_backend
@pytest.mark.parametrize("normalize", [False, True])
def test_each_of_the_best_in_a_tile_of_its_own(backend: str, normalize: bool) -> None:
    w = torch.zeros(128 * 12, 3, dtype=torch.float64)
    w[:, 1] = 1
    best = torch.arange(11) * 128 + torch.arange(11) * 11
    w[best, 0] = 1 - torch.arange(11, dtype=torch.float64) / 100
    w[best, 1] = 0.1
    with pmk.use_backend(backend):
        _, slots = pmk.hardest_negatives(torch.eye(3)[:1].double(), w, k=11, normalize_prototypes=normalize)
    assert slots.tolist() == [best.tolist()]


@each_backend
@each_dtype
def test_long_embeddings(backend: str, dtype: torch.dtype) -> None:
    x, w, targets, occupied = inputs((70, 600, 300), dtype)
    with pmk.use_backend(backend):
        cosines, slots = pmk.hardest_negatives(x, w, targets, k=4, occupied=occupied)
    values, expected = model(unit(x.double()) @ w.double().T, targets, occupied, 4)
    assert slots.tolist() == expected
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(cosines.double(), torch.tensor(values, dtype=torch.float64), rtol=0, atol=tolerance)


@each_backend
@pytest.mark.parametrize("normalize", [False, True])
def test_a_broken_prototype_is_never_chosen(backend: str, normalize: bool) -> None:
    x, w, targets, _ = inputs((3, 300, 4))
    w[7, 2], w[200, 0] = float("nan"), float("nan")
    with pmk.use_backend(backend):
        cosines, slots = pmk.hardest_negatives(x, w, targets, k=300, normalize_prototypes=normalize)
    for row, target in zip(slots.tolist(), targets.tolist(), strict=True):
        assert set(row) == set(range(300)) - {7, 200, target} | {-1}
    assert not cosines.isnan().any()


@each_backend
@pytest.mark.parametrize("normalize", [False, True])
def test_a_broken_prototype_hides_no_other(backend: str, normalize: bool) -> None:
    """Not in its own tile of 128 slots, and not in the others, before and after it."""
    w = torch.zeros(3 * 128, 4)
    w[:, 0] = 1
    best = torch.tensor([5, 140, 200, 300])
    w[best] = torch.eye(4)[[1, 2, 3, 1]]
    w[300] *= -1
    w[150] = float("nan")
    with pmk.use_backend(backend):
        cosines, slots = pmk.hardest_negatives(w[best], w, k=1, normalize_prototypes=normalize)
    assert slots[:, 0].tolist() == best.tolist()
    assert not cosines.isnan().any()


@pytest.mark.triton
@pytest.mark.skipif("triton" not in AVAILABLE, reason="Triton's interpreter is not asked for (TRITON_INTERPRET=1)")
def test_scratch_space_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch taken in pieces of 64 rows, as where the maxima or the candidates of all rows are too many."""
    from protomem_kernels.backends.triton import hardest_negatives

    x, w, targets, occupied = inputs((150, 700, 6), torch.float32)
    results = []
    for size in (hardest_negatives.SCRATCH_BYTES, 1):
        monkeypatch.setattr(hardest_negatives, "SCRATCH_BYTES", size)
        with pmk.use_backend("triton"):
            results.append(pmk.hardest_negatives(x, w, targets, k=3, occupied=occupied))
    assert torch.equal(results[0].cosines, results[1].cosines)
    assert torch.equal(results[0].slots, results[1].slots)


@each_backend
def test_without_targets_the_own_prototype_comes_first(backend: str) -> None:
    w = unit(torch.randn(50, 8, dtype=torch.float64))
    with pmk.use_backend(backend):
        cosines, slots = pmk.hardest_negatives(w[:5] * 3, w, k=1)
    assert slots[:, 0].tolist() == [0, 1, 2, 3, 4]
    torch.testing.assert_close(cosines[:, 0], torch.ones(5, dtype=torch.float64))


@each_backend
@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck(backend: str, normalize: bool) -> None:
    x, w, targets, occupied = inputs((3, 8, 3), seed=1)
    x.requires_grad_()
    w = (w * 1.5 if normalize else w).requires_grad_()

    def call(x: Tensor, w: Tensor) -> Tensor:
        cosines, _ = pmk.hardest_negatives(x, w, targets, k=8, occupied=occupied, normalize_prototypes=normalize)
        return torch.where(torch.isfinite(cosines), cosines, 0)

    assert_gradients_hold(backend, call, (x, w))


@each_backend
def test_gradients_touch_only_what_was_chosen(backend: str) -> None:
    x, w, targets, _ = inputs((2, 30, 4))
    x.requires_grad_()
    w.requires_grad_()
    with pmk.use_backend(backend):
        cosines, slots = pmk.hardest_negatives(x, w, targets, k=3)
    cosines.sum().backward()
    touched = w.grad.any(dim=1).nonzero()[:, 0].tolist()
    assert touched == sorted(set(slots.flatten().tolist()))
    assert not slots.requires_grad


@each_backend
def test_a_broken_embedding_hurts_only_itself(backend: str) -> None:
    x, w, targets, _ = inputs((4, 700, 4))
    broken = x.clone()
    broken[1, 0] = float("nan")
    with pmk.use_backend(backend):
        good = pmk.hardest_negatives(x, w, targets, k=4)
        bad = pmk.hardest_negatives(broken, w, targets, k=4)
    assert bad.cosines[1].isnan().all()
    assert bad.slots[1].tolist() == [-1] * 4
    others = [0, 2, 3]
    assert torch.equal(bad.cosines[others], good.cosines[others])
    assert torch.equal(bad.slots[others], good.slots[others])


@each_backend
def test_double_backward_raises(backend: str) -> None:
    x = torch.randn(2, 3, requires_grad=True)
    with pmk.use_backend(backend):
        cosines = pmk.hardest_negatives(x, torch.eye(3).requires_grad_(), k=1).cosines
    (grad,) = torch.autograd.grad((cosines**2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="hardest_negatives can be differentiated once"):
        grad.sum().backward()


X, W, T = torch.randn(4, 3), torch.eye(3), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("error", "message", "args", "kwargs"),
    [
        (TypeError, "embeddings must be a tensor", ("x", W), {"k": 1}),
        (ValueError, r"embeddings must have shape \(B, D\), got \(\)", (X[0, 0], W), {"k": 1}),
        (ValueError, "k must be at least 1, got 0", (X, W), {"k": 0}),
        (TypeError, "k must be an int, got bool", (X, W), {"k": True}),
        (ValueError, r"prototypes must have shape \(M, D\), got \(3,\)", (X, W[0]), {"k": 1}),
        (ValueError, r"targets must have shape \(4,\)", (X, W, T[:1]), {"k": 1}),
        (ValueError, "targets must be below 3, the number of prototypes, got 3", (X, W, T + 1), {"k": 1}),
    ],
)
def test_bad_input(error: type[Exception], message: str, args: tuple, kwargs: dict) -> None:
    with pytest.raises(error, match=message):
        pmk.hardest_negatives(*args, **kwargs)
