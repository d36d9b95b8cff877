"""insightface's .bin: read whoever wrote it, and never run."""

import os
import pickle
import pickletools

import numpy as np
import pytest

from protomem_kernels.data.bins import PairFile
from protomem_kernels.data.decoding import decode
from protomem_kernels.data.errors import DatasetError
from protomem_kernels.data.records import Record
from tests.data.packing import png, write_bin

IMAGES = [png(person, image) for person in range(3) for image in range(2)]
SAME = [True, False, True]


def arrays():
    return [np.frombuffer(image, np.uint8).copy() for image in IMAGES]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("images", [IMAGES, arrays()], ids=["bytes", "arrays"])
@pytest.mark.parametrize("same", [SAME, np.array(SAME), [1, 0, 1], list(np.array(SAME))], ids=str)
def test_pairs(tmp_path, protocol, images, same):
    write_bin(tmp_path / "lfw.bin", images, same, protocol)
    pairs = PairFile(tmp_path / "lfw.bin")
    assert pairs.same.dtype == bool
    assert pairs.same.tolist() == SAME
    assert [pairs.read(place) for place in range(len(pairs))] == IMAGES
    record = Record(pairs, 3)
    assert str(record) == "lfw.bin/1b"
    assert decode(record.read(), mode="RGB")[:, 0, 0].tolist() == [1, 1, 0]


def test_python_2_wrote_most_of_them(tmp_path):
    """As protocol 2 of Python 2 has it: bytes are its plain strings."""
    strings = b"".join(pickle.BINSTRING + len(image).to_bytes(4, "little") + image for image in IMAGES)
    images = pickle.EMPTY_LIST + pickle.MARK + strings + pickle.APPENDS
    same = pickle.EMPTY_LIST + pickle.MARK + pickle.NEWTRUE + pickle.NEWFALSE + pickle.NEWTRUE + pickle.APPENDS
    (tmp_path / "lfw.bin").write_bytes(pickle.PROTO + b"\x02" + images + same + pickle.TUPLE2 + pickle.STOP)
    pairs = PairFile(tmp_path / "lfw.bin")
    assert [pairs.read(place) for place in range(6)] == IMAGES


class Malice:
    def __init__(self, call, *arguments):
        self.what = call, arguments

    def __reduce__(self):
        return self.what


@pytest.mark.parametrize(
    "call",
    [
        (os.system, "touch RAN"),
        (eval, "open('RAN', 'w')"),
        (getattr, 1, "real"),
        (np.load, "RAN"),
        (np.frombuffer, b"a", "u1"),
        (pickle.loads, pickle.dumps(1)),
    ],
    ids=lambda call: call[0].__name__,
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_nothing_in_it_is_called(tmp_path, monkeypatch, call, protocol):
    monkeypatch.chdir(tmp_path)
    write_bin(tmp_path / "evil.bin", [*IMAGES[:5], Malice(*call)], SAME, protocol)
    with pytest.raises(DatasetError, match=r"evil\.bin: expected pickled pairs of images, got .* it was not called"):
        PairFile("evil.bin")
    assert not (tmp_path / "RAN").exists()


def test_a_few_bytes_do_not_become_many(tmp_path):
    write_bin(tmp_path / "evil.bin", [*IMAGES[:5], Malice(bytearray, 10**12)], SAME)
    with pytest.raises(DatasetError, match="bytes of a number"):
        PairFile(tmp_path / "evil.bin")


@pytest.mark.parametrize("dtype", [object, "U3", "f4", [("a", "u1")]], ids=str)
def test_arrays_of_other_things_are_refused(tmp_path, dtype):
    write_bin(tmp_path / "evil.bin", [*IMAGES[:5], np.zeros(3, dtype)], SAME)
    with pytest.raises(DatasetError, match=r"evil\.bin"):
        PairFile(tmp_path / "evil.bin")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"a": 1}, "expected images and whether they are the same, got a dict of 1"),
        ((IMAGES, 3), "expected two lists, got a list of 6 and a int, 3"),
        ((IMAGES, SAME[:2]), "expected two images a pair, got 6 for 2 pairs"),
        (([], []), "expected two images a pair, got 0 for 0 pairs"),
        ((IMAGES, [True, False, "no"]), "expected true or false for each pair, got a str of 2"),
        ((IMAGES, [True, False, 2]), "expected true or false for each pair, got a int, 2"),
        (([*IMAGES[:5], "text"], SAME), r"x\.bin/2b: expected the bytes of an image, got a str of 4"),
        (([*IMAGES[:5], np.zeros(3, np.int16)], SAME), r"x\.bin/2b: expected the bytes of an image, got a array"),
    ],
)
def test_a_pickle_of_something_else_is_told(tmp_path, content, said):
    (tmp_path / "x.bin").write_bytes(pickle.dumps(content))
    with pytest.raises(DatasetError, match=said):
        PairFile(tmp_path / "x.bin")


def test_a_damaged_file_is_told(tmp_path):
    content = pickle.dumps((IMAGES, SAME))
    assert list(pickletools.genops(content))
    for damaged in (content[:-10], b"", b"\xff" + content, b"\x80\x04."):
        (tmp_path / "x.bin").write_bytes(damaged)
        with pytest.raises(DatasetError, match=r"x\.bin: expected pickled pairs"):
            PairFile(tmp_path / "x.bin")
    with pytest.raises(DatasetError, match=r"no\.bin: expected a readable file"):
        PairFile(tmp_path / "no.bin")
