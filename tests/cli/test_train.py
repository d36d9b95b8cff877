"""``protomem train``: its options, which of them were typed, and errors in one line."""

import re

import pytest

from protomem_kernels.cli import train as command
from protomem_kernels.cli.errors import CommandError
from protomem_kernels.data.images import DatasetError
from protomem_kernels.training.config import TrainConfig, config_from, read_toml, schema
from protomem_kernels.training.errors import RunError
from tests.training.running import assert_refused, protomem, stop_after, train


def test_flags_override_the_file_and_the_file_the_defaults(tiny, tmp_path):
    with tiny.open("a") as file:
        file.write("seed = 7\nscale = 9\n")
    stop_after(tmp_path, tiny, 0, "--name", "who", "--seed", "8", "--image-size", "20", "10")
    saved = config_from(read_toml(tmp_path / "runs" / "who" / "config.toml"), "")
    assert (saved.seed, saved.scale, saved.image_size) == (8, 9.0, (20, 10))
    assert saved.fold == TrainConfig().fold
    assert saved.width == 4


def test_a_bad_flag_reads_like_a_bad_key(tiny):
    assert_refused(train(tiny, "--fold", 4), "fold must be between 0 and 3, got 4")


def test_help_shows_every_field_and_its_choices(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = protomem("train", "--help")
    assert result.exit_code == 0
    for name, accepted in schema().items():
        assert "--" + name.replace("_", "-") + " " in result.stdout
        for choice in accepted.get("enum") or accepted["choices"]:
            assert choice in result.stdout
    assert re.search(r"--fold .*(\n.*){1,4} 0 to 3 ", result.stdout)
    assert re.search(r"--inner-fold .*(\n.*)+ -1 to 2 ", result.stdout)


def test_a_switch_overrides_the_file_both_ways(tiny, tmp_path):
    with tiny.open("a") as file:
        file.write("compile = true\n")
    stop_after(tmp_path, tiny, 0, "--name", "off", "--no-compile")
    assert not config_from(read_toml(tmp_path / "runs" / "off" / "config.toml"), "").compile
    stop_after(tmp_path, tiny, 0, "--name", "on")
    assert config_from(read_toml(tmp_path / "runs" / "on" / "config.toml"), "").compile


@pytest.mark.parametrize("kind", [CommandError, RunError, DatasetError])
def test_what_a_user_can_mend_is_one_line(tiny, monkeypatch, kind):
    def fail(*arguments, **options):
        raise kind("the first line\n  and the second")

    monkeypatch.setattr(command, "run_training", fail)
    assert_refused(train(tiny), "error: the first line and the second")


def test_anything_else_stays_an_error(tiny, monkeypatch):
    def fail(*arguments, **options):
        raise ArithmeticError("a mistake of ours")

    monkeypatch.setattr(command, "run_training", fail)
    assert isinstance(train(tiny).exception, ArithmeticError)
