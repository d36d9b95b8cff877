"""The CUDA kernels of ``hardest_negatives``, run on the CPU, against the reference."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from tests.backends.cuda import operators
from tests.backends.cuda.test_negative_logsumexp import each_dtype
from tests.ops.cases import assert_as_close_as, strided, unit

reference = importlib.import_module("protomem_kernels.backends.reference.hardest_negatives")  # hidden by the function


def make(shape: tuple[int, int, int], dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x, prototypes, targets and occupied, with NaN in empty slots, equal prototypes and a broken embedding."""
    batch, capacity, dim = shape
    generator = torch.Generator().manual_seed(seed)
    x, prototypes = (unit(torch.randn(n, dim, generator=generator)) for n in (batch, capacity))
    targets = torch.randint(-2, capacity + 2, (batch,), generator=generator)
    occupied = torch.rand(capacity, generator=generator) < 0.8
    if capacity > 200:
        prototypes[150:200] = prototypes[:50]  # ties, in two groups of 128
        occupied[128:] &= torch.arange(128, capacity) % 300 > 20
    prototypes[~occupied] = float("nan")
    if batch > 4:
        x[3, 0] = float("inf")
        x[4] = 0
    return x, prototypes.to(dtype), targets, occupied


def check(
    ops: operators.Operators, case: tuple[Tensor, Tensor, Tensor, Tensor | None], k: int, normalize: bool
) -> None:
    x, prototypes, targets, occupied = case
    dtype = prototypes.dtype
    cosines, slots = ops.kernels["hardest_negatives"](x, prototypes, targets, occupied, k, normalize)
    truth = reference.hardest_negatives(x.double(), prototypes.double(), targets, occupied, k, normalize)
    peer = reference.hardest_negatives(x, prototypes.float(), targets, occupied, k, normalize)
    sound = x.isfinite().all(dim=1)
    assert torch.equal(slots, truth[1])
    assert cosines[~sound].isnan().all()
    assert_as_close_as(cosines[sound], peer[0][sound], truth[0][sound])

    grad = torch.randn(cosines.shape, generator=torch.Generator().manual_seed(7))
    grad[slots < 0] = float("nan")  # must not be looked at
    arguments = (x, prototypes, slots, normalize, True)
    grad_x, grad_w = ops.kernels["hardest_negatives_backward"](grad, *arguments)
    wide = reference.hardest_negatives_backward(grad.double(), x.double(), prototypes.double(), slots, normalize, True)
    peer = reference.hardest_negatives_backward(grad, x, prototypes.float(), slots, normalize, True)
    assert_as_close_as(grad_x, peer[0], wide[0])
    rounding = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert_as_close_as(grad_w, peer[1], wide[1], tiny=rounding)
    assert ops.kernels["hardest_negatives_backward"](grad, *arguments[:-1], False)[1].shape == (0, 0)


@each_dtype
@pytest.mark.parametrize(
    ("shape", "k"),
    [((1, 1, 1), 1), ((3, 5, 4), 9), ((3, 0, 4), 2), ((6, 700, 33), 2), ((35, 900, 128), 3), ((6, 700, 512), 5)],
    ids=str,
)
def test_against_the_reference(
    ops: operators.Operators, shape: tuple[int, int, int], k: int, dtype: torch.dtype
) -> None:
    check(ops, make(shape, dtype, seed=1), k, normalize=False)


@each_dtype
def test_scaled_to_unit_length_and_any_strides(ops: operators.Operators, dtype: torch.dtype) -> None:
    x, prototypes, targets, occupied = make((6, 600, 40), dtype, seed=2)
    prototypes = (prototypes.float() * torch.linspace(0, 3, len(prototypes))[:, None]).to(dtype)
    check(ops, (x, prototypes, targets, occupied), 2, normalize=True)
    spread = occupied.repeat_interleave(2)[::2]
    check(ops, (strided(x), strided(prototypes), strided(targets.int()), spread), 4, normalize=True)


def test_nothing_to_do(ops: operators.Operators) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    cosines, slots = ops.kernels["hardest_negatives"](torch.zeros(0, 4), torch.zeros(5, 4), none, None, 3, False)
    assert cosines.shape == slots.shape == (0, 3)


def test_ties_go_to_the_lower_slot(ops: operators.Operators) -> None:
    x, targets = torch.eye(2, 8), torch.tensor([0, -1])
    prototypes = torch.eye(2, 8).repeat(300, 1)  # slots 0, 2, 4, ... equal the first sample
    cosines, slots = ops.kernels["hardest_negatives"](x, prototypes, targets, None, 3, False)
    assert slots.tolist() == [[2, 4, 6], [1, 3, 5]]
    assert cosines.tolist() == [[1.0] * 3] * 2
