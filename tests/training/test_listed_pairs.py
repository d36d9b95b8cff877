"""Lists of pairs that verify a run: of a file, among its own images, and of insightface's .bin."""

import json

import pytest

from protomem_kernels.data.evaluation import evaluate_pairs
from protomem_kernels.training import report
from protomem_kernels.training.config import TrainConfig
from protomem_kernels.training.errors import RunError
from protomem_kernels.training.faces import Faces
from protomem_kernels.training.thresholds import read_thresholds
from tests.data.packing import write_bin
from tests.training.running import assert_refused, figures, protomem, train

SEEN = "person0/0.png person0/1.png 1"  # trains
LINES = [
    "image other same",
    *(f"person{person}/{image}.png person{person}/{image + 1}.png 1" for person in (2, 5) for image in range(3)),
    *(f"person2/{image}.png person5/{image}.png 0" for image in range(4)),
]


@pytest.fixture
def listed(tmp_path):
    """Options of a run that is verified on ten pairs of two identities, of which a line names one that trains."""
    (tmp_path / "names").write_text("person2\nperson5\n")
    (tmp_path / "pairs.txt").write_text("\n".join([*LINES, SEEN]))
    return ("--held-out", tmp_path / "names", "--pairs", tmp_path / "pairs.txt")


@pytest.fixture
def packed(tmp_path, people):
    """A .bin of eleven pairs, of one of which an image is broken."""
    first = [(people / f"person{p}" / "0.png").read_bytes() for p in range(8)]
    second = [(people / f"person{p}" / "1.png").read_bytes() for p in range(8)]
    genuine = [image for pair in zip(first[:5], second, strict=False) for image in pair]
    impostors = [image for pair in zip(first[:5], second[1:], strict=False) for image in pair]
    write_bin(tmp_path / "lfw.bin", [*genuine, b"broken", first[0], *impostors], [True] * 5 + [True] + [False] * 5)
    return tmp_path / "lfw.bin"


def test_ones_own_list_verifies(tiny, tmp_path, listed, people, monkeypatch):
    drawn = {}
    monkeypatch.setattr(report, "draw_roc", lambda path, *curves, subtitle: drawn.update(roc=curves, subtitle=subtitle))
    monkeypatch.setattr(report, "draw_pairs", lambda path, accepts, rejects, subtitle: drawn.update(worst=accepts))
    result = train(tiny, "--name", "listed", *listed)
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    absent = "pairs with an image that is not among those that verify: 1 (line 12: person0/0.png)"
    assert f"pairs.txt: left out, {absent}" in said
    assert "10 pairs among 2 unseen ones verify" in said
    assert "Verification of 10 pairs among 2 identities never trained on" in said
    assert "rank-1" not in said
    metrics = figures(tmp_path / "runs" / "listed")
    assert (metrics["genuine_pairs"], metrics["impostor_pairs"], metrics["listed_pairs"]) == (6, 4, 10)
    assert (metrics["rank1"], metrics["baseline_rank1"], metrics["rank1_probes"]) == (None, None, 0)
    assert metrics["unseen_identities"] == 2
    assert "10 pairs among 2 identities" in drawn["subtitle"]
    assert len(drawn["roc"][0].false_accepts) <= 11
    assert {tuple(name.split("/")[0] for name in pair.names) for pair in drawn["worst"]} == {("person2", "person5")}
    assert len(drawn["worst"]) == 4
    assert read_thresholds(tmp_path / "runs" / "listed").impostor_pairs == 4
    image = people / "person0" / "0.png"
    verdict = protomem("verify", image, image, "--run", tmp_path / "runs" / "listed", "--far", 0.5)
    assert "(4 impostor pairs)" in verdict.output


def test_a_bin_verifies(tiny, tmp_path, packed, people):
    result = train(tiny, "--name", "bin", "--validation", packed, "--steps", 4, "--validate-every", 2)
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    assert "lfw.bin: left out, images that cannot be read: 1 (lfw.bin/5a:" in said
    assert "lfw.bin: left out, pairs with an image that cannot be read: 1 (lfw.bin/5)" in said
    assert "8 identities train (32 images), 10 pairs of" in said
    assert "Verification of 10 pairs" in said
    assert "never trained on" not in said
    metrics = figures(tmp_path / "runs" / "bin")
    assert (metrics["train_identities"], metrics["unseen_identities"], metrics["rank1"]) == (8, None, None)
    assert "10 pairs say little: accuracy" in said
    # Raw pixels need no training, so that their figures can be had without a run.
    faces = Faces(TrainConfig(data=str(people), image_size=(16, 12), validation=str(packed)))
    images = next(faces.unseen_batches())[0]
    assert faces.pairs.same.tolist() == [True] * 5 + [False] * 5
    assert [str(faces.unseen.paths[place]) for place in faces.pairs.first[4:6]] == ["lfw.bin/4a", "lfw.bin/6a"]
    expected = evaluate_pairs((images - images.mean((1, 2, 3), keepdim=True)).flatten(1), faces.pairs)
    assert metrics["baseline_auc"] == pytest.approx(expected.auc)


def test_pictures_of_listed_pairs(tiny, tmp_path, packed, pictures):
    assert train(tiny, "--name", "drawn", "--validation", packed).exit_code == 0
    for name in ("roc.png", "hardest_pairs.png"):
        assert (tmp_path / "runs" / "drawn" / name).stat().st_size > 1000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (SEEN, "expected at least two pairs of one identity and two of different ones, got 0 and 0; left out, pairs"),
        ("\n".join([*LINES, "person2/0.png 1"]), "pairs.txt, line 12: expected two images and 1 or 0"),
        (None, "pairs.txt: expected a readable list of pairs"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused_before_anything_is_written(tiny, tmp_path, listed, text, said):
    (tmp_path / "pairs.txt").unlink() if text is None else (tmp_path / "pairs.txt").write_text(text)
    assert_refused(train(tiny, *listed), said)
    assert not (tmp_path / "runs").exists()


def test_nothing_may_be_left_out_of_a_list_under_strict(tiny, tmp_path, listed):
    assert_refused(train(tiny, *listed, "--strict"), "pairs.txt: expected nothing to be left out (--strict), got pairs")


def test_a_bin_without_readable_images_is_refused(tiny, tmp_path):
    write_bin(tmp_path / "x.bin", [b"no"] * 4, [True, False])
    assert_refused(train(tiny, "--validation", tmp_path / "x.bin"), "expected readable images, got none: left out")
    assert_refused(train(tiny, "--validation", tmp_path / "no.bin"), "no.bin: expected a readable file")


@pytest.mark.parametrize("validation", ["none", "lfw.bin"])
def test_options_that_contradict_each_other(validation):
    with pytest.raises(RunError, match=f"pairs must be left out where validation is '{validation}', got 'x'"):
        TrainConfig(validation=validation, pairs="x")


def test_the_best_encoder_is_chosen_by_the_list(tiny, tmp_path, listed):
    assert train(tiny, "--name", "best", *listed, "--steps", 4, "--validate-every", 2).exit_code == 0
    metrics = json.loads((tmp_path / "runs" / "best" / "metrics.json").read_text())
    assert metrics["best_step"] in (2, 4)
    assert metrics["genuine_pairs"] == 6
