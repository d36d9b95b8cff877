"""Who verifies a run: a data set of its own, identities that a file names, nobody; and verification on the way."""

import json
import shutil

import pytest
import torch

from protomem_kernels.data.evaluation import evaluate
from protomem_kernels.training import load_encoder, validation
from protomem_kernels.training.config import TrainConfig
from protomem_kernels.training.embedding import VerifiedEncoder
from protomem_kernels.training.errors import RunError
from protomem_kernels.training.faces import Faces
from protomem_kernels.training.validation import Validations
from tests.training.running import assert_refused, figures, protomem, stop_after, train


@pytest.fixture
def others(people, tmp_path):
    """Three of the people, under other names."""
    for number in range(3):
        shutil.copytree(people / f"person{number}", tmp_path / "others" / f"other{number}")
    return tmp_path / "others"


def test_a_folder_of_its_own_verifies_and_all_identities_train(tiny, tmp_path, others):
    result = train(tiny, "--name", "own", "--validation", others)
    assert result.exit_code == 0, result.output
    metrics = figures(tmp_path / "runs" / "own")
    assert (metrics["train_identities"], metrics["unseen_identities"], metrics["genuine_pairs"]) == (8, 3, 3 * 6)
    assert metrics["validation"] == str(others)
    assert "3 unseen ones of" in " ".join(result.stdout.split())


def test_names_in_both_are_told(tiny, people):
    result = train(tiny, "--validation", people)
    assert "8 names are in" in result.stdout
    assert "the figures are too good" in result.stdout.replace("\n", " ")


def test_everybody_trains(tiny, tmp_path):
    result = train(tiny, "--name", "all", "--validation", "none")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "runs" / "all"
    metrics = figures(folder)
    assert (metrics["train_identities"], metrics["unseen_identities"]) == (8, 0)
    assert not {"verification_accuracy", "operating_points"} & metrics.keys()
    assert "nothing verified the encoder" in result.stdout
    assert "protomem embed" in result.stdout
    assert load_encoder(folder)[0](torch.zeros(2, 3, 16, 12)).shape == (2, 8)
    image = next((tmp_path.parent).glob("people*/person0/0.png"), None)
    assert_refused(protomem("verify", image, image, "--run", folder), "was trained on everybody")


def test_the_identities_that_a_file_names_verify(tiny, tmp_path, people):
    (tmp_path / "names").write_text("person5\n\nperson2\n")
    result = train(tiny, "--name", "named", "--held-out", tmp_path / "names")
    assert result.exit_code == 0, result.output
    metrics = figures(tmp_path / "runs" / "named")
    assert (metrics["train_identities"], metrics["unseen_identities"]) == (6, 2)
    faces = Faces(TrainConfig(data=str(people), held_out=str(tmp_path / "names"), image_size=(16, 12)))
    assert [faces.unseen.names[label] for label in faces.unseen.identities.tolist()] == ["person2", "person5"]
    assert not set(faces.train.identities.tolist()) & set(faces.unseen.identities.tolist())


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("person1\nnobody\n", "line 2: expected the name of an identity of"),
        ("person1\n", "must name two identities"),
        ("\n".join(f"person{number}" for number in range(8)), "and not all of its 8, got 8"),
        (None, "cannot read held_out"),
    ],
)
def test_a_file_of_names_that_cannot_be_used(tiny, tmp_path, names, expected):
    if names is not None:
        (tmp_path / "names").write_text(names)
    assert_refused(train(tiny, "--held-out", tmp_path / "names"), expected)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"patience": 2}, "patience must be 0 without validate_every, got 2"),
        ({"validation": "none", "validate_every": 5}, "validate_every must be 0 where nothing verifies, got 5"),
        ({"validation": "x", "held_out": "y"}, "held_out must be left out where validation is 'x', got 'y'"),
    ],
)
def test_options_that_contradict_each_other(options, expected):
    with pytest.raises(RunError, match=expected):
        TrainConfig(**options)


ACCURACIES = {2: 0.6, 4: 0.9, 6: 0.9, 8: 0.8, 10: 0.95, 12: 0.5, 14: 0.4, 16: 0.3}


@pytest.fixture
def measured(monkeypatch):
    """Verifications on the way that find what ``ACCURACIES`` says, by step."""
    then = Validations.then

    def say(self, step, result):
        object.__setattr__(result, "verification_accuracy", ACCURACIES[step])
        return then(self, step, result)

    monkeypatch.setattr(Validations, "then", say)


def test_a_run_ends_where_it_is_no_longer_better_and_keeps_the_best_encoder(tiny, tmp_path, measured, monkeypatch):
    kept = {}
    validate = validation.validate

    def look(training, faces, folder, so_far):
        now = validate(training, faces, folder, so_far)
        kept[training.step] = {k: v.clone() for k, v in training.average.module.state_dict().items()}
        return now

    monkeypatch.setattr("protomem_kernels.training.loop.validate", look)
    options = ("--steps", 40, "--validate-every", 2, "--patience", 2)
    result = train(tiny, "--name", "early", *options)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "runs" / "early"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["steps"], metrics["best_step"]) == (8, 4)
    assert "verified after step 4: accuracy 0.900, the best so far" in result.stdout
    assert "verified after step 8: accuracy 0.800, the best was step 4" in result.stdout
    assert "step 4 was chosen by these figures" in result.stdout.replace("\n", " ")
    encoder, _ = load_encoder(folder)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, kept[4][name])
    # The figures are of that encoder.
    faces = Faces(TrainConfig(data=metrics["data"], image_size=(16, 12), seed=0))
    with torch.inference_mode():
        embeddings = torch.cat([VerifiedEncoder(encoder).eval()(images) for images, _ in faces.unseen_batches()])
    assert metrics["auc"] == pytest.approx(evaluate(embeddings, faces.unseen.labels, 0).auc)

    again = train(tiny, "--name", "early", "--resume", *options)
    assert again.exit_code == 0
    assert json.loads((folder / "metrics.json").read_text())["steps"] == 8
    assert train(tiny, "--name", "early", "--resume", *options[:-1], 3).exit_code == 0  # more patience
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["steps"], metrics["best_step"]) == (16, 10)


def test_what_was_found_is_gone_on_with(tiny, tmp_path, measured):
    options = ("--steps", 12, "--validate-every", 2, "--checkpoint-every", 5)
    assert train(tiny, "--name", "whole", *options).exit_code == 0
    stop_after(tmp_path, tiny, 7, "--name", "halves", *options)
    assert train(tiny, "--name", "halves", "--resume", *options).exit_code == 0
    whole, halves = (figures(tmp_path / "runs" / name) for name in ("whole", "halves"))
    assert whole == halves
    assert whole["best_step"] == 10
