"""The host's share of a step: how many operations a GPU would be handed, and that few do what many did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import protomem_kernels as pmk
from protomem_kernels.backends import triton

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not triton.interpreted(), reason="Triton's interpreter stands in for a GPU: TRITON_INTERPRET=1"),
]
D, M = 8, 12
MARGINS = [pmk.ArcFace(0.5), pmk.ArcFace(0.5, straight_through=True), pmk.CosFace(0.35)]


class Counting(TorchDispatchMode):
    """Notes every operation that is handed to a device."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


def batches() -> list[tuple[Tensor, Tensor]]:
    """Return a life of a memory, identities in pairs: new and known ones, more than fit, a zero row, some unlabelled.

    No image is its own prototype, where a gradient would be decided by rounding.
    """
    g = torch.Generator().manual_seed(0)
    found = [(torch.randn(8, D, generator=g), torch.randint(0, 20, (4,), generator=g).repeat(2)) for _ in range(4)]
    found[1][1][[2, 6]] = -1
    found[2][0][0] = 0
    found[2][1][[0, 1, 4, 5]] = 3
    return found


def run(backend: str, margin: pmk.ArcFace | pmk.CosFace, **options: Any) -> list[Tensor]:
    """Return the losses and embeddings' gradients of a few steps, and the memory after them."""
    loss_fn = pmk.PrototypeMemoryLoss(D, M, margin=margin, scale=16.0, **options)
    results = []
    with pmk.use_backend(backend):
        for embeddings, labels in batches():
            x = embeddings.clone().requires_grad_()
            loss = loss_fn(x, labels)
            (2 * loss).backward()
            results += [loss.detach(), x.grad]
    return [*results, *loss_fn.memory.state]


@pytest.mark.parametrize("backend", ["triton", "chunked"])
def test_a_step_hands_over_fewer_than_forty_operations(backend: str) -> None:
    loss_fn = pmk.PrototypeMemoryLoss(D, M)
    (embeddings, labels), *_ = batches()
    with pmk.use_backend(backend):
        loss_fn(embeddings, labels)
        x = embeddings.clone().requires_grad_()
        with Counting() as counted:
            loss_fn(x, labels).backward()
    assert len(counted.calls) < 40, counted.calls
    assert sum(call.startswith("protomem.") for call in counted.calls) >= 5


@pytest.mark.parametrize("margin", MARGINS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_few_launches_say_what_many_do(margin: pmk.ArcFace | pmk.CosFace, reduction: str) -> None:
    for few, many in zip(
        run("triton", margin, reduction=reduction), run("reference", margin, reduction=reduction), strict=True
    ):
        torch.testing.assert_close(few, many, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_few_launches_in_other_dtypes(dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    results = []
    for backend in ("triton", "reference"):
        loss_fn = pmk.PrototypeMemoryLoss(D, M, scale=16.0, dtype=wide)
        (embeddings, labels), *_ = batches()
        x = embeddings.to(dtype).requires_grad_()
        with pmk.use_backend(backend):
            loss = loss_fn(x, labels)
            loss.backward()
        results.append((loss.detach(), x.grad))
    assert results[0][1].dtype == dtype
    close = {torch.float64: 1e-9, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for few, many in zip(*results, strict=True):
        torch.testing.assert_close(few, many, rtol=close, atol=close)


def test_a_broken_embedding_is_told_and_hurts_only_itself() -> None:
    (embeddings, labels), *_ = batches()
    embeddings[2, 1] = float("nan")
    labels = torch.arange(8)
    x = embeddings.requires_grad_()
    with pmk.use_backend("triton"):
        loss = pmk.PrototypeMemoryLoss(D, M)(x, labels)
        loss.backward()
    assert loss.isnan()
    assert x.grad[2].isnan().all()
    assert x.grad[[0, 1, 3, 4, 5, 6, 7]].isfinite().all()


def test_a_margin_of_ones_own_is_asked_as_ever() -> None:
    class Twice(pmk.ArcFace):
        pass

    assert Twice(0.5).kernel_form() is None
    assert pmk.MagFace().kernel_form() is None
    assert pmk.ElasticFace().kernel_form() is None
    assert pmk.ArcFace(0.5).kernel_form() == ("angle", 0.5)


def test_a_prototype_that_is_the_embedding_has_a_finite_gradient() -> None:
    x = torch.eye(3, D).requires_grad_()
    with pmk.use_backend("triton"):
        pmk.PrototypeMemoryLoss(D, M, refresh_ratio=1.0)(x, torch.arange(3)).backward()
    assert x.grad.isfinite().all()


def test_a_gradient_of_the_gradient_raises() -> None:
    (x, labels), *_ = batches()
    x.requires_grad_()
    with pmk.use_backend("triton"):
        loss = pmk.PrototypeMemoryLoss(D, M)(x, labels)
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        grad.sum().backward()
