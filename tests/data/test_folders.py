"""Folders as people have them: what is taken, and what is counted and named as left out."""

import os
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from protomem_kernels.data.errors import DatasetError
from protomem_kernels.data.images import image_folder
from protomem_kernels.data.reading import read_all


def save(path: Path, format=None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (10, 20, 30)).save(path, format)


def refuses(message: str):
    return pytest.raises(DatasetError, match=message)


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("ann/1.png", "ann/2.png", "bob/1.gif", "bob/2.webp", "bob/3.JPG"):
        save(tmp_path / name)
    save(tmp_path / "ann" / "3.jfif", "jpeg")
    return tmp_path


def test_whatever_pillow_reads_is_taken(folder):
    save(folder / "bob" / "4.avif")
    dataset = image_folder(folder)
    assert [path.name for path in dataset.paths] == ["1.png", "2.png", "3.jfif", "1.gif", "2.webp", "3.JPG", "4.avif"]
    assert dataset.left_out.lines() == []
    assert read_all(dataset)[0] is dataset


def test_all_else_is_counted_and_named(folder):
    for name in ("loose.png", "ann/deep/1.png", "ann/deep/er/2.png", "__MACOSX/ann/._1.png", "ann/@eaDir/1.png"):
        save(folder / name)
    for number in range(11):
        save(folder / f"solo{number}" / "1.png")
    for name in ("readme.md", "ann/notes.txt", "ann/.hidden", "ann/Thumbs.db", "ann/5.heic", "ann/6.heic"):
        (folder / name).write_text("no image")
    (folder / "ann" / "7.png").write_bytes(b"")
    (folder / "void").mkdir()
    (folder / "lost+found").mkdir(mode=0)
    dataset = image_folder(folder)
    assert dataset.names == ["ann", "bob"]
    assert len(dataset) == 6
    assert dataset.left_out.lines() == [
        "left out, folders of the system's: 3 (__MACOSX, lost+found, ann/@eaDir)",
        "left out, files that are no images: 2 (readme.md, ann/notes.txt)",
        "left out, images beside the folders of identities: 1 (loose.png)",
        "left out, .heic files (pip install 'pillow-heif'): 2 (ann/5.heic, ann/6.heic)",
        "left out, empty files: 1 (ann/7.png)",
        "left out, images deeper than one folder down: 2 (ann/deep/1.png, ann/deep/er/2.png)",
        "left out, identities with a single image: 11 (solo0, solo1, solo2, ...)",
        "left out, folders without an image: 1 (void)",
    ]
    assert len(dataset.left_out) == 23
    with refuses(f"^{folder}: expected nothing to be left out .--strict., got .*: 11 .solo0, .*; [^\n]*$"):
        dataset.left_out.refuse(str(folder))
    assert dataset.subset_of_identities([0]).left_out is dataset.left_out


@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_read_is_left_out_and_named(folder, workers):
    save(folder / "eve" / "1.png")
    (folder / "eve" / "2.png").write_bytes(b"\x89PNG but not quite")
    whole = (folder / "ann" / "1.png").read_bytes()
    (folder / "ann" / "2.png").write_bytes(whole[:-30])
    dataset = image_folder(folder, image_size=(3, 5))
    readable, images = read_all(dataset, workers=workers)
    assert [path.name for path in readable.paths] == ["1.png", "3.jfif", "1.gif", "2.webp", "3.JPG"]
    assert readable.labels.tolist() == [0, 0, 1, 1, 1]
    assert torch.equal(images, readable.load_all())
    assert [re.sub(": [A-Z].*", "", line) for line in readable.left_out.lines()] == [
        "left out, images that cannot be read: 2 (ann/2.png",
        "left out, identities with fewer than two readable images: 1 (eve)",
    ]
    again, nothing = read_all(dataset, keep=False)
    assert (again.paths, nothing) == (readable.paths, None)


def test_nobody_with_two_readable_images(tmp_path):
    for name in ("1.png", "2.png"):
        save(tmp_path / "ann" / name)
        (tmp_path / "ann" / name).write_bytes(b"no")
    with refuses("expected identities with two readable images, got none: left out, images that cannot be read: 2"):
        read_all(image_folder(tmp_path))


def test_folders_that_are_none(tmp_path):
    with refuses("missing: expected a folder with one sub-folder per identity, got nothing there"):
        image_folder(tmp_path / "missing")
    save(tmp_path / "1.png")
    with refuses("1.png: expected a folder with one sub-folder per identity, got a file"):
        image_folder(tmp_path / "1.png")
    with refuses("expected one sub-folder per identity, got no sub-folder and 1 image files"):
        image_folder(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("")
    with refuses(r"expected images \(.*\.bmp .*\.jpeg .*\) in the sub-folders, got none in 1$"):
        image_folder(tmp_path)
    save(tmp_path / "a" / "ann" / "1.png")
    with refuses(f"got none in 1 and 1 deeper down; is {re.escape(str(tmp_path / 'a'))} the folder of identities"):
        image_folder(tmp_path)
    save(tmp_path / "a" / "1.png")
    with refuses("at least two images of each identity, got fewer for all of 1 sub-folders: .* single image: 1 .a."):
        image_folder(tmp_path)


def test_folders_that_cannot_be_read(folder, monkeypatch):
    scandir = os.scandir

    def closed(path):
        if Path(path).name in names:
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    names = {"ann"}
    assert image_folder(folder).left_out.lines() == ["left out, folders that cannot be read: 1 (ann)"]
    names = {folder.name}
    with refuses("expected a readable folder, got Permission denied"):
        image_folder(folder)
