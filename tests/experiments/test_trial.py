"""A trial is described down to the last number, and a table by trials."""

from __future__ import annotations

import pytest

from protomem_kernels.experiments.table import read_table, shipped, table_from
from protomem_kernels.experiments.trial import LEARNING, OWN, trial_from
from protomem_kernels.training.config import TrainConfig
from protomem_kernels.training.errors import RunError

OTHER = {
    "data": "simulated",
    "fonts": "mine",
    "image_size": (40, 40),
    "severity": (0.5, 0.6),
    "head": "full",
    "weights": "true",
    "sampler": "doppelgangers",
    "measured_on": "validation",
    "policy": "lru",
    "prototype_gradient": "fresh",
    "encoder": "residual-pooled",
    "margin": "cosface",
    "mining": "mv-softmax",
    "quality": "norm",
}


@pytest.mark.parametrize("key", [*OWN, *LEARNING])
def test_every_setting_changes_the_digest(key):
    plain = trial_from({}, "here")
    value = plain.settings().get(key)
    other = OTHER.get(key, 0.25 if isinstance(value, float) and value != 0.25 else 7)
    assert trial_from({key: other}, "here").digest() != plain.digest()


def test_what_says_where_a_run_goes_is_no_setting():
    assert not {"name", "runs_dir", "threads", "workers", "checkpoint_every", "capacity"} & {*OWN, *LEARNING}
    assert set(LEARNING) < set(TrainConfig.model_fields)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"shares": 0.1}, "here: unknown key shares; known are data, fonts"),
        ({"share": 0.0}, "here: share: Input should be greater than 0, got 0.0"),
        ({"head": "half"}, "here: head: Input should be 'memory', 'full' or 'sampled', got 'half'"),
        ({"margin": "arc"}, "here: margin must be one of none, "),
        ({"refresh_ratio": 2.0}, "here: refresh_ratio must be between 0.0 and 1.0, got 2.0"),
    ],
)
def test_what_is_no_trial_is_told(values, said):
    with pytest.raises(RunError) as error:
        trial_from(values, "here")
    assert str(error.value).startswith(said)


@pytest.mark.parametrize("name", shipped())
@pytest.mark.parametrize("quick", [False, True])
def test_the_tables_of_the_package_can_be_read(name, quick):
    table = read_table(name, quick=quick)
    assert table.title
    assert table.contents.question
    if not quick:
        assert len({method.trial.digest() for method in table.methods.values()}) == len(table.methods), "twice the same"
    assert len(table.seeds) == (1 if quick or name == "tuning" else 3)


def test_all_methods_of_a_table_are_measured_on_the_same_identities():
    for name in set(shipped()) - {"cost"}:
        trials = [method.trial for method in read_table(name).methods.values()]
        assert len({(trial.data, trial.test_identities, trial.measured_on) for trial in trials}) == 1, name
        assert (trials[0].measured_on == "validation") == (name == "tuning")


def test_all_methods_of_a_table_have_one_budget_unless_that_is_what_is_asked():
    for name in set(shipped()) - {"steps", "identities", "cost"}:
        trials = [method.trial for method in read_table(name).methods.values()]
        assert len({(trial.identities, trial.train.steps) for trial in trials}) == 1, name
        sizes = {trial.train.identities_per_batch * trial.train.images_per_identity for trial in trials}
        assert sizes == {128}, name


def test_options_are_chosen_with_equal_budgets():
    heads = [method.trial.head for method in read_table("tuning").methods.values()]
    assert {heads.count(head) for head in ("memory", "full", "sampled")} == {len(heads) // 3}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"method": {}}, "mine: unknown key method"),
        ({}, "mine: methods must hold at least one"),
        ({"methods": {"a": {}}, "seeds": [1, 1]}, "mine: methods must hold at least one, and seeds each but once"),
        ({"methods": {"a": {}}, "seeds": [-1]}, "mine: seeds.0: Input should be greater than or equal to 0, got -1"),
        ({"methods": {"a": {"x": "far"}}}, "mine, a: x: Input should be a valid number"),
        ({"methods": {"a": {"slots": 3}}}, "mine, a: unknown key slots"),
        ({"methods": {"a": 3}}, "mine: methods.a: Input should be a valid dictionary"),
        ({"base": "nothing", "methods": {"a": {}}}, "there is no table 'nothing' in bases; there are hangul, and"),
    ],
)
def test_what_is_no_table_is_told(values, said):
    with pytest.raises(RunError) as error:
        table_from(values, "mine")
    assert str(error.value).startswith(said)


def test_an_unknown_table_names_the_known_ones():
    with pytest.raises(RunError, match="there is no table 'capacities' in tables; there are capacity, cost"):
        read_table("capacities")


def test_options_of_a_head_hold_for_its_methods_alone():
    contents = {
        "shared": {"steps": 50},
        "heads": {"full": {"steps": 60, "scale": 8.0}},
        "methods": {"a": {}, "b": {"head": "full"}, "c": {"head": "full", "scale": 12.0}},
    }
    trials = [method.trial.train for method in table_from(contents, "mine").methods.values()]
    assert [(trial.steps, trial.scale) for trial in trials] == [(50, 24.0), (60, 8.0), (60, 12.0)]


def test_what_a_table_says_comes_before_its_base():
    contents = {"base": "hangul", "shared": {"scale": 3.0}, "methods": {"a": {"head": "full"}}}
    assert table_from(contents, "mine").methods["a"].trial.train.scale == 3.0


def test_a_method_has_its_own_over_what_is_shared_and_quick_over_both():
    contents = {
        "base": "hangul",
        "shared": {"steps": 50, "share": 0.5},
        "quick": {"steps": 2},
        "methods": {"a": {"share": 0.25}, "b": {}},
    }
    trials = table_from(contents, "mine").methods
    assert (trials["a"].trial.share, trials["b"].trial.share) == (0.25, 0.5)
    assert (trials["a"].trial.data, trials["a"].trial.train.steps) == ("hangul", 50)
    assert table_from(contents, "mine", quick=True).methods["a"].trial.train.steps == 2
