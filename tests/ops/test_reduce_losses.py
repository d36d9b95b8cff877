"""Contract of ``reduce_losses``, on every backend that has it: against the margins' own formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import protomem_kernels as pmk
from protomem_kernels import ops
from tests.ops.cases import each_fusing_backend

MARGINS = [pmk.ArcFace(0.5), pmk.ArcFace(2.0), pmk.ArcFace(0.5, straight_through=True), pmk.CosFace(0.35)]
CAPACITY = 9


def called(backend: str, *args: object) -> Tensor:
    with pmk.use_backend(backend):
        return ops.reduce_losses(*args)  # type: ignore[arg-type]


def written_out(
    margin: pmk.ArcFace | pmk.CosFace, c: Tensor, n: Tensor, targets: Tensor, s: float, mean: bool
) -> Tensor:
    """Return the loss by the margin's own map and PyTorch's softplus."""
    counts = (targets >= 0) & (targets < CAPACITY)
    losses = torch.nn.functional.softplus(n - s * margin(c, torch.ones_like(c)), threshold=50.0)
    total = torch.where(counts, losses, 0).sum()
    return total / counts.sum().clamp(min=1) if mean else total


@each_fusing_backend
@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("margin", MARGINS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("batch", [0, 1, 700])
def test_loss_and_gradients(
    backend: str, batch: int, dtype: torch.dtype, margin: pmk.ArcFace | pmk.CosFace, mean: bool
) -> None:
    """The batch is more than a block of samples; sample 0 has no negatives."""
    g = torch.Generator().manual_seed(batch)
    c = (0.999 * (2 * torch.rand(batch, generator=g, dtype=torch.float64) - 1)).to(dtype)
    n = (20 * torch.randn(batch, generator=g, dtype=torch.float64)).to(dtype)
    n[:1] = float("-inf")
    targets = torch.randint(-2, CAPACITY + 2, (batch,), generator=g)
    results = []
    for kind in (dtype, torch.float64):
        a, b = c.to(kind).requires_grad_(), n.to(kind).requires_grad_()
        if kind == dtype and not results:
            form = margin.kernel_form()
            assert form is not None
            loss = called(backend, a, b, targets, CAPACITY, *form, 16.0, mean)
        else:
            loss = written_out(margin, a, b, targets, 16.0, mean)
        results.append((loss, *torch.autograd.grad(3 * loss, (a, b))))
    close = 1e-10 if dtype == torch.float64 else 3e-5
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), truth.double(), rtol=close, atol=close)


@each_fusing_backend
def test_at_the_poles_and_far_out(backend: str) -> None:
    """A cosine of 1 has a finite slope; a loss near 0 keeps its digits, and a large one is not infinite."""
    c = torch.tensor([1.0, -1.0, 0.0, 0.0], requires_grad=True)
    n = torch.tensor([0.0, 0.0, -30.0, 3e4], requires_grad=True)
    for number, expected in ((2, 2.0**-0 * 9.357623e-14), (3, 3e4)):
        one = torch.full((4,), -1)
        one[number] = 0
        loss = called(backend, c, n, one, 1, "cosine", 0.0, 1.0, False)
        assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss = called(backend, c, n, torch.zeros(4, dtype=torch.int64), 1, "angle", 0.5, 64.0, True)
    grads = torch.autograd.grad(loss, (c, n))
    assert all(grad.isfinite().all() for grad in grads)


@each_fusing_backend
def test_a_broken_sample_is_told_unless_it_is_ignored(backend: str) -> None:
    c, n = torch.tensor([float("nan"), 0.5]), torch.tensor([0.0, 0.0])
    assert called(backend, c, n, torch.tensor([0, 0]), 1, "angle", 0.5, 8.0, True).isnan()
    assert called(backend, c, n, torch.tensor([-1, 0]), 1, "angle", 0.5, 8.0, True).isfinite()
