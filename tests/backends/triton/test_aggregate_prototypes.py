"""What is particular to the Triton kernels of ``aggregate_prototypes``: launches, loops, wild values.

Everything here is compared with the reference, bits apart. Blocks are made small, so that the interpreter meets several
of each and a tail within a few rows.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from protomem_kernels.backends import reference, triton
from protomem_kernels.backends.triton import launch
from protomem_kernels.backends.triton.launch import Launch
from tests.backends.triton.launches import ALLOCATIONS, Launches
from tests.ops.cases import strided

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not triton.interpreted(), reason="runs in Triton's interpreter (TRITON_INTERPRET=1)"),
]
LAST = 2**63 - 1
SMALL = {"order of labels": Launch(rows=4, slots=8), "samples": Launch(rows=2, slots=8)}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "choose", lambda kind, *_: SMALL[kind])


def batch(size: int, dim: int, people: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return embeddings, labels of which some are negative and some huge, and weights of which some are zero."""
    g = torch.Generator().manual_seed(size + dim)
    labels = torch.randint(-2, people, (size,), generator=g)
    weights = torch.rand(size, generator=g) * (torch.rand(size, generator=g) < 0.7)
    return torch.randn(size, dim, generator=g).to(dtype), torch.where(labels == 3, LAST, labels), weights


def test_aggregate_takes_two_launches_and_reads_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    e, labels, weights = batch(21, 5, 6)
    with Launches(monkeypatch) as seen:
        outputs = triton.BACKEND.kernels["aggregate_prototypes"](e, labels, weights, True, 21)
    assert len(seen.kernels) == 2
    assert seen.operators <= ALLOCATIONS
    prototypes, _, index, mass, norm = outputs
    seen.kernels.clear()
    with seen:
        triton.BACKEND.kernels["aggregate_prototypes_backward"](
            prototypes, mass, e, weights, index, prototypes, mass, norm, True
        )
    assert len(seen.kernels) == 1
    assert seen.operators <= ALLOCATIONS
    with seen:  # the instrument notices the one documented read-back
        triton.BACKEND.kernels["aggregate_prototypes"](e, labels, weights, True, None)
    assert "_local_scalar_dense" in seen.operators


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("size", "dim", "people", "rows"), [(45, 9, 14, 45), (17, 3, 4, 2), (3, 1, 9, 20), (8, 2, 1, 8)]
)
@pytest.mark.parametrize("normalize", [True, False])
def test_aggregate_in_small_blocks(
    dtype: torch.dtype, size: int, dim: int, people: int, rows: int, normalize: bool
) -> None:
    e, labels, weights = batch(size, dim, people, dtype)
    ours, theirs = (
        kernels["aggregate_prototypes"](strided(e), strided(labels), strided(weights), normalize, rows)
        for kernels in (triton.BACKEND.kernels, reference.BACKEND.kernels)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    prototypes, _, index, mass, norm = theirs
    upstream = torch.randn(rows, dim, dtype=prototypes.dtype), torch.randn(1, dtype=mass.dtype).expand(rows)
    for given in (strided(weights.to(dtype)), None):
        ours, theirs = (
            kernels["aggregate_prototypes_backward"](
                strided(upstream[0]), upstream[1], strided(e), given, strided(index), strided(prototypes),
                strided(mass), strided(norm), normalize
            )
            for kernels in (triton.BACKEND.kernels, reference.BACKEND.kernels)
        )  # fmt: skip
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype
            near = max(4 * torch.finfo(a.dtype).eps, 1e-12 if dtype == torch.float64 else 1e-5)
            torch.testing.assert_close(a, b, rtol=near, atol=near)


def test_aggregate_meets_wild_values() -> None:
    """What a GPU meets without PROTOMEM_DEBUG=1: bad weights count as 0, identities past the rows get no row."""
    e, labels = torch.randn(6, 3), torch.tensor([8, 3, 5, 3, 9, 8])
    weights = torch.tensor([float("nan"), -3.0, 1.0, 2.0, float("inf"), -float("inf")])
    made = [
        kernels["aggregate_prototypes"](e, labels, weights, True, 3)
        for kernels in (triton.BACKEND.kernels, reference.BACKEND.kernels)
    ]
    for ours, expected in zip(*made, strict=True):
        torch.testing.assert_close(ours, expected)
    assert made[0][2].tolist() == [2, 0, 1, 0, -1, 2]
    assert made[0][3].tolist() == [2, 1, 0]
    prototypes, _, index, mass, norm = made[0]
    wild = torch.where(index < 0, 2**40, index)
    wild[5] = -(2**40)
    grads = [
        triton.BACKEND.kernels["aggregate_prototypes_backward"](
            torch.ones(3, 3), torch.ones(3), e, weights, given, prototypes, mass, norm, True
        )
        for given in (wild, torch.where(wild.abs() < 3, wild, -1))
    ]
    for ours, expected in zip(*grads, strict=True):
        assert torch.equal(ours, expected)
        assert torch.isfinite(ours).all()
