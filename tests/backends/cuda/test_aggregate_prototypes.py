"""The CUDA kernels of ``aggregate_prototypes``, run on the CPU beside the reference.

Sizes are chosen for the kernels: tiles of 16 samples, 8 columns per thread, more than one block.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from protomem_kernels.backends import reference
from tests.backends.cuda.operators import Kernels, Operators, load
from tests.ops.cases import each_dtype, strided

LAST = 2**63 - 1


def batch(size: int, dim: int, people: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return embeddings, labels of which some are negative and some huge, and weights of which some are zero."""
    g = torch.Generator().manual_seed(size + dim)
    labels = torch.randint(-2, people, (size,), generator=g)
    weights = torch.rand(size, generator=g) * (torch.rand(size, generator=g) < 0.7)
    return torch.randn(size, dim, generator=g).to(dtype), torch.where(labels == 3, LAST, labels), weights


def padded(x: Tensor) -> Tensor:
    """Return the same rows, each beginning at a multiple of 16 bytes, whatever their length; vectors as they are."""
    if x.ndim < 2:
        return x
    wide = torch.full((x.shape[0], -(-x.shape[1] // 8) * 8 + 8), float("nan"), dtype=x.dtype)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {"contiguous": lambda x: x, "strided": strided, "padded": padded}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def aggregate_matches(
    kernels: Kernels, e: Tensor, labels: Tensor, weights: Tensor | None, normalize: bool, rows: int | None
) -> None:
    """Compare forward and backward with the reference; integers exactly."""
    both = kernels, reference.BACKEND.kernels
    ours, theirs = (k["aggregate_prototypes"](e, labels, weights, normalize, rows) for k in both)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    prototypes, _, index, mass, norm = theirs
    g = torch.Generator().manual_seed(0)
    upstream = torch.randn(prototypes.shape, generator=g, dtype=prototypes.dtype)
    one = torch.randn(1, generator=g, dtype=mass.dtype).expand(mass.shape)
    layout = strided if e.numel() and not e.is_contiguous() else lambda x: x
    rest = layout(upstream), one, e, weights, layout(index), layout(prototypes), layout(mass), layout(norm), normalize
    ours, theirs = (k["aggregate_prototypes_backward"](*rest) for k in both)
    for a, b in zip(ours, theirs, strict=True):
        near = max(4 * torch.finfo(a.dtype).eps, 1e-12 if e.dtype == torch.float64 else 1e-5)
        torch.testing.assert_close(a, b, rtol=near, atol=near)


def sums_in_batch_order(kernels: Kernels) -> None:
    """Three ones count beside 2^25 in float32 only where they are added up first."""
    for e, norm in (([1, 1, 1, 2**25], 2**25 + 4), ([2**25, 1, 1, 1], 2**25)):
        rows = torch.tensor(e, dtype=torch.float32)[:, None]
        made = kernels["aggregate_prototypes"](rows, torch.zeros(4, dtype=torch.int64), None, False, 1)
        assert made[4].tolist() == [norm]


@each_dtype
@each_layout
@pytest.mark.parametrize(
    ("size", "dim", "people", "rows"),
    [(45, 9, 14, 45), (17, 3, 4, 2), (3, 1, 9, 20), (90, 16, 1, 8), (5, 1000, 3, None), (0, 5, 1, 3), (1, 1, 1, None)],
)
def test_aggregate(
    ops: Operators,
    dtype: torch.dtype,
    layout: Callable[[Tensor], Tensor],
    size: int,
    dim: int,
    people: int,
    rows: int | None,
) -> None:
    for normalize, weighted in ((True, True), (True, False), (False, True)):
        e, labels, weights = batch(size, dim, people, dtype)
        given = layout(weights) if weighted else None
        aggregate_matches(ops.kernels, layout(e), layout(labels), given, normalize, rows)


def test_samples_are_added_in_batch_order(ops: Operators) -> None:
    sums_in_batch_order(ops.kernels)


def test_aggregate_meets_wild_values(ops: Operators) -> None:
    """What a GPU meets without PROTOMEM_DEBUG=1: bad weights count as 0, identities past the rows get no row."""
    e, labels = torch.randn(6, 3), torch.tensor([8, 3, 5, 3, 9, 8])
    weights = torch.tensor([float("nan"), -3.0, 1.0, 2.0, float("inf"), -float("inf")])
    aggregate_matches(ops.kernels, e, labels, weights, True, 3)
    e[2, 1], e[5, 0] = float("inf"), float("nan")
    aggregate_matches(ops.kernels, e, labels.int(), weights, True, 3)
    prototypes, _, index, mass, norm = ops.kernels["aggregate_prototypes"](e, labels, weights, True, 3)
    wild = torch.where(index < 0, 2**40, index)
    wild[5] = -(2**40)
    grads = [
        ops.kernels["aggregate_prototypes_backward"](
            torch.ones(3, 3), torch.ones(3), e, weights, given, prototypes, mass, norm, True
        )
        for given in (wild, torch.where(wild.abs() < 3, wild, -1))
    ]
    for ours, expected in zip(*grads, strict=True):
        assert torch.equal(ours, expected)
        assert torch.isfinite(ours).all()


@pytest.mark.parametrize("size", [1e-44, 1e-25, 1e25, 1e38])
def test_aggregate_of_rows_whose_squares_leave_float32(ops: Operators, size: float) -> None:
    e, labels, weights = batch(9, 5, 3)
    e = e / e.abs().amax() * size
    kernel = ops.kernels["aggregate_prototypes"]
    ours, truth = kernel(e, labels, weights, True, 9), kernel(e.double(), labels, weights, True, 9)
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=1e-5, atol=1e-6)


def test_the_order_of_blocks_and_threads_changes_no_bit(mode: str) -> None:
    e, labels, weights = batch(60, 24, 9)
    results = []
    for seed in range(4):
        load(mode).seed(seed)
        kernels = load(mode).kernels
        made = kernels["aggregate_prototypes"](e, labels, weights, True, 60)
        grads = kernels["aggregate_prototypes_backward"](made[0].flip(0), made[3], e, weights, *made[2:3], *made[:1],
                                                         *made[3:], True)  # fmt: skip
        results.append((*made, *grads))
    for other in results[1:]:
        for ours, first in zip(other, results[0], strict=True):
            assert torch.equal(ours, first)


def test_number_of_launches(ops: Operators) -> None:
    before = ops.launches()
    made = ops.kernels["aggregate_prototypes"](*batch(20, 4, 5), True, 20)
    assert ops.launches() - before == 2
    rest = made[2], made[0], *made[3:], True
    ops.kernels["aggregate_prototypes_backward"](made[0], made[3], *batch(20, 4, 5)[::2], *rest)
    assert ops.launches() - before == 3
