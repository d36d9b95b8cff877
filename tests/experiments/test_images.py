"""Three sets of images of disjoint identities, and damage of known severity."""

from __future__ import annotations

import pytest
import torch

from protomem_kernels.data import glyphs
from protomem_kernels.experiments.images import Images, at_most, damaged, prepare, read_sets
from protomem_kernels.training.errors import RunError
from tests.data.fonts import make_font


def test_no_identity_is_in_two_sets(sets):
    owners = [set(images.labels.tolist()) for images in sets]
    assert [len(those) for those in owners] == [24, 6, 10]
    assert len(set.union(*owners)) == 40


def test_at_most_so_many_images_of_an_identity_are_tested(sets):
    assert sets.test.labels.unique(return_counts=True)[1].tolist() == [6] * 10
    assert sets.train.labels.unique(return_counts=True)[1].tolist() == [10] * 24


def test_at_most_keeps_pixels_beside_labels():
    labels = torch.tensor([5, 3, 5, 5, 3, 9])
    images = Images(labels.view(-1, 1, 1, 1).to(torch.uint8), labels, labels / 10)
    few = at_most(images, 2)
    assert sorted(few.labels.tolist()) == [3, 3, 5, 5, 9]
    assert few.pixels.flatten().tolist() == few.labels.tolist()
    assert torch.equal(few.quality, few.labels / 10)


def test_the_test_is_the_same_whoever_trains(trial, sets):
    fewer = read_sets(trial(identities=8))
    assert torch.equal(fewer.test.pixels, sets.test.pixels)
    assert torch.equal(fewer.validation.labels, sets.validation.labels)
    assert set(fewer.train.labels.tolist()) < set(sets.train.labels.tolist())


def test_the_rest_trains_where_nobody_says_how_many(trial):
    assert len(read_sets(trial(identities=0)).train.labels.unique()) == 24


def test_half_of_the_images_are_damaged_as_much_as_their_quality_says(sets, trial):
    worse = damaged(sets.train, trial(degraded=0.5))
    touched = worse.quality < 1
    assert 0.4 < touched.float().mean() < 0.6
    assert 0.05 < worse.quality[touched].min() < worse.quality[touched].max() < 0.75
    differs = (worse.pixels != sets.train.pixels).flatten(1).any(1)
    assert torch.equal(differs, touched)
    assert torch.equal(worse.labels, sets.train.labels)
    change = (worse.floats() - sets.train.floats()).abs().mean((1, 2, 3))
    slight, severe = worse.quality[touched] > 0.4, worse.quality[touched] < 0.2
    assert change[touched][severe].mean() > change[touched][slight].mean()


def test_damage_is_the_same_every_time_and_none_is_none(sets, trial):
    half = trial(degraded=0.5)
    assert torch.equal(damaged(sets.train, half).pixels, damaged(sets.train, half).pixels)
    assert damaged(sets.train, trial()) is sets.train
    severe = damaged(sets.train, trial(degraded=0.5, severity=(0.9, 1.0)))
    assert severe.quality[severe.quality < 1].max() < 0.11


def test_glyphs_are_drawn_once_and_told_of(trial, tmp_path, monkeypatch):
    monkeypatch.setenv("PROTOMEM_CACHE_DIR", str(tmp_path))
    for number in range(3):
        make_font(tmp_path / "fonts" / f"{number}.ttf", range(12), square=60 + 40 * number)
    monkeypatch.setattr(glyphs, "SYLLABLES", 12)
    own = trial(data="hangul", fonts=str(tmp_path / "fonts"), identities=4, validation_identities=3, test_identities=5)
    drawn = []
    lines = prepare(own, lambda done, total: drawn.append((done, total)))
    assert drawn == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert lines == [f"{number}.ttf: 12 kept" for number in range(3)]
    assert prepare(own, lambda *_: pytest.fail("drawn again")) == []
    sets = read_sets(own)
    assert [len(images.labels) for images in sets] == [12, 9, 15]
    assert sets.train.pixels.shape[1:] == (1, 16, 16)


def test_faces_need_no_preparation(trial):
    assert prepare(trial(), lambda *_: pytest.fail("nothing is made")) == []


def test_more_identities_than_there_are_is_told(trial):
    with pytest.raises(RunError, match="orl has 40 identities of two images or more; 30 to train, 6 for validation"):
        read_sets(trial(identities=30))
