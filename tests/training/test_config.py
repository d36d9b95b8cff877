"""The configuration, its TOML, and what neither may hold."""

import pytest

from protomem_kernels.training.config import TrainConfig, config_from, read_toml
from protomem_kernels.training.errors import RunError
from tests.training.running import assert_refused, protomem


def test_a_configuration_survives_its_toml(tmp_path):
    config = TrainConfig(name='a "b" ü', image_size=(9, 10), learning_rate=1e-5, steps=3)
    (tmp_path / "c.toml").write_text(config.as_toml(), encoding="utf-8")
    assert config_from(read_toml(tmp_path / "c.toml"), "") == config


def test_a_name_with_a_character_that_toml_has_no_place_for(tmp_path):
    config = TrainConfig(name="a\x7fb\tc", data="new\nline")
    (tmp_path / "c.toml").write_text(config.as_toml(), encoding="utf-8")
    assert config_from(read_toml(tmp_path / "c.toml"), "") == config


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("stepz = 3", "unknown key stepz"),
        ('steps = "3"', "steps must be a whole number, got '3'"),
        ("steps = 3.0", "steps must be a whole number, got 3.0"),
        ("steps = true", "steps must be a whole number, got True"),
        ("steps = 0", "steps must be at least 1, got 0"),
        ("data = 3", "data must be a string, got 3"),
        ("dropout = 'big'", "dropout must be a number, got 'big'"),
        ("dropout = nan", "dropout must be between 0.0 and 0.9, got nan"),
        ("margin = 'arkface'", "margin must be one of none, adaface, arcface"),
        ("learning_rate = inf", "learning_rate must be"),
        ("policy = 'lifo'", "policy must be one of fifo, lru, got 'lifo'"),
        ("image_size = [3]", "image_size must be two whole numbers"),
        ("image_size = [3, 30]", "image_size must be between 8 and 1024"),
        ("steps =", "is not valid TOML"),
    ],
)
def test_a_bad_toml_file_is_refused(tmp_path, line, expected):
    file = tmp_path / "bad.toml"
    file.write_text(line + "\n")
    assert_refused(protomem("train", "--config", file, "--runs-dir", tmp_path / "runs"), expected)
    assert not (tmp_path / "runs").exists()


def test_a_toml_file_that_cannot_be_read(tmp_path):
    assert_refused(protomem("train", "--config", tmp_path / "none.toml"), "cannot read the configuration")
    (tmp_path / "latin.toml").write_bytes(b"name = '\xe9'")
    assert_refused(protomem("train", "--config", tmp_path / "latin.toml"), "not valid TOML")


def test_a_path_that_is_no_utf8_is_refused_in_one_line():
    with pytest.raises(RunError, match=r"data must be a string that UTF-8 can hold, .*, got 'd\\udce9p'$"):
        TrainConfig(data="d\udce9p")
