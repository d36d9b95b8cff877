"""`protomem train`: configuration, run folders, exact resume, errors in one line, pictures."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import protomem_kernels.cli as cli
from protomem_kernels.cli import augmentation, checkpoints, encoders, faces, heads, report, training
from protomem_kernels.cli import pictures as pictures_module
from protomem_kernels.cli.app import app
from protomem_kernels.cli.config import TrainConfig, config_from, read_toml
from protomem_kernels.cli.errors import CommandError
from protomem_kernels.cli.train import pick_device
from protomem_kernels.sampling import IdentityBatchSampler

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
    """A folder of 8 identities with 4 images each: a pattern of the identity's own under noise."""
    root = tmp_path_factory.mktemp("people")
    rng = np.random.default_rng(0)
    for person in range(8):
        pattern = rng.integers(0, 256, (20, 15, 3))
        (root / f"person{person}").mkdir()
        for image in range(4):
            pixels = (0.7 * pattern + 0.3 * rng.integers(0, 256, pattern.shape)).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"person{person}" / f"{image}.png")
    return root


@pytest.fixture
def tiny(tmp_path, people):
    """A TOML file of a run of four steps on the folder of people."""
    file = tmp_path / "tiny.toml"
    file.write_text(TINY + f"data = {json.dumps(str(people))}\nruns_dir = {json.dumps(str(tmp_path / 'runs'))}\n")
    return file


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


# --- a whole run ------------------------------------------------------------------------------------------------------


def test_a_run_writes_its_folder(tiny, tmp_path, pictures):
    result = train(tiny, "--name", "first")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "runs" / "first"
    names = {path.name for path in folder.iterdir()}
    assert {"config.toml", "metrics.json", "roc.png", "hardest_pairs.png", "checkpoint.pt"} <= names
    assert any("tfevents" in name for name in names)
    assert not [name for name in names if name.startswith(".writing")]
    metrics = json.loads((folder / "metrics.json").read_text())
    for key in ("verification_accuracy", "baseline_raw_pixels", "tar_at_far_1e-2", "rank1", "auc"):
        assert 0 <= metrics[key] <= 1
    assert metrics["train_identities"] == 6
    assert metrics["unseen_identities"] == 2
    assert metrics["steps"] == 4
    assert "raw pixels" in result.stdout
    for picture in ("roc.png", "hardest_pairs.png"):
        with Image.open(folder / picture) as image:
            image.load()
            assert image.format == "PNG"
            assert min(image.size) > 400


@pytest.mark.parametrize(("accepts", "rejects", "channels"), [(5, 0, 1), (0, 8, 3), (1, 1, 3)])
def test_a_contact_sheet_of_any_number_of_pairs(tmp_path, accepts, rejects, channels):
    image = torch.randint(256, (channels, 20, 15), dtype=torch.uint8)
    pair = pictures_module.Pair(image, image.flip(2), ("a/1", "b/2"), 0.5)
    pictures_module.draw_pairs(tmp_path / "pairs.png", [pair] * accepts, [pair] * rejects, "a test")
    with Image.open(tmp_path / "pairs.png") as sheet:
        sheet.load()
        assert sheet.format == "PNG"


def test_the_default_is_orl_and_ten_unseen_people(tmp_path):
    result = protomem("train", "--runs-dir", tmp_path, "--steps", 1, "--width", 4, "--threads", 1, "--device", "cpu")
    assert result.exit_code == 0, result.output
    metrics = figures(tmp_path / "orl")
    assert metrics["data"] == "ORL faces"
    assert (metrics["train_identities"], metrics["unseen_identities"]) == (30, 10)
    assert (metrics["genuine_pairs"], metrics["impostor_pairs"]) == (450, 4500)
    assert metrics["baseline_raw_pixels"] == pytest.approx(0.843, abs=0.005)


def test_inner_folds_leave_the_fold_alone():
    outer = faces.Faces(TrainConfig(fold=1))
    inner = [faces.Faces(TrainConfig(fold=1, inner_fold=number)) for number in range(3)]
    assert torch.cat([split.unseen.identities for split in inner]).equal(outer.train.identities)
    for split in inner:
        everyone = torch.cat((split.train.identities, split.unseen.identities))
        assert everyone.sort().values.equal(outer.train.identities)


def test_an_earlier_run_is_never_overwritten(tiny, tmp_path):
    for _ in range(3):
        assert train(tiny, "--name", "again", "--steps", 1).exit_code == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["again", "again-2", "again-3"]


def test_events_hold_the_loss_of_every_step(tiny, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train(tiny, "--name", "events").exit_code == 0
    events = EventAccumulator(str(tmp_path / "runs" / "events")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert events.Scalars("train/occupancy")[-1].value == 1.0


@pytest.mark.parametrize(
    "flags",
    [
        ("--prototype-gradient", "fresh", "--margin", "cosface", "--policy", "lru"),
        ("--prototype-gradient", "memory", "--mining", "curricular"),
        ("--quality", "norm", "--margin", "adaface", "--mining", "hard-samples"),
        ("--quality", "center", "--mining", "mv-softmax", "--capacity", "4"),
        ("--mining", "hardest-negatives", "--augmentation", "0"),
        ("--mining", "noisy-negatives", "--refresh-ratio", "1"),
    ],
)
def test_every_loss_option_trains_and_resumes(tiny, tmp_path, flags):
    assert train(tiny, "--name", "whole", *flags).exit_code == 0
    whole = figures(tmp_path / "runs" / "whole")
    stop_after(tmp_path, tiny, 2, "--name", "halves", *flags)
    assert train(tiny, "--name", "halves", "--resume", *flags).exit_code == 0
    assert figures(tmp_path / "runs" / "halves") == whole


# --- resume -----------------------------------------------------------------------------------------------------------


class StoppedError(Exception):
    pass


def stop_after(tmp_path, tiny, step, *arguments):
    """Start a run and break it off in the step after ``step``."""
    advance = training.Training.advance

    def advance_or_stop(self, images, labels):
        if self.step == step:
            raise StoppedError
        return advance(self, images, labels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Training, "advance", advance_or_stop)
        assert isinstance(train(tiny, *arguments).exception, StoppedError)


def test_sigkill_and_resume_give_the_undisturbed_figures(tiny, tmp_path):
    options = ("--steps", 120, "--checkpoint-every", 10)
    assert train(tiny, "--name", "calm", *options).exit_code == 0
    folder = tmp_path / "runs" / "killed"
    command = ["train", "--config", tiny, "--name", "killed", *options]
    process = subprocess.Popen(
        [sys.executable, "-c", "from protomem_kernels.cli import main; main()", *map(str, command)],
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not (folder / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.5))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    killed_after = checkpoints.load_checkpoint(folder / "checkpoint.pt")["step"]
    assert 10 <= killed_after < 120
    (folder / ".writing-1-checkpoint.pt").write_text("as a kill in the middle of a write leaves it")
    result = train(tiny, "--name", "killed", "--resume", *options)
    assert result.exit_code == 0, result.output
    assert f"continuing after step {killed_after}" in result.stdout
    assert figures(folder) == figures(tmp_path / "runs" / "calm")
    assert not list(folder.glob(".writing-*"))


@pytest.mark.parametrize("step", [0, 1, 3])
def test_resume_from_any_step(tiny, tmp_path, step):
    assert train(tiny, "--name", "calm").exit_code == 0
    stop_after(tmp_path, tiny, step, "--name", "stopped")
    assert (tmp_path / "runs" / "stopped" / "checkpoint.pt").exists() == (step >= 2)
    assert train(tiny, "--name", "stopped", "--resume").exit_code == 0
    calm, stopped = (tmp_path / "runs" / name for name in ("calm", "stopped"))
    assert figures(stopped) == figures(calm)
    states = [checkpoints.load_checkpoint(folder / "checkpoint.pt") for folder in (calm, stopped)]
    for state in states:
        state["moments"] = state["optimizer"]["state"]
    for part in ("encoder", "average", "loss", "moments"):
        torch.testing.assert_close(states[0][part], states[1][part], rtol=0, atol=0)


def test_resume_takes_the_newest_run_and_its_configuration(tiny, tmp_path):
    assert train(tiny, "--name", "many").exit_code == 0
    stop_after(tmp_path, tiny, 3, "--name", "many", "--seed", 5)
    assert train(tiny, "--name", "many", "--resume").exit_code == 0
    assert figures(tmp_path / "runs" / "many-2")["seed"] == 5
    assert not (tmp_path / "runs" / "many-3").exists()


def test_resuming_a_finished_run_gives_its_figures_again(tiny, tmp_path):
    assert train(tiny, "--name", "done").exit_code == 0
    before = figures(tmp_path / "runs" / "done")
    assert train(tiny, "--name", "done", "--resume").exit_code == 0
    assert figures(tmp_path / "runs" / "done") == before


def test_resume_refuses_another_experiment(tiny, tmp_path):
    assert train(tiny, "--name", "run").exit_code == 0
    assert_refused(train(tiny, "--name", "run", "--resume", "--seed", 3), "seed = 0", "with 3")


def test_nothing_to_resume(tiny, tmp_path):
    assert_refused(train(tiny, "--name", "never", "--resume"), "nothing to resume", "never")
    assert not (tmp_path / "runs").exists()


def test_a_folder_too_large_for_memory_trains_the_same(tiny, tmp_path, monkeypatch):
    assert train(tiny, "--name", "memory").exit_code == 0
    monkeypatch.setattr(faces, "IN_MEMORY", 0)
    assert train(tiny, "--name", "disk").exit_code == 0
    assert figures(tmp_path / "runs" / "disk") == figures(tmp_path / "runs" / "memory")


def test_batches_are_a_function_of_the_step():
    sampler = IdentityBatchSampler([0, 0, 0, 1, 1, 2, 2], 2, 2, seed=3)
    whole = list(training.batches(sampler, 0, 9))
    assert len(whole) == 9
    for step in range(10):
        assert list(training.batches(sampler, step, 9)) == whole[step:]


def test_the_learning_rate_warms_up_and_falls_to_zero():
    config = TrainConfig(steps=200, learning_rate=1.0)
    rates = [training.learning_rate(step, config) for step in range(200)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0, abs=0.01)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 1e-3
    assert training.learning_rate(0, TrainConfig(steps=1)) == TrainConfig().learning_rate


# --- errors -----------------------------------------------------------------------------------------------------------


def write_images(root, counts, size=(15, 20)):
    for person, count in enumerate(counts):
        (root / f"p{person}").mkdir(parents=True)
        for image in range(count):
            Image.new("RGB", size, (person * 20, image * 40, 7)).save(root / f"p{person}" / f"{image}.png")


def broken_nowhere(root):
    pass


def broken_a_file(root):
    root.write_text("no folder")


def broken_empty(root):
    root.mkdir()


def broken_no_images(root):
    (root / "ann").mkdir(parents=True)
    (root / "ann" / "readme.txt").write_text("no image")


def broken_single_image(root):
    write_images(root, [3] * 7 + [1])


def broken_too_few(root):
    write_images(root, [3] * 7)


def broken_image(root):
    write_images(root, [3] * 8)
    (root / "p5" / "1.png").write_bytes(b"\x89PNG but not quite")


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (broken_nowhere, "expected a folder"),
        (broken_a_file, "expected a folder"),
        (broken_empty, "sub-folder"),
        (broken_no_images, "expected images"),
        (broken_single_image, "at least two images"),
        (broken_too_few, "has 7 identities; at least 8"),
        (broken_image, "1.png"),
    ],
)
def test_bad_data_is_refused_before_anything_is_written(tiny, tmp_path, spoil, expected):
    root = tmp_path / "data"
    spoil(root)
    assert_refused(train(tiny, "--data", root), expected, "data")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_while_training(tiny, tmp_path, monkeypatch, workers):
    root = tmp_path / "data"
    broken_image(root)
    monkeypatch.setattr(faces, "IN_MEMORY", 0)
    result = train(tiny, "--data", root, "--workers", workers, "--steps", 30)
    assert_refused(result, "1.png", "expected a readable image")


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


def test_a_checkpoint_that_cannot_be_written(tiny, tmp_path, monkeypatch):
    def full(content, path):
        raise RuntimeError("file write failed")

    monkeypatch.setattr(torch, "save", full)
    assert_refused(train(tiny, "--name", "full"), "cannot write", "checkpoint.pt", "file write failed")
    assert not list((tmp_path / "runs" / "full").glob("*writing*"))


def truncate(path):
    path.write_bytes(path.read_bytes()[:1000])


def scramble(path):
    path.write_bytes(random.Random(0).randbytes(5000))


def foreign(path):
    torch.save({"weights": torch.zeros(3)}, path)


def dangerous(path):
    torch.save({"format": checkpoints.FORMAT, "version": 1, "payload": Path("x")}, path)


def future(path):
    torch.save({"format": checkpoints.FORMAT, "version": 99}, path)


def hollow(path):
    torch.save({"format": checkpoints.FORMAT, "version": checkpoints.VERSION, "step": 2}, path)


def folder_instead(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (truncate, "damaged or not a checkpoint"),
        (scramble, "damaged or not a checkpoint"),
        (dangerous, "damaged or not a checkpoint"),
        (foreign, "was not written by protomem train"),
        (future, "version 99"),
        (hollow, "does not fit"),
        (folder_instead, "cannot read the checkpoint"),
    ],
)
def test_a_bad_checkpoint_is_refused_and_left_alone(tiny, tmp_path, spoil, expected):
    assert train(tiny, "--name", "bad").exit_code == 0
    checkpoint = tmp_path / "runs" / "bad" / "checkpoint.pt"
    spoil(checkpoint)
    before = checkpoint.read_bytes() if checkpoint.is_file() else None
    assert_refused(train(tiny, "--name", "bad", "--resume"), expected, "checkpoint.pt")
    assert (checkpoint.read_bytes() if checkpoint.is_file() else None) == before


def test_a_checkpoint_of_another_run(tiny, tmp_path):
    assert train(tiny, "--name", "one").exit_code == 0
    assert train(tiny, "--name", "two", "--seed", 2).exit_code == 0
    one, two = (tmp_path / "runs" / name / "checkpoint.pt" for name in ("one", "two"))
    two.write_bytes(one.read_bytes())
    assert_refused(train(tiny, "--name", "two", "--resume"), "belongs to another run: seed is 0 there and 2 here")


def test_a_loss_that_is_not_finite_ends_the_run(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "learning_rate", lambda step, config: float("nan") if step == 2 else 1e-3)
    assert_refused(train(tiny, "--name", "nan"), "the loss is nan in step 4", "--learning-rate")
    assert checkpoints.load_checkpoint(tmp_path / "runs" / "nan" / "checkpoint.pt")["step"] == 2


def test_capacity_below_the_batch(tiny):
    assert_refused(train(tiny, "--capacity", 3), "capacity must be at least", "got 3")


def test_unknown_device(tiny):
    assert_refused(train(tiny, "--device", "abacus"), "device 'abacus' cannot be used")
    if not torch.cuda.is_available():
        assert pick_device("auto") == torch.device("cpu")
        assert_refused(train(tiny, "--device", "cuda"), "device 'cuda' cannot be used")


def test_without_the_train_extra(monkeypatch, capsys):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name in ("typer", "rich") else object())
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "error: the protomem command needs rich, typer: pip install 'protomem-kernels[train]'\n"
    )


def test_main_runs_the_application(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["protomem", "train", "--help"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert "--refresh-ratio" in capsys.readouterr().out


# --- configuration ----------------------------------------------------------------------------------------------------


def test_flags_override_the_file_and_the_file_the_defaults(tiny, tmp_path):
    with tiny.open("a") as file:
        file.write("seed = 7\nscale = 9\n")
    stop_after(tmp_path, tiny, 0, "--name", "who", "--seed", "8", "--image-size", "20", "10")
    saved = config_from(read_toml(tmp_path / "runs" / "who" / "config.toml"), "")
    assert (saved.seed, saved.scale, saved.image_size) == (8, 9.0, (20, 10))
    assert saved.fold == TrainConfig().fold
    assert saved.width == 4


def test_a_configuration_survives_its_toml(tmp_path):
    config = TrainConfig(name='a "b" ü', image_size=(9, 10), learning_rate=1e-5, steps=3)
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
        ("margin_size = 'big'", "margin_size must be a number, got 'big'"),
        ("margin_size = nan", "margin_size must be between 0.0 and 1.5, got nan"),
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


def test_a_bad_flag_reads_like_a_bad_key(tiny):
    assert_refused(train(tiny, "--fold", 4), "fold must be between 0 and 3, got 4")


def test_help_shows_every_field():
    result = protomem("train", "--help")
    assert result.exit_code == 0
    for name in TrainConfig().as_dict():
        assert "--" + name.replace("_", "-") in result.stdout


@pytest.mark.parametrize("table", ["MARGINS", "MINING", "QUALITY"])
def test_every_choice_has_its_builder(table):
    field = {"MARGINS": "margin", "MINING": "mining", "QUALITY": "quality"}[table]
    assert tuple(getattr(heads, table)) == TrainConfig.__dataclass_fields__[field].metadata["choices"]


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail():
        with checkpoints.written_whole(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_whole_before_it_has_its_name(tmp_path, monkeypatch):
    path, events = tmp_path / "file", []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda number: (events.append("fsync"), fsync(number))[1])
    monkeypatch.setattr(Path, "replace", lambda old, new: (events.append("replace"), replace(old, new))[1])
    with checkpoints.written_whole(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent == path.parent
    assert path.read_text() == "new"
    assert events == ["fsync", "replace"]


def test_a_checkpoint_round_trips(tmp_path):
    content = {"step": 3, "weights": {"w": torch.arange(3.0)}, "seconds": 0.5}
    checkpoints.save_checkpoint(tmp_path / "c.pt", content)
    loaded = checkpoints.load_checkpoint(tmp_path / "c.pt")
    torch.testing.assert_close(loaded["weights"]["w"], content["weights"]["w"])
    assert (loaded["step"], loaded["seconds"]) == (3, 0.5)


def test_a_folder_that_is_gone(tmp_path):
    with pytest.raises(CommandError, match="cannot write"):
        checkpoints.save_checkpoint(tmp_path / "gone" / "c.pt", {})


# --- encoders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["residual", "residual-pooled"])
@pytest.mark.parametrize("size", [(56, 46), (17, 9), (8, 8)])
def test_the_residual_encoder_takes_any_size(size, name):
    torch.manual_seed(0)
    encoder = encoders.build_encoder(name, channels=3, image_size=size, embedding_dim=10, width=4, dropout=0.1)
    embeddings = encoder(torch.randn(5, 3, *size))
    assert embeddings.shape == (5, 10)
    embeddings.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


class FakeBackbone(nn.Module):
    def __init__(self, size=4):
        super().__init__()
        self.num_features = 6
        self.layer = nn.Conv2d(3, 6, size)

    def forward(self, images):
        return self.layer(images).mean((2, 3))


@pytest.fixture
def timm(monkeypatch):
    asked = []

    def create_model(name, **options):
        asked.append((name, options))
        if name == "unheard":
            raise RuntimeError("Unknown model (unheard)")
        return FakeBackbone(99 if name == "fixed" else 4)

    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create_model))
    return asked


@pytest.mark.parametrize("channels", [1, 3])
def test_a_timm_encoder(timm, channels):
    encoder = encoders.build_encoder("resnet18", channels=channels, image_size=(16, 12), embedding_dim=5)
    assert timm == [("resnet18", {"num_classes": 0})]
    assert encoder(torch.randn(4, channels, 16, 12)).shape == (4, 5)


def test_a_run_with_a_timm_encoder(tiny, tmp_path, timm):
    assert train(tiny, "--encoder", "resnet18", "--name", "timm").exit_code == 0
    assert figures(tmp_path / "runs" / "timm")["parameters"] == 3 * 6 * 16 + 6 + 6 * 8 + 16


def test_timm_errors(tiny, timm, monkeypatch):
    assert_refused(train(tiny, "--encoder", "unheard"), "timm cannot create", "Unknown model")
    assert_refused(train(tiny, "--encoder", "fixed"), "'fixed' cannot take images of 16 x 12")
    monkeypatch.setitem(sys.modules, "timm", None)
    assert_refused(train(tiny, "--encoder", "resnet18"), "timm cannot be imported", "protomem-kernels[timm]")


# --- augmentation -----------------------------------------------------------------------------------------------------


def changed(seed, strength=1.0, images=None):
    images = torch.rand(6, 1, 24, 20, generator=torch.Generator().manual_seed(1)) if images is None else images
    return augmentation.augment(images, torch.Generator().manual_seed(seed), strength)


def test_augmentation_depends_on_its_generator_alone():
    first = changed(0)
    torch.rand(100)
    assert torch.equal(changed(0), first)
    assert not torch.equal(changed(1), first)
    assert first.shape == (6, 1, 24, 20)
    assert first.isfinite().all()


def test_augmentation_leaves_its_input_alone():
    images = torch.rand(3, 3, 10, 10)
    before = images.clone()
    changed(0, images=images)
    assert torch.equal(images, before)


def test_no_strength_mirrors_and_standardises_only():
    images = torch.rand(16, 1, 12, 10)
    result, plain = changed(0, 0.0, images), augmentation.standardise(images)
    same = torch.stack([torch.isclose(result, view, atol=1e-4).all((3, 2))[:, 0] for view in (plain, plain.flip(3))])
    assert same.any(0).all()
    assert same.any(1).all()


def test_standardised_images():
    images = torch.rand(4, 3, 8, 9)
    images[0] = 0.5
    result = augmentation.standardise(images)
    torch.testing.assert_close(result.mean((1, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(result[1:].std((1, 2, 3), correction=0), torch.ones(3), atol=1e-2, rtol=0)
    assert (result[0].abs() < 1e-3).all()


def test_a_cover_hides_a_rectangle_of_its_share():
    images = torch.ones(200, 1, 40, 40)
    hidden = augmentation.cover(images, torch.Generator().manual_seed(0), 1.0) == 0
    share = hidden.float().mean((1, 2, 3))
    assert (share > 0).all()
    assert (share <= 0.5**2 + 0.05).all()
    assert torch.equal(augmentation.cover(images, torch.Generator().manual_seed(0), 0.0), images)


def test_seeds_of_their_own():
    seeds = {training.stream(seed, what, step) for seed in range(5) for what in ("a", "b") for step in range(50)}
    assert len(seeds) == 500
    assert all(0 <= seed < 2**32 for seed in seeds)
