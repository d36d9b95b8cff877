"""Contract of ``prepare_samples``, on every backend that has it: against rules written out sample by sample."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import protomem_kernels as pmk
from protomem_kernels import ops
from tests.ops.cases import each_dtype, each_fusing_backend, strided


def called(backend: str, *args: object) -> tuple[Tensor, Tensor, Tensor]:
    with pmk.use_backend(backend):
        return ops.prepare_samples(*args)  # type: ignore[arg-type]


@each_fusing_backend
@each_dtype
@pytest.mark.parametrize("shape", [(1, 1), (0, 3), (9, 5), (130, 33)], ids=str)
def test_targets_unit_rows_and_lengths(backend: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    (batch, dim), capacity = shape, 11
    g = torch.Generator().manual_seed(1)
    embeddings = strided((5 * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype))
    labels = torch.randint(-1, 4, (batch,), generator=g)
    index = strided(torch.randint(-1, 5, (batch,), generator=g))
    slots = torch.tensor([3, -1, 10, 0, 11])  # the last one is past the end
    embeddings[7:8] = 0
    x, norm, targets = called(backend, embeddings, labels.int(), index, slots, capacity)
    assert x.dtype == norm.dtype == torch.promote_types(dtype, torch.float32)
    close = 1e-12 if x.dtype == torch.float64 else 1e-6
    for i in range(batch):
        target = int(slots[index[i]]) if index[i] >= 0 else -1
        assert int(targets[i]) == target
        row = embeddings[i].double() if 0 <= target < capacity else torch.zeros(dim, dtype=torch.float64)
        length = row.norm()
        torch.testing.assert_close(norm[i].double(), length, rtol=close, atol=close)
        torch.testing.assert_close(x[i].double(), row / length.clamp(min=1e-30), rtol=close, atol=close)


@each_fusing_backend
def test_a_broken_embedding_with_a_label_and_no_slot_is_shown(backend: str) -> None:
    embeddings = torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0], [float("nan"), 1.0], [1.0, 1.0]])
    labels, index = torch.tensor([5, -1, 6, 7]), torch.tensor([1, 1, 0, 1])
    x, _, targets = called(backend, embeddings, labels, index, torch.tensor([2, -1]), 4)
    assert targets.tolist() == [0, -1, 2, -1]
    assert x.isnan().all(dim=1).tolist() == [True, False, True, False]
    assert x[[1, 3]].eq(0).all()


@each_fusing_backend
def test_lengths_far_from_one(backend: str) -> None:
    embeddings = torch.tensor([[3e30, 4e30], [3e-30, 4e-30]])
    x, norm, _ = called(backend, embeddings, torch.tensor([1, 1]), torch.tensor([0, 0]), torch.tensor([0]), 1)
    torch.testing.assert_close(x, torch.tensor([[0.6, 0.8]] * 2))
    torch.testing.assert_close(norm, torch.tensor([5e30, 5e-30]))


@each_fusing_backend
def test_gradcheck(backend: str) -> None:
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    rest = torch.arange(4), torch.tensor([0, 1, -1, 1]), torch.tensor([2, 0]), 3
    assert torch.autograd.gradcheck(lambda e: called(backend, e, *rest)[0], x)
