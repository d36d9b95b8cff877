"""What ``health`` tells, against the same figures by hand; watching changes no step."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import protomem_kernels as pmk

DIM = 6


def batch(step: int, identities: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(-1, identities, (8,), generator=generator)
    return torch.randn(8, DIM, generator=generator), labels


def test_an_empty_memory_has_nothing_to_tell() -> None:
    health = pmk.PrototypeMemoryLoss(DIM, 10).health()
    assert (health.occupancy, health.identities, health.age_histogram, health.largest_age) == (0.0, 0, (), 0)
    assert math.isnan(health.mean_age)
    assert math.isnan(health.target_cosine)
    assert set(health.figures()) == {"occupancy", "identities", "largest_age"}


def test_ages_are_counted_in_powers_of_two() -> None:
    loss_fn = pmk.PrototypeMemoryLoss(1, 100)
    for step in range(18):
        loss_fn(torch.ones(1, 1), torch.tensor([step]))
    health = loss_fn.health()
    assert health.age_histogram == (1, 1, 2, 4, 8, 2)  # 0, 1, 2-3, 4-7, 8-15, 16-17
    assert (health.largest_age, health.mean_age, health.occupancy) == (17, 8.5, 0.18)


@pytest.mark.parametrize("prototype_gradient", ["none", "fresh", "memory"])
def test_the_watched_step_by_hand(prototype_gradient: str) -> None:
    loss_fn = pmk.PrototypeMemoryLoss(DIM, 10, prototype_gradient=prototype_gradient)
    if prototype_gradient == "memory":
        loss_fn.attach_optimizer(torch.optim.SGD(loss_fn.parameters(), lr=0.1))
    loss_fn(*batch(0))
    before = copy.deepcopy(loss_fn.memory)
    loss_fn.watch()
    embeddings, labels = batch(1)
    _, stats = loss_fn(embeddings, labels, return_stats=True)
    health = loss_fn.health()
    known = labels[labels >= 0].unique()
    known = known[before.lookup(known) >= 0]
    assert len(known) > 1
    drift = 1 - torch.cosine_similarity(before.prototypes_of(known), loss_fn.memory.prototypes_of(known))
    assert health.refresh_drift == pytest.approx(float(drift.mean()), abs=1e-6)
    counts = labels >= 0
    assert not counts.all()
    assert health.target_cosine == pytest.approx(float(stats.target_cosine[counts].mean()), abs=1e-6)
    assert health.hardest_cosine == pytest.approx(float(stats.hardest_cosine[counts].mean()), abs=1e-6)
    hard = (stats.hardest_cosine > stats.target_cosine)[counts].double().mean()
    assert health.hard_negatives == pytest.approx(float(hard))
    norm = embeddings[counts].norm(dim=1)
    assert health.embedding_norm == pytest.approx(float(norm.mean()), abs=1e-5)
    assert health.embedding_norm_std == pytest.approx(float(norm.std(correction=0)), abs=1e-5)


def test_watching_changes_no_step_and_ends_by_itself() -> None:
    watched, plain = (pmk.PrototypeMemoryLoss(DIM, 5) for _ in range(2))
    seen = []
    for step in range(4):
        if step != 2:
            watched.watch()
        losses = [loss_fn(*batch(step)) for loss_fn in (watched, plain)]
        assert torch.equal(*losses)
        seen.append(watched.health().target_cosine)
    assert seen[1] == seen[2]
    assert len(set(seen)) == 3
    assert all(map(torch.equal, watched.memory.state, plain.memory.state))
    assert math.isnan(plain.health().target_cosine)


def test_tensorboard_gets_the_figures_and_the_ages() -> None:
    written = {}

    class Writer:
        def add_scalar(self, name: str, value: float, step: int) -> None:
            written[name] = (value, step)

        def add_histogram_raw(self, name: str, **raw: object) -> None:
            written[name] = raw

    loss_fn = pmk.PrototypeMemoryLoss(DIM, 10)
    for step in range(4):
        loss_fn.watch()
        loss_fn(*batch(step))
    health = loss_fn.health()
    health.write(Writer(), 7)
    assert written.pop("health/age")["bucket_counts"] == list(health.age_histogram)
    assert {name.removeprefix("health/"): value for name, (value, _) in written.items()} == health.figures()
    assert {step for _, step in written.values()} == {7}


def test_a_real_tensorboard_takes_them(tmp_path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    loss_fn = pmk.PrototypeMemoryLoss(DIM, 10)
    for step in range(4):
        loss_fn(*batch(step))
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        loss_fn.health().write(writer, 1)
    assert list(tmp_path.iterdir())
