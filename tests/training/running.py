"""Small runs for tests, through the command line: the pytest fixtures and what the tests say of a run."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from protomem_kernels.cli.app import app
from protomem_kernels.training import report, steps

TINY = """
image_size = [16, 12]
width = 4
embedding_dim = 8
identities_per_batch = 4
images_per_identity = 2
steps = 4
checkpoint_every = 2
device = "cpu"
threads = 1
"""


@pytest.fixture(autouse=True)
def _same_threads_afterwards():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def pictures():
    """Asked for by the tests that look at a run's pictures; drawing them takes most of a tiny run's time."""


@pytest.fixture(autouse=True)
def _no_pictures(request, monkeypatch):
    if "pictures" not in request.fixturenames:
        for name in ("draw_roc", "draw_pairs"):
            monkeypatch.setattr(report, name, lambda *arguments, **options: None)


@pytest.fixture(scope="session")
def people(tmp_path_factory):
    """A folder of 8 identities with 4 images each."""
    root = tmp_path_factory.mktemp("people")
    draw_people(root)
    return root


def draw_people(root):
    """Draw 8 identities with 4 images each: a pattern of the identity's own under noise."""
    rng = np.random.default_rng(0)
    for person in range(8):
        pattern = rng.integers(0, 256, (20, 15, 3))
        (root / f"person{person}").mkdir(parents=True)
        for image in range(4):
            pixels = (0.7 * pattern + 0.3 * rng.integers(0, 256, pattern.shape)).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"person{person}" / f"{image}.png")


@pytest.fixture
def tiny(tmp_path, people):
    """A TOML file of a run of four steps on the folder of people."""
    file = tmp_path / "tiny.toml"
    file.write_text(TINY + f"data = {json.dumps(str(people))}\nruns_dir = {json.dumps(str(tmp_path / 'runs'))}\n")
    return file


@pytest.fixture(scope="session")
def finished(tmp_path_factory, people):
    """The folder of a run of four steps on the folder of people that came to its end. Copy it to change it."""
    root = tmp_path_factory.mktemp("finished")
    (root / "tiny.toml").write_text(TINY + f"data = {json.dumps(str(people))}\nruns_dir = {json.dumps(str(root))}\n")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw_roc", "draw_pairs"):
            patch.setattr(report, name, lambda *arguments, **options: None)
        result = train(root / "tiny.toml", "--name", "done")
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    return root / "done"


def protomem(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def train(tiny, *arguments):
    return protomem("train", "--config", tiny, *arguments)


def assert_refused(result, *expected):
    """The command ended with exit code 2 and one line on stderr that says what is expected."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    for text in expected:
        assert text in result.stderr


def figures(folder):
    """What must not depend on how often a run was interrupted."""
    metrics = json.loads((folder / "metrics.json").read_text())
    del metrics["seconds"]
    return metrics


class StoppedError(Exception):
    pass


def stop_after(tmp_path, tiny, step, *arguments):
    """Start a run and break it off in the step after ``step``."""
    advance = steps.Training.advance

    def advance_or_stop(self, images, labels):
        if self.step == step:
            raise StoppedError
        return advance(self, images, labels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps.Training, "advance", advance_or_stop)
        assert isinstance(train(tiny, *arguments).exception, StoppedError)
