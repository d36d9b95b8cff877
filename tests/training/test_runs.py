"""Run folders: their names, and that none is lost or left half made."""

import os

import pytest

from tests.training.running import assert_refused, train


def test_an_earlier_run_is_never_overwritten(tiny, tmp_path):
    for _ in range(3):
        assert train(tiny, "--name", "again", "--steps", 1).exit_code == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["again", "again-2", "again-3"]


@pytest.mark.parametrize("name", ["../up", "a/b", "..", ".", "/"])
def test_a_name_that_is_no_folder_name(tiny, tmp_path, name):
    assert_refused(train(tiny, "--name", name), "name must be a plain folder name")


def test_a_runs_folder_that_cannot_be_written(tiny, tmp_path):
    (tmp_path / "occupied").write_text("a file")
    assert_refused(train(tiny, "--runs-dir", tmp_path / "occupied"), "cannot write to the runs folder", "occupied")
    assert (tmp_path / "occupied").read_text() == "a file"
    assert_refused(train(tiny, "--runs-dir", tmp_path / "occupied" / "deeper"), "cannot write")


def test_a_run_whose_configuration_cannot_be_written_leaves_no_folder(tiny, tmp_path, monkeypatch):
    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert_refused(train(tiny), "No space left on device")
    assert list((tmp_path / "runs").iterdir()) == []
