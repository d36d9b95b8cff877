"""A file of images is whole and the one that was asked for, or it is made again."""

import json
import os

import numpy as np
import pytest
import torch

from protomem_kernels.data.errors import DatasetError
from protomem_kernels.data.image_store import ENDING, TAIL, kept_images

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 3, 4, 5), np.uint8)
LABELS, QUALITY = np.arange(6), np.linspace(0, 1, 6, dtype=np.float32)
MADE_OF = {"version": 1, "what": ["noise", 0.5]}


@pytest.fixture
def path(tmp_path):
    kept(tmp_path / "folder" / "noise.images")
    return tmp_path / "folder" / "noise.images"


def kept(path, made_of=MADE_OF):
    """Return what is kept, the lines about it, and how often it was made."""
    made = []

    def make(writer):
        made.append(True)
        writer.add(IMAGES[:4], labels=LABELS[:4], quality=QUALITY[:4])
        writer.add(IMAGES[4:], labels=LABELS[4:], quality=QUALITY[4:])
        return {"said": "six"}

    stored, lines = kept_images(path, made_of, (3, 4, 5), make)
    assert torch.equal(stored.images, torch.from_numpy(IMAGES))
    assert (stored.columns["labels"] == LABELS).all()
    assert (stored.columns["quality"] == QUALITY).all()
    assert stored.columns["quality"].dtype == np.float32
    assert stored.notes == {"said": "six"}
    return lines, len(made)


def test_they_are_made_once(path):
    size = path.stat().st_size
    assert size > IMAGES.nbytes + LABELS.nbytes + QUALITY.nbytes + TAIL
    assert kept(path) == ([], 0)
    assert [file.name for file in path.parent.iterdir()] == ["noise.images"]


def damage(path, change) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def change_a_pixel(data: bytearray) -> None:
    data[17] ^= 1


def change_a_label(data: bytearray) -> None:
    data[IMAGES.nbytes + 8] ^= 1


def change_the_line(data: bytearray) -> None:
    data[-TAIL - 2] = 0


def change_the_length(data: bytearray) -> None:
    data[-TAIL] ^= 1


def change_the_length_beyond_the_file(data: bytearray) -> None:
    data[-len(ENDING) - 1] = 255


@pytest.mark.parametrize(
    "change",
    [change_a_pixel, change_a_label, change_the_line, change_the_length, change_the_length_beyond_the_file],
)
def test_a_damaged_file_is_made_again(path, change):
    damage(path, change)
    assert kept(path) == ([f"{path}: expected images that were kept, got a damaged file; they are made again"], 1)
    assert kept(path) == ([], 0)


@pytest.mark.parametrize("left", [0, 1, TAIL, 100, -1, -TAIL])
def test_a_file_that_is_cut_short_is_made_again(path, left):
    path.write_bytes(path.read_bytes()[:left])
    expected = f"{path}: expected images that were kept, got a file that is cut short, or of another kind"
    assert kept(path) == ([f"{expected}; they are made again"], 1)
    assert kept(path) == ([], 0)


def test_other_images_are_made_again(path):
    lines, made = kept(path, MADE_OF | {"version": 2})
    assert made == 1
    assert lines == [f"{path}: expected images that were kept, got others (different version); they are made again"]
    assert kept(path, MADE_OF | {"version": 2}) == ([], 0)


def test_another_format_is_made_again(path):
    def raise_the_format(data: bytearray) -> None:
        start = data.rindex(b'{"format": 1')
        data[start : start + 12] = b'{"format": 2'

    damage(path, raise_the_format)
    lines, made = kept(path)
    assert (lines, made) == (
        [f"{path}: expected images that were kept, got a file of format 2, not 1; they are made again"],
        1,
    )


def test_the_line_is_json_that_other_programs_read(path):
    data = path.read_bytes()
    length = int.from_bytes(data[-TAIL : -len(ENDING)], "little")
    line = json.loads(data[-TAIL - length : -TAIL])
    assert (line["count"], line["image"], line["made_of"]) == (6, [3, 4, 5], MADE_OF)
    assert data[: IMAGES.nbytes] == IMAGES.tobytes()


def test_what_a_maker_raises_is_raised_and_leaves_the_old_file(path):
    def make(writer):
        writer.add(IMAGES, labels=LABELS)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        kept_images(path, {"version": 3}, (3, 4, 5), make)
    assert kept(path) == ([], 0)
    assert len(list(path.parent.iterdir())) == 1


def test_a_reader_of_the_progress_that_is_gone_is_no_fault_of_the_file(tmp_path):
    def make(writer):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        kept_images(tmp_path / "noise", {}, (3, 4, 5), make)
    assert list(tmp_path.iterdir()) == []


def test_only_what_was_abandoned_is_removed(path):
    fresh, old = (path.with_name(f".writing-{number}-{path.name}") for number in (1, 2))
    for file in (fresh, old):
        file.write_bytes(b"half")
    os.utime(old, (0, 0))
    kept(path, {"version": 4})
    assert sorted(file.name for file in path.parent.iterdir()) == [fresh.name, path.name]


def test_a_folder_in_the_file_s_place(tmp_path):
    (tmp_path / "noise" / "within").mkdir(parents=True)
    with pytest.raises(DatasetError, match="noise: expected to write images there, got: Is a directory"):
        kept(tmp_path / "noise")


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match="file/noise: expected to write images there, got: File exists"):
        kept(tmp_path / "file" / "noise")
