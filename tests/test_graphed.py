"""``graphed``, as far as it is seen without a GPU: in place of a graph, a recorder runs the step at each replay."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import protomem_kernels as pmk

B, D, M = 6, 4, 10
MODULE = sys.modules["protomem_kernels.graphed"]  # whose function bears its name in the package


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a CPU do: capturing runs nothing, replaying runs the step and writes its results where they lie."""

    def captured(step: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        places: list[Tensor] = []

        class Results(tuple):  # filled by the first replay, as a graph's memory is
            def __iter__(self) -> Any:
                return iter(places)

        def replay() -> None:
            made = step()
            if not places:
                places.extend(tensor.clone() for tensor in made)
            for place, tensor in zip(places, made, strict=True):
                place.copy_(tensor)

        return replay, Results()

    monkeypatch.setattr(MODULE, "_captured", captured)
    monkeypatch.setattr(MODULE, "_check_place", lambda example: None)


def batches(steps: int = 4) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(B, D, generator=g), torch.randint(0, 12, (B,), generator=g)) for _ in range(steps)]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_steps_are_those_of_the_head(recorder: None, reduction: str) -> None:
    heads = [pmk.PrototypeMemoryLoss(D, M, scale=8.0, reduction=reduction) for _ in range(2)]
    step = pmk.graphed(heads[0], batches()[0])
    assert len(heads[0].memory) == 0  # capturing moves nothing
    assert int(heads[0].memory.clock) == 0
    for embeddings, labels in batches():
        results = []
        for call in (step, heads[1]):
            x = embeddings.clone().requires_grad_()
            loss = call(x, labels)
            (3 * loss).backward()
            results.append((loss.detach(), x.grad))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(heads[0].memory.state, heads[1].memory.state, strict=True):
        assert torch.equal(ours, theirs)


def test_a_loss_and_its_gradient_outlive_the_next_step(recorder: None) -> None:
    (first, labels), (second, others), *_ = batches()
    head = pmk.PrototypeMemoryLoss(D, M, scale=8.0)
    step = pmk.graphed(head, (first, labels))
    x = first.clone().requires_grad_()
    loss = step(x, labels)
    value = loss.item()
    step(second, others)
    loss.backward()
    y = first.clone().requires_grad_()
    pmk.PrototypeMemoryLoss(D, M, scale=8.0)(y, labels).backward()
    assert loss.item() == value
    torch.testing.assert_close(x.grad, y.grad)


def test_parameters_of_the_head_get_their_gradients(recorder: None) -> None:
    torch.manual_seed(0)
    head = pmk.MarginSoftmaxLoss(12, D, scale=8.0)
    embeddings, labels = batches()[0]
    step = pmk.graphed(head, (embeddings, labels))
    assert head.weight.grad is None
    step(embeddings, labels).backward()
    ours = head.weight.grad.clone()
    head.weight.grad = None
    head(embeddings, labels).backward()
    torch.testing.assert_close(ours, head.weight.grad)


def test_the_gradient_of_a_gradient_raises(recorder: None) -> None:
    embeddings, labels = batches()[0]
    x = embeddings.requires_grad_()
    loss = pmk.graphed(pmk.PrototypeMemoryLoss(D, M), (x, labels))(x, labels)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="graphed can be differentiated once"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            lambda e, y: (e[:5], y),
            r"embeddings must be like the example's, .*\(6, 4\) on cpu, got .*\(5, 4\)",
        ),
        (lambda e, y: (e, y.int()), "labels must be like the example's, torch.int64"),
        (lambda e, y: (e, y, torch.ones(B)), "weights must be given just as in the example: it had 2 tensors, got 3"),
    ],
)
def test_a_batch_unlike_the_example_is_refused(recorder: None, batch: Any, message: str) -> None:
    embeddings, labels = batches()[0]
    head = pmk.PrototypeMemoryLoss(D, M)
    step = pmk.graphed(head, (embeddings, labels))
    with pytest.raises(ValueError, match=message):
        step(*batch(embeddings, labels))
    assert len(head.memory) == 0


@pytest.mark.parametrize(
    ("error", "message", "head", "example"),
    [
        (TypeError, "loss_fn must be a PrototypeMemoryLoss", torch.nn.Linear(2, 2), batches()[0]),
        (TypeError, "example must be", pmk.PrototypeMemoryLoss(D, M), (1, 2)),
        (TypeError, "example must be", pmk.PrototypeMemoryLoss(D, M), batches()[0][:1]),
        (ValueError, "reduction 'mean' or 'sum'", pmk.PrototypeMemoryLoss(D, M, reduction="none"), batches()[0]),
        (ValueError, "training mode", pmk.PrototypeMemoryLoss(D, M).eval(), batches()[0]),
        (ValueError, "example must lie on a GPU, .* got cpu, cpu", pmk.PrototypeMemoryLoss(D, M), batches()[0]),
    ],
)
def test_bad_input(error: type[Exception], message: str, head: Any, example: Any) -> None:
    with pytest.raises(error, match=message):
        pmk.graphed(head, example)
