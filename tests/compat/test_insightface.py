"""insightface's classes: the numbers that its own code gave, and what is not taken over of it."""

from __future__ import annotations

import json
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import protomem_kernels as pmk
from protomem_kernels.compat.insightface import ArcFace, CombinedMarginLoss, CosFace, PartialFC_V2
from tests.compat.insightface_loop import CASES, NUMBERS, train

CLASSES, DIM, BATCH = 23, 8, 6
ALONE = [name for name, (*_, ranks) in CASES.items() if ranks == 1]


@pytest.fixture
def in_float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", ALONE)
def test_ten_steps_of_training_are_insightfaces(name: str, in_float64: None) -> None:
    """Without a process group, which the original asks for; the sampled rows come from one state of the generator."""
    (truth,) = json.loads(NUMBERS.read_text())["cases"][name]
    found = train(PartialFC_V2, CombinedMarginLoss, name, average=lambda gradient: None)
    assert found["sampled"] == truth["sampled"]
    for what in ("losses", "encoder", "weight"):
        torch.testing.assert_close(torch.tensor(found[what]), torch.tensor(truth[what]), rtol=1e-9, atol=1e-9)


def test_negatives_by_given_indices(in_float64: None) -> None:
    """The same numbers whatever the generator of this PyTorch: the rows are handed in."""
    name = "cosface, sampled"
    (truth,) = json.loads(NUMBERS.read_text())["cases"][name]
    given = iter(truth["sampled"])

    class Given(PartialFC_V2):
        def sampled_classes(self, targets: Tensor) -> Tensor:
            self.weight_index = torch.tensor(next(given))
            return self.weight_index

    found = train(Given, CombinedMarginLoss, name, average=lambda gradient: None)
    torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(truth["losses"]), rtol=1e-9, atol=1e-9)


def test_more_classes_in_the_batch_than_the_sample_has() -> None:
    head = PartialFC_V2(ArcFace(), DIM, CLASSES, sample_rate=0.1)
    head(torch.randn(5, DIM), torch.tensor([1, 4, 9, 4, 22]))
    assert (head.num_sample, head.weight_index.tolist()) == (2, [1, 4, 9, 22])
    head(torch.randn(3, DIM), torch.tensor([7, 7, -1]))
    assert len(head.weight_index) == 2
    assert 7 in head.weight_index


def test_a_plain_margin_in_dense_logits() -> None:
    """The margin losses by themselves, on logits that somebody has; these stay as they are."""
    cosines = torch.tensor([[0.9, 0.1, 0.5], [-0.2, 0.3, 0.45], [0.1, 0.2, 0.3]])
    labels = torch.tensor([[0], [1], [-1]])
    kept = cosines.clone()
    arc = CombinedMarginLoss(64, 1.0, 0.5, 0.0)(cosines, labels)
    expected = cosines.clone()
    expected[0, 0], expected[1, 1] = math.cos(math.acos(0.9) + 0.5), math.cos(math.acos(0.3) + 0.5)
    torch.testing.assert_close(arc, 64 * expected)
    torch.testing.assert_close(ArcFace(64, 0.5)(cosines, labels[:, 0]), arc)
    filtered = CombinedMarginLoss(10, 1.0, 0.0, 0.4, 0.4)(cosines, labels)
    torch.testing.assert_close(
        filtered, torch.tensor([[5.0, 1.0, 0.0], [-2.0, -1.0, 0.0], [1.0, 2.0, 3.0]]), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(CosFace(10, 0.4)(cosines, labels)[1], torch.tensor([-2.0, -1.0, 4.5]))
    assert torch.equal(cosines, kept)


@pytest.mark.parametrize("gradient", ["straight_through", "exact"])
def test_both_gradients_of_arcface_by_name(gradient: str) -> None:
    head = PartialFC_V2(CombinedMarginLoss(8, 1.0, 0.5, 0.0, gradient=gradient), DIM, CLASSES)
    embeddings, labels = torch.randn(BATCH, DIM, requires_grad=True), torch.arange(BATCH)
    head(embeddings, labels).backward()
    cosines = functional.normalize(embeddings.detach().requires_grad_()) @ functional.normalize(head.weight.detach()).T
    with torch.no_grad():
        probability = functional.softmax(CombinedMarginLoss(8, 1.0, 0.5, 0.0)(cosines, labels), dim=1)
    target = cosines.detach()[torch.arange(BATCH), labels]
    slope = torch.ones(BATCH) if gradient == "straight_through" else (target.acos() + 0.5).sin() / target.acos().sin()
    upstream = 8 * probability / BATCH
    upstream[torch.arange(BATCH), labels] -= 8 / BATCH
    upstream[torch.arange(BATCH), labels] *= slope
    x = embeddings.detach().requires_grad_()
    (functional.normalize(x) @ functional.normalize(head.weight.detach()).T).backward(upstream)
    torch.testing.assert_close(embeddings.grad, x.grad, rtol=1e-4, atol=1e-5)


def test_insightfaces_own_margin_objects_are_read() -> None:
    class CombinedMarginLoss(nn.Module):  # as arcface_torch/losses.py names it
        s, m1, m2, m3, interclass_filtering_threshold = 32.0, 1.0, 0.0, 0.35, 0.5

    theirs = CombinedMarginLoss()
    head = PartialFC_V2(theirs, DIM, CLASSES)
    assert (head.margin, head.scale) == (pmk.CosFace(0.35), 32.0)
    assert head.mining == pmk.NoisyNegativeFilter(0.5)
    theirs.m3 = 0.2  # a schedule of the training script
    head(torch.randn(2, DIM), torch.tensor([0, 1]))
    assert head.margin == pmk.CosFace(0.2)


def test_states_are_the_originals() -> None:
    head = PartialFC_V2(CosFace(), DIM, CLASSES)
    assert {name: tuple(value.shape) for name, value in head.state_dict().items()} == {"weight": (CLASSES, DIM)}
    weight = torch.randn(CLASSES, DIM)
    head.load_state_dict({"weight": weight})
    assert torch.equal(head.weight, weight)
    assert (head.rank, head.world_size, head.num_local, head.class_start, head.fp16) == (0, 1, CLASSES, 0, False)


# What users of the original complain about


def test_batches_of_any_size_and_shape_of_labels() -> None:
    head = PartialFC_V2(ArcFace(), DIM, CLASSES)
    for size in (6, 6, 1, 3, 0):
        labels = torch.randint(CLASSES, (size, 1))
        before = labels.clone()
        assert torch.isfinite(head(torch.randn(size, DIM), labels))
        assert torch.equal(labels, before)


def test_a_loss_beyond_69_goes_on() -> None:
    """The original clamps the probability at 1e-30: its loss stands at 69.08, whatever the encoder does."""
    head = PartialFC_V2(ArcFace(64, 0.5), 2, 2)
    head.load_state_dict({"weight": torch.eye(2)})
    far, nearer = (head(torch.tensor([[1.0, side]]), torch.tensor([1])).item() for side in (0.0, 0.1))
    assert far > nearer > 69.08


def test_half_precision_at_a_cosine_of_one() -> None:
    for gradient in ("straight_through", "exact"):
        head = PartialFC_V2(ArcFace(gradient=gradient), DIM, CLASSES, fp16=True)
        embeddings = head.weight.detach()[:4].half().requires_grad_()
        loss = head(embeddings, torch.arange(4))
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(embeddings.grad).all()  # type: ignore[arg-type]


def test_ignored_labels_take_no_part_in_the_mean() -> None:
    head = PartialFC_V2(CosFace(), DIM, CLASSES)
    embeddings = torch.randn(4, DIM)
    some = head(embeddings, torch.tensor([2, -1, 3, -1]))
    torch.testing.assert_close(some, head(embeddings[[0, 2]], torch.tensor([2, 3])))


def test_what_cannot_be_taken_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"margin_loss must be CombinedMarginLoss.*got function"):
        PartialFC_V2(lambda logits, labels: logits, DIM, CLASSES)
    with pytest.raises(TypeError, match=r"margin_loss must be .*got CosFace"):  # the margin of that name here
        PartialFC_V2(pmk.CosFace(), DIM, CLASSES)
    with pytest.raises(ValueError, match="degrees"):
        CombinedMarginLoss(64, 1.0, 28.6, 0.0)
    with pytest.raises(ValueError, match="gradient must be"):
        ArcFace(gradient="none")
    with pytest.raises(ValueError, match="s must be"):
        CosFace(s=0)
    with pytest.warns(UserWarning, match="m2 = 0.5 out"):
        CombinedMarginLoss(64, 1.0, 0.5, 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CombinedMarginLoss(64, 2.0, 0.1, 0.0).margin_of_targets() == pmk.CombinedMargin(2.0, 0.1)
