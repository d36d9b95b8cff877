"""A trained classifier in a memory or a head, and back."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional

import protomem_kernels as pmk
from protomem_kernels.compat.insightface import ArcFace, PartialFC_V2

CLASSES, DIM = 9, 5


def classifier() -> torch.Tensor:
    return torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("of", ["memory", "loss"])
def test_a_memory_holds_the_classes_directions(of: str) -> None:
    loss_fn = pmk.PrototypeMemoryLoss(DIM, capacity=12)
    labels = torch.arange(CLASSES) * 1000 + 5
    pmk.warm_start(loss_fn if of == "loss" else loss_fn.memory, classifier(), labels)
    assert len(loss_fn.memory) == CLASSES
    torch.testing.assert_close(loss_fn.memory.prototypes_of(labels), functional.normalize(classifier()))
    assert torch.equal(loss_fn.memory.lookup(labels), torch.arange(CLASSES))
    loss_fn.memory.state.validate()


def test_a_memory_that_uses_some_of_its_slots_keeps_the_last_rows(caplog: pytest.LogCaptureFixture) -> None:
    memory = pmk.PrototypeMemory(capacity=12, embedding_dim=DIM)
    memory.use(4)
    with caplog.at_level(logging.WARNING):
        pmk.warm_start(memory, classifier())
    assert "9 rows for a memory of 4 slots" in caplog.text
    assert sorted(memory.identities[memory.occupied].tolist()) == [5, 6, 7, 8]
    last = torch.arange(5, CLASSES)
    torch.testing.assert_close(memory.prototypes_of(last), functional.normalize(classifier())[last])


def test_the_first_step_is_that_of_the_classifier() -> None:
    """A loss against the memory that is warm is the loss over the class weights that it comes from."""
    embeddings, labels = torch.randn(4, DIM), torch.tensor([0, 3, 8, 3])
    loss_fn = pmk.PrototypeMemoryLoss(DIM, capacity=CLASSES, scale=8.0).eval()
    pmk.warm_start(loss_fn, classifier())
    head = pmk.MarginSoftmaxLoss(CLASSES, DIM, scale=8.0)
    pmk.warm_start(head, classifier())
    torch.testing.assert_close(loss_fn(embeddings, labels), head(embeddings, labels))


def test_of_more_rows_than_slots_the_last_stay(caplog: pytest.LogCaptureFixture) -> None:
    memory = pmk.PrototypeMemory(4, DIM)
    with caplog.at_level(logging.WARNING):
        pmk.warm_start(memory, classifier())
    assert "9 rows for a memory of 4 slots" in caplog.text
    assert memory.lookup(torch.arange(CLASSES)).ge(0).tolist() == [False] * 5 + [True] * 4


def test_a_memory_becomes_a_classifier_and_unknown_classes_keep_their_weights() -> None:
    memory = pmk.PrototypeMemory(12, DIM)
    pmk.warm_start(memory, classifier()[[2, 7]], torch.tensor([2, 7]))
    head = PartialFC_V2(ArcFace(), DIM, CLASSES)
    before = head.weight.detach().clone()
    classes = torch.arange(CLASSES)
    pmk.warm_start(head, memory.prototypes_of(classes), classes)
    known = torch.isin(classes, torch.tensor([2, 7]))
    torch.testing.assert_close(head.weight[known], functional.normalize(classifier()[[2, 7]]))
    assert torch.equal(head.weight[~known], before[~known])
    assert head.weight.requires_grad


def test_rows_that_have_no_direction_are_passed_over() -> None:
    weight = classifier()
    weight[1], weight[4, 0] = 0, torch.nan
    memory, head = pmk.PrototypeMemory(12, DIM), pmk.MarginSoftmaxLoss(CLASSES, DIM)
    pmk.warm_start(memory, weight)
    pmk.warm_start(head, weight)
    assert (memory.lookup(torch.arange(CLASSES)) < 0).nonzero().flatten().tolist() == [1, 4]
    assert torch.isfinite(head.weight).all()


def test_what_cannot_be_taken_is_an_error() -> None:
    head = pmk.MarginSoftmaxLoss(CLASSES, DIM)
    with pytest.raises(ValueError, match=r"weight must have shape \(C, 5\), got \(9, 4\)"):
        pmk.warm_start(head, classifier()[:, :4])
    with pytest.raises(ValueError, match="labels must be below 9"):
        pmk.warm_start(head, classifier(), torch.arange(CLASSES) + 1)
    with pytest.raises(ValueError, match=r"labels must have shape \(9,\)"):
        pmk.warm_start(head, classifier(), torch.arange(3))
    with pytest.raises(TypeError, match=r"module must be .*got Linear"):
        pmk.warm_start(nn.Linear(2, 2), classifier())  # type: ignore[arg-type]
