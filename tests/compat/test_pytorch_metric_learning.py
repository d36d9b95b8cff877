"""Ours beside the real pytorch-metric-learning: losses, gradients, states, a training loop whose import is swapped."""

from __future__ import annotations

import copy
import io
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

original = pytest.importorskip("pytorch_metric_learning.losses")

from pytorch_metric_learning import distances, miners, reducers, regularizers, samplers  # noqa: E402

from protomem_kernels.compat import pytorch_metric_learning as ours  # noqa: E402

CLASSES, DIM, BATCH = 37, 12, 20
NAMES = ("ArcFaceLoss", "CosFaceLoss")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
LOOP_LABELS = torch.arange(6).repeat_interleave(10)


def batch(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(8, (BATCH,), generator=generator) * 4
    return torch.randn(BATCH, DIM, generator=generator, dtype=dtype), labels


def made(module: ModuleType, name: str, **options: Any) -> Any:
    torch.manual_seed(3)
    return getattr(module, name)(CLASSES, DIM, **options)


def loss_and_gradients(head: Any, embeddings: Tensor, *args: Any) -> list[Tensor]:
    embeddings = embeddings.clone().requires_grad_()
    loss = head(embeddings, *args)
    loss.sum().backward()
    return [loss.detach(), embeddings.grad, head.W.grad]  # type: ignore[list-item]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 10.0},
        {"reducer": reducers.AvgNonZeroReducer()},
        {"reducer": reducers.DoNothingReducer(), "collect": lambda loss: loss["loss"]["losses"]},
        {"embedding_regularizer": regularizers.LpRegularizer(), "embedding_reg_weight": 0.3},
        {"weight_regularizer": regularizers.RegularFaceRegularizer(), "weight_reg_weight": 0.5},
        {"weight_init_func": nn.init.xavier_normal_},
    ],
    ids=lambda options: next(iter(options), "default"),
)
def test_losses_and_gradients_are_the_originals(name: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    options = dict(options)
    collect = options.pop("collect", lambda loss: loss)
    embeddings, labels = batch(dtype)
    results = []
    for module in (original, ours):
        head = made(module, name, **options)
        embedded = embeddings.clone().requires_grad_()
        loss = collect(head(embedded, labels))
        loss.sum().backward()
        results.append([loss.detach(), embedded.grad, head.W.grad.to(dtype)])
    for theirs, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "miner", [miners.MultiSimilarityMiner(), miners.TripletMarginMiner(margin=0.5), miners.BatchHardMiner()], ids=str
)
def test_miners_weigh_the_losses_as_in_the_original(name: str, miner: Any) -> None:
    embeddings, labels = batch()
    found = miner(embeddings, labels)
    assert any(len(part) for part in found)
    theirs = loss_and_gradients(made(original, name), embeddings, labels, found)
    mine = loss_and_gradients(made(ours, name), embeddings, labels, found)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_states_go_both_ways(name: str) -> None:
    theirs, mine = made(original, name), made(ours, name)
    torch.testing.assert_close(mine.W, theirs.W, rtol=0, atol=0)  # one seed, one W
    for source, target in ((theirs, mine), (mine, theirs)):
        nn.init.normal_(source.W)
        target.load_state_dict(source.state_dict())
        assert torch.equal(source.W, target.W)
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    assert mine.margin == theirs.margin


def test_classes_stay_contiguous_through_copies_loads_and_steps() -> None:
    head = made(ours, "ArcFaceLoss")
    head.load_state_dict(made(original, "ArcFaceLoss").state_dict())
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1)
    head(*batch()).backward()
    optimizer.step()
    kept = [head.W, head.W.grad, copy.deepcopy(head).W, head.double().W, *optimizer.state[head.W].values()]
    assert all(tensor.t().is_contiguous() for tensor in kept if tensor.ndim == 2)


def test_recorded_statistics_and_logits_are_there() -> None:
    embeddings, labels = batch()
    theirs, mine = (made(module, "ArcFaceLoss", collect_stats=True) for module in (original, ours))
    theirs(embeddings, labels), mine(embeddings, labels)
    assert mine.avg_angle == pytest.approx(theirs.avg_angle, abs=1e-3)
    torch.testing.assert_close(mine.get_logits(embeddings), theirs.get_logits(embeddings), **CLOSE)


def test_where_the_original_is_not_a_number_ours_is_finite() -> None:
    """An embedding that lies on its class's weights: arccos has no derivative there."""
    labels = torch.arange(4)
    found = []
    for module in (original, ours):
        head = made(module, "ArcFaceLoss")
        embeddings = nn.functional.normalize(head.W.detach().t()[:4]).requires_grad_()
        head.W.data = nn.functional.normalize(head.W.data, dim=0)
        head(embeddings, labels).backward()
        found.append(bool(torch.isfinite(embeddings.grad).all()))  # type: ignore[arg-type]
    assert found == [False, True]


def test_half_precision_embeddings_leave_the_weights_their_dtype() -> None:
    embeddings, labels = batch()
    head = made(ours, "ArcFaceLoss")
    loss = head(embeddings.bfloat16(), labels)
    assert (head.W.dtype, loss.dtype) == (torch.float32, torch.float32)
    assert made(original, "ArcFaceLoss")(embeddings.bfloat16(), labels).dtype == torch.bfloat16


def test_what_cannot_be_taken_is_an_error() -> None:
    embeddings, labels = batch()
    with pytest.raises(ValueError, match=r"distance must be CosineSimilarity.*got p=2, power=2"):
        made(ours, "ArcFaceLoss", distance=distances.CosineSimilarity(power=2))
    with pytest.raises(Exception, match="CosineSimilarity"):
        made(ours, "CosFaceLoss", distance=distances.LpDistance())
    head = made(ours, "ArcFaceLoss")
    with pytest.raises(ValueError, match="ref_emb is not supported"):
        head(embeddings, labels, ref_emb=embeddings.clone(), ref_labels=labels)
    with pytest.raises(ValueError, match="labels are required"):
        head(embeddings)
    with pytest.raises(ValueError, match=rf"targets must .*{CLASSES}"):
        head(embeddings, labels + CLASSES)


def train(losses: ModuleType, order: Tensor) -> tuple[list[float], Any]:
    """A loop as pytorch-metric-learning's examples have it; ``losses`` is all that changes."""
    torch.manual_seed(0)
    labels = LOOP_LABELS
    images = torch.randn(6, 16)[labels] + 0.3 * torch.randn(60, 16)
    encoder = nn.Linear(16, DIM)
    loss_func = losses.ArcFaceLoss(num_classes=6, embedding_size=DIM, scale=16)
    mining_func = miners.MultiSimilarityMiner()
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.3)
    loss_optimizer = torch.optim.SGD(loss_func.parameters(), lr=0.3, momentum=0.9)
    seen = []
    for at in order.split(12):
        optimizer.zero_grad()
        loss_optimizer.zero_grad()
        embeddings = encoder(images[at])
        loss = loss_func(embeddings, labels[at], mining_func(embeddings, labels[at]))
        loss.backward()
        optimizer.step()
        loss_optimizer.step()
        seen.append(loss.item())
    return seen, loss_func.W.detach()


def test_a_training_loop_runs_with_the_import_swapped() -> None:
    sampler = samplers.MPerClassSampler(LOOP_LABELS, m=4, batch_size=12, length_before_new_iter=96)
    order = torch.tensor([int(index) for index in sampler])
    theirs, their_weights = train(original, order)
    mine, weights = train(ours, order)
    assert theirs[-1] < theirs[0]
    assert mine == pytest.approx(theirs, abs=1e-4)
    torch.testing.assert_close(weights, their_weights, rtol=1e-4, atol=1e-4)


def fill(memory: Any, steps: range, encoder: Any) -> list[float]:
    return [memory(encoder(batch(seed=step)[0]), batch(seed=step)[1]).item() for step in steps]


def crossed(module: ModuleType) -> Any:
    return module.CrossBatchMemory(original.ContrastiveLoss(), DIM, memory_size=50, miner=miners.MultiSimilarityMiner())


@pytest.mark.parametrize("steps", [1, 2, 4], ids=lambda steps: f"after {steps} steps")  # half full, nearly, overwritten
def test_the_cross_batch_memory_comes_back_on_resume(steps: int) -> None:
    encoder = nn.Linear(DIM, DIM).requires_grad_(False)
    kept, theirs = crossed(ours), crossed(original)
    assert fill(kept, range(steps), encoder) == fill(theirs, range(steps), encoder)
    file = io.BytesIO()
    torch.save(nn.ModuleDict({"xbm": kept}).state_dict(), file)
    file.seek(0)
    resumed, forgetful = nn.ModuleDict({"xbm": crossed(ours)}), nn.ModuleDict({"xbm": crossed(original)})
    state = torch.load(file)
    resumed.load_state_dict(state)
    forgetful.load_state_dict(state)  # the keys are the original's
    goes_on = fill(kept, range(steps, 6), encoder)
    assert fill(resumed["xbm"], range(steps, 6), encoder) == goes_on
    assert fill(forgetful["xbm"], range(steps, 6), encoder) != goes_on  # what is mended here

    from_theirs = crossed(ours)
    from_theirs.load_state_dict(theirs.state_dict())  # and no place of the queue in it
    assert from_theirs.has_been_filled == theirs.has_been_filled
    assert from_theirs.has_been_filled or from_theirs.queue_idx == theirs.queue_idx
