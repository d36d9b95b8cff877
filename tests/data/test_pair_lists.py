"""Lists of pairs: every form that is told to be read, and what is said of every other."""

import pytest

from protomem_kernels.data.errors import DatasetError
from protomem_kernels.data.images import ImageDataset
from protomem_kernels.data.pair_lists import ABSENT, read_pairs
from protomem_kernels.data.records import Record

NAMES = ["ann", "bob", "eve li"]
IMAGES = ImageDataset(
    [f"/data/{name}/{name}_000{image}.jpg" for name in NAMES for image in (1, 2, 3)],
    [label for label in range(3) for _ in range(3)],
    NAMES,
)
EXPECTED = ([0, 3, 0, 1], [1, 4, 3, 4], [True, True, False, False])
LFW = "ann 1 2\nbob 1 2\nann 1 bob 1\nann 2 bob 2\n"
PLAIN = [
    ("ann/ann_0001.jpg", "ann/ann_0002.jpg", "1"),
    ("bob/bob_0001.jpg", "./bob/bob_0002.jpg", "same"),
    ("ann/ann_0001.jpg", "bob/bob_0001.jpg", "False"),
    ("ann/ann_0002.jpg", "bob/bob_0002.jpg", "different"),
]
BLANKS, TABS, COMMAS = ("\n".join(mark.join(line) for line in PLAIN) for mark in ("  ", "\t", ", "))


def read(tmp_path, text, dataset=IMAGES):
    (tmp_path / "pairs.txt").write_bytes(text.encode())
    return read_pairs(tmp_path / "pairs.txt", dataset)


@pytest.mark.parametrize(
    "text",
    [
        BLANKS,
        TABS,
        COMMAS,
        LFW,
        LFW.replace(" ", "\t"),
        "10\t300\n" + LFW,
        "2\n" + LFW,
        "first second same\n" + BLANKS,
        "first,second,label\n" + COMMAS,
        "\ufeff# mine\n\n" + BLANKS.replace("\n", "\r\n\r\n# and\r\n"),
        BLANKS.replace(".jpg", ""),
    ],
    ids=range(11),
)
def test_every_form(tmp_path, text):
    pairs, left_out = read(tmp_path, text)
    assert tuple(part.tolist() for part in pairs) == EXPECTED
    assert not left_out


def test_names_with_blanks_and_commas(tmp_path):
    last = '"eve li/eve li_0001.jpg",ann/ann_0003.jpg,0\neve li/eve li_0001.jpg\teve li/eve li_0003.jpg\t1'
    pairs, _ = read(tmp_path, f"{COMMAS}\n{last}")
    assert [part.tolist()[4:] for part in pairs] == [[6, 6], [2, 8], [False, True]]


def test_images_in_records_by_their_names(tmp_path):
    class Places:
        def name_of(self, place):
            return f"train.rec/{place}"

    dataset = ImageDataset([Record(Places(), place) for place in range(1, 7)], [0, 0, 0, 1, 1, 1], NAMES)
    text = "train.rec/1 train.rec/2 1\ntrain.rec/4 train.rec/5 1\ntrain.rec/1 train.rec/4 0\ntrain.rec/2 train.rec/5 0"
    assert tuple(part.tolist() for part in read(tmp_path, text, dataset)[0]) == EXPECTED


def test_pairs_of_images_that_are_not_there_are_left_out_and_counted(tmp_path):
    pairs, left_out = read(tmp_path, f"ann 1 9\nzoe 1 ann 2\n{LFW}")
    assert tuple(part.tolist() for part in pairs) == EXPECTED
    assert left_out.lines() == [f"left out, {ABSENT}: 2 (line 1: ann/ann_0009, line 2: zoe/zoe_0001)"]
    with pytest.raises(DatasetError, match=r"at least two pairs .* got 1 and 0; left out, .*: 1 \(line 1: zoe/1\)"):
        read(tmp_path, "zoe/1 ann/1 0\nann 1 2\n")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("ann/ann_0001.jpg bob/bob_0001.jpg maybe", "expected two images and 1 or 0, .* got 'ann/ann_0001.jpg bob/"),
        ("ann/ann_0001.jpg bob/bob_0001.jpg", "expected two images and 1 or 0"),
        ("ann/ann_0001.jpg,,1", "expected two images and 1 or 0"),
        ("ann 2 2", "expected two images, got ann/ann_0002 beside itself"),
        ("ann/ann_0001.jpg bob/bob_0001.jpg 1", "expected what the data say .* got the same for ann and bob"),
        ("ann/ann_0001.jpg ann/ann_0002.jpg 0", "expected what the data say .* got different for ann twice"),
    ],
)
def test_a_line_that_is_none_is_told_by_its_number(tmp_path, line, said):
    with pytest.raises(DatasetError, match=rf"pairs\.txt, line 6: {said}"):
        read(tmp_path, f"{LFW}\n{line}\n")


def test_a_first_line_that_is_wrong_is_no_header(tmp_path):
    with pytest.raises(DatasetError, match="line 1: expected two images and 1 or 0"):
        read(tmp_path, f"ann/ann_0001.jpg ann/ann_0002.jpg yes\n{LFW}")


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(DatasetError, match=r"nothing\.txt: expected a readable list of pairs, got No such file"):
        read_pairs(tmp_path / "nothing.txt", IMAGES)
