"""A trial from its images to its figures."""

from __future__ import annotations

import math

import pytest
import torch

from protomem_kernels.experiments import learning
from protomem_kernels.experiments.ages import COSINE
from protomem_kernels.experiments.running import run
from protomem_kernels.training.errors import RunError

MEASURED = ("ms_per_step", "peak_mib")  # by a clock, and by the machine


def figures(trial, seed=0, **options):
    return {name: value for name, value in run(trial, seed, **options).items() if name not in MEASURED}


@pytest.mark.parametrize(
    "own",
    [
        {"share": 0.5},
        {"share": 0.5, "weights": "true", "degraded": 0.5},
        {"share": 0.5, "prototype_gradient": "memory"},
        {"quality": "recognizability"},
        {"sampler": "doppelgangers"},
        {"head": "full"},
        {"head": "sampled", "share": 0.5, "augmentation": 1.0},
    ],
    ids=str,
)
def test_a_trial_is_a_function_of_its_seed(trial, own):
    first = figures(trial(**own))
    assert all(math.isfinite(value) for value in first.values())
    assert {0 <= first[name] <= 1 for name in first if "tar" in name or name in ("accuracy", "rank1")} == {True}
    assert figures(trial(**own)) == first
    assert figures(trial(**own), seed=1) != first


def test_true_quality_weighs(trial, sets):
    worse = sets._replace(train=sets.train._replace(quality=torch.linspace(0.1, 1, len(sets.train.labels))))
    with_it = figures(trial(weights="true"), sets=worse)
    assert with_it["loss"] != figures(trial(), sets=worse)["loss"]
    even = sets._replace(train=sets.train._replace(quality=torch.full((len(sets.train.labels),), 0.5)))
    assert figures(trial(weights="true"), sets=even)["loss"] == pytest.approx(figures(trial(), sets=even)["loss"])


def test_the_test_is_untouched_by_what_is_chosen_on_validation(trial, sets):
    spoilt = sets._replace(test=sets.test._replace(pixels=torch.zeros_like(sets.test.pixels)))
    assert figures(trial(measured_on="validation"), sets=spoilt) == figures(trial(measured_on="validation"), sets=sets)
    assert figures(trial(), sets=spoilt)["rank1"] < figures(trial(), sets=sets)["rank1"]


def test_training_pays(trial, sets):
    untrained = figures(trial(learning_rate=0.0), sets=sets)
    trained = figures(trial(steps=40, averaging=0.9), sets=sets)
    assert trained["accuracy"] > untrained["accuracy"] + 0.02


def test_damaged_images_have_figures_of_their_own(trial):
    found = figures(trial(degraded=0.5))
    assert found["damaged_rank1"] < found["rank1"]


def test_prototypes_that_nothing_moves_do_not_age(trial, sets):
    still = run(trial(learning_rate=0.0, weight_decay=0.0, steps=16, refresh_ratio=1.0), 0, ages=True, sets=sets)
    ages = {int(name.removeprefix(COSINE)): value for name, value in still.items() if name.startswith(COSINE)}
    assert len(ages) >= 3
    assert set(ages) <= {0, 1, 2, 4, 8}
    moving = run(trial(learning_rate=0.05, steps=16, refresh_ratio=1.0), 0, ages=True, sets=sets)
    assert moving[f"{COSINE}4"] < moving[f"{COSINE}0"] - 0.05
    assert abs(still[f"{COSINE}4"] - still[f"{COSINE}0"]) < 0.05


def test_noise_costs_and_has_no_figures(trial):
    found = run(trial(data="simulated", identities=5000, share=0.01), 0)
    assert {*found} == {"loss", "ms_per_step", "head_mib", "peak_mib"}
    assert found["head_mib"] == (50 * (16 * 4 + 16) + 16) / 2**20
    assert run(trial(data="simulated", identities=5000, head="full"), 0)["head_mib"] == 3 * 5000 * 16 * 4 / 2**20


def test_a_loss_that_is_no_number_ends_the_trial(trial, sets, monkeypatch):
    def broken(*_):
        head = build(*_)
        head.loss.forward = lambda *args: embeddings_of(args) * math.nan
        return head

    def embeddings_of(args):
        return args[0].sum()

    build = learning.build_head
    monkeypatch.setattr(learning, "build_head", broken)
    with pytest.raises(RunError, match="the loss is nan in step 1"):
        run(trial(), 0, sets=sets)
