"""The images of a run: who trains and who verifies, and data that is no good."""

import pytest
import torch
from PIL import Image

from protomem_kernels.training import faces
from protomem_kernels.training.config import TrainConfig
from tests.data.packing import png, write_rec, write_tar
from tests.training.running import assert_refused, figures, train


def test_inner_folds_leave_the_fold_alone():
    outer = faces.Faces(TrainConfig(fold=1))
    inner = [faces.Faces(TrainConfig(fold=1, inner_fold=number)) for number in range(3)]
    assert torch.cat([split.unseen.identities for split in inner]).equal(outer.train.identities)
    for split in inner:
        everyone = torch.cat((split.train.identities, split.unseen.identities))
        assert everyone.sort().values.equal(outer.train.identities)


def test_a_folder_too_large_for_memory_trains_the_same(tiny, tmp_path, monkeypatch):
    assert train(tiny, "--name", "memory").exit_code == 0
    monkeypatch.setattr(faces, "IN_MEMORY", 0)
    assert train(tiny, "--name", "disk").exit_code == 0
    assert figures(tmp_path / "runs" / "disk") == figures(tmp_path / "runs" / "memory")


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


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (broken_nowhere, "expected a folder"),
        (broken_a_file, "expected a folder"),
        (broken_empty, "sub-folder"),
        (broken_no_images, "expected images"),
        (
            broken_single_image,
            "has 7 identities; at least 8 are needed to keep a quarter of them, and no fewer than two, "
            "for verification; left out, identities with a single image: 1 (p7)",
        ),
        (broken_too_few, "has 7 identities; at least 8"),
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
    write_images(root, [3] * 8)

    def break_one(dataset, **options):
        (root / "p5" / "1.png").write_bytes(b"\x89PNG but not quite")
        return dataset, None

    monkeypatch.setattr(faces, "read_all", break_one)
    result = train(tiny, "--data", root, "--workers", workers, "--steps", 30)
    assert_refused(result, "1.png", "expected a readable image")


def test_what_is_left_out_is_said_and_does_not_stop_the_run(tiny, tmp_path):
    root = tmp_path / "data"
    write_images(root, [3] * 9 + [1])
    (root / "p5" / "1.png").write_bytes(b"\x89PNG but not quite")
    (root / "p6" / "0.png").write_bytes(b"")
    (root / "p8" / "1.png").write_bytes(b"no")
    (root / "p8" / "2.png").write_bytes(b"no")
    (root / "void").mkdir()
    (root / "@eaDir").mkdir()
    result = train(tiny, "--data", root)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    unknown = "p{}.png: UnidentifiedImageError: none of a format that Pillow knows"
    start = next(place for place, line in enumerate(lines) if "data:" in line)
    assert lines[:start] == [
        "left out, folders of the system's: 1 (@eaDir)",
        "left out, empty files: 1 (p6/0.png)",
        "left out, identities with a single image: 1 (p9)",
        "left out, folders without an image: 1 (void)",
        f"left out, images that cannot be read: 3 ({unknown.format('5/1')}, {unknown.format('8/1')}, "
        f"{unknown.format('8/2')})",
        "left out, identities with fewer than two readable images: 1 (p8)",
    ]
    assert_refused(
        train(tiny, "--data", root, "--strict"),
        f"{root}: expected nothing to be left out (--strict), got folders of the system's: 1 (@eaDir); empty files: 1",
    )
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["data"]


def test_an_image_beyond_the_limit_is_left_out_with_its_size(tiny, tmp_path):
    root = tmp_path / "data"
    write_images(root, [3] * 8)
    Image.new("L", (200, 100)).save(root / "p2" / "9.png")
    result = train(tiny, "--data", root, "--max-megapixels", 0.015)
    assert "left out, images that cannot be read: 1 (p2/9.png: 100 x 200 = 0.02 megapixels)" in result.output


def test_a_rec_and_tars_train_as_a_folder_of_the_same_images_does(tiny, tmp_path):
    (tmp_path / "tars").mkdir()
    write_rec(tmp_path / "train.rec", [3] * 8)
    images = {f"{person}/{image}": png(person, image) for person in range(8) for image in range(3)}
    write_tar(tmp_path / "tars" / "0.tar", {f"{name}.png": image for name, image in images.items()})
    for name, image in images.items():
        file = tmp_path / "folder" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image)
    came = {}
    for name in ("train.rec", "tars", "folder"):
        assert train(tiny, "--name", name, "--data", tmp_path / name, "--workers", 1).exit_code == 0
        came[name] = figures(tmp_path / "runs" / name) | {"data": ""}
    assert came["train.rec"] == came["tars"] == came["folder"]
    assert came["folder"]["train_identities"] == 6


def test_who_is_held_out_of_a_folder_is_drawn_by_the_seed(people):
    size = {"data": str(people), "image_size": (16, 12)}
    held_out = {seed: faces.Faces(TrainConfig(seed=seed, **size)).unseen.identities.tolist() for seed in range(6)}
    assert any(held_out[seed] != [6, 7] for seed in held_out)  # the last by name
    assert len({tuple(found) for found in held_out.values()}) > 2
    assert faces.Faces(TrainConfig(seed=3)).unseen.identities.tolist() == list(range(30, 40))


def test_a_small_set_says_that_it_is_beside_its_figures(tiny, tmp_path):
    result = train(tiny, "--name", "small")
    assert "95 %:  accuracy 0." in result.stdout
    assert "note:  16 impostor pairs cannot show a FAR of 0.01: TAR there lets no impostor in" in result.stdout
    assert "note:  2 identities say little: accuracy " in result.stdout
    metrics = figures(tmp_path / "runs" / "small")
    assert (
        metrics["verification_accuracy_low"]
        <= metrics["verification_accuracy"]
        <= metrics["verification_accuracy_high"]
    )
    assert len(metrics["cautions"]) == 3


@pytest.mark.parametrize(
    ("size", "expected"), [((20, 15), (20, 15)), ((300, 300), (112, 112)), ((90, 180), (56, 112)), ((4, 4), (8, 8))]
)
def test_the_image_size_follows_the_data_unless_given(tmp_path, size, expected):
    write_images(tmp_path, [2] * 8, size=size[::-1])
    found = faces.Faces(TrainConfig(data=str(tmp_path)))
    assert found.config.image_size == found.image_size == expected
    assert f"cropped to {expected[0]} x {expected[1]}" in found.summary
    assert faces.Faces(TrainConfig(data=str(tmp_path), image_size=(16, 12))).image_size == (16, 12)
    assert faces.Faces(TrainConfig()).image_size == (56, 46)
