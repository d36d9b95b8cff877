"""Data beside folders: each kind is told by its name or content, and gives the images with whose they are."""

import pickle
import struct

import pytest
import torch

from protomem_kernels.data import recordio, tables
from protomem_kernels.data.errors import DatasetError
from protomem_kernels.data.reading import read_all
from protomem_kernels.data.sources import labelled_images
from tests.data.packing import MAGIC, header, png, record, write_rec, write_tar


def seen(dataset):
    """(person, image) of every image, as the pixels tell it, and the name of its identity."""
    images = dataset.load_all()[:, :2, 0, 0].tolist()
    return [
        (tuple(pixels), dataset.names[label]) for pixels, label in zip(images, dataset.labels.tolist(), strict=True)
    ]


EXPECTED = [((person, image), str(person)) for person, count in ((0, 2), (2, 3)) for image in range(count)]


@pytest.mark.parametrize("with_header", [True, False], ids=["insightface", "plain"])
def test_rec(tmp_path, with_header):
    write_rec(tmp_path / "train.rec", [2, 1, 3], with_header=with_header)
    for root in (tmp_path / "train.rec", tmp_path):
        dataset = labelled_images(root)
        assert seen(dataset) == EXPECTED
        assert dataset.left_out.lines() == ["left out, identities with a single image: 1 (1)"]
        assert str(dataset.paths[0]) == "train.rec/1"


def test_a_record_that_holds_the_magic_number_is_put_together(tmp_path):
    content = header(7) + b"12345678" + MAGIC + b"ab" * 2 + MAGIC + MAGIC + b"xyz"
    assert record(content).count(MAGIC) == 4
    (tmp_path / "a.rec").write_bytes(b"0123" + record(content) + record(header(8)))
    (tmp_path / "a.idx").write_text(f"5\t4\n6\t{4 + len(record(content))}\n")
    file = recordio.RecordFile(tmp_path / "a.rec")
    assert file.read(5) == content[24:]
    assert (file.keys, file.whose) == ([5, 6], ["7", "8"])


def test_a_broken_image_in_a_rec_is_left_out_and_a_broken_rec_is_told(tmp_path):
    write_rec(tmp_path / "a.rec", [3, 2], image=lambda person, n: b"" if (person, n) == (0, 1) else png(person, n))
    dataset, pixels = read_all(labelled_images(tmp_path / "a.rec", image_size=(3, 4)))
    assert len(pixels) == len(dataset) == 4
    assert dataset.left_out.lines()[0].startswith("left out, images that cannot be read: 1 (a.rec/2: an empty file")
    content = (tmp_path / "a.rec").read_bytes()
    (tmp_path / "a.rec").write_bytes(content[:-20])
    with pytest.raises(DatasetError, match=r"a\.rec: expected MXNet's RecordIO with faces, got a record .* cut off"):
        labelled_images(tmp_path / "a.rec")
    (tmp_path / "a.rec").write_bytes(b"\0" * len(content))
    with pytest.raises(DatasetError, match="got no record at 0"):
        labelled_images(tmp_path / "a.rec")
    (tmp_path / "a.idx").write_text("1 2\n")
    with pytest.raises(DatasetError, match=r"a\.idx: expected lines of a key and an offset"):
        labelled_images(tmp_path / "a.rec")
    (tmp_path / "a.idx").unlink()
    with pytest.raises(DatasetError, match=r"a\.idx: expected the index of a \.rec beside it"):
        labelled_images(tmp_path / "a.rec")


def test_a_rec_whose_header_promises_too_much_is_told(tmp_path):
    (tmp_path / "a.rec").write_bytes(record(struct.pack("<IfQQ", 2**31, 0.0, 0, 0)))
    (tmp_path / "a.idx").write_text("0\t0\n")
    with pytest.raises(DatasetError, match=f"a record of 24 bytes for {2**31} labels"):
        labelled_images(tmp_path / "a.rec")
    first, lies = record(header(2.0, 3.0)), record(header(1.0, 1e9))
    (tmp_path / "a.rec").write_bytes(first + lies)
    (tmp_path / "a.idx").write_text(f"0\t0\n2\t{len(first)}\n")
    with pytest.raises(DatasetError, match="an identity of records 1 to 1e"):
        labelled_images(tmp_path / "a.rec")


def samples(label="cls"):
    members = {}
    for place, (person, image) in enumerate([(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2)]):
        members[f"deep/{place:04}.png"] = png(person, image)
        members[f"deep/{place:04}.{label}"] = f"{person}\n".encode()
    return members


def test_tars(tmp_path):
    members = samples()
    extra = {"deep/0100.png": png(0, 9), "deep/0101.cls": b"0", "deep/.hidden.png": b"", "README.md": b"hello"}
    names = list(members)
    write_tar(tmp_path / "a-000.tar", {name: members[name] for name in names[:6]})
    write_tar(tmp_path / "a-001.tar", {name: members[name] for name in names[6:]} | extra)
    dataset = labelled_images(tmp_path)
    assert seen(dataset) == EXPECTED
    assert dataset.left_out.lines() == [
        "left out, samples that name no identity: 1 (deep/0100)",
        "left out, samples without an image: 2 (deep/0101, README)",
        "left out, identities with a single image: 1 (1)",
    ]
    assert str(dataset.paths[0]) == "a-000.tar/deep/0000.png"
    assert seen(labelled_images(tmp_path / "a-001.tar")) == EXPECTED[2:]


def test_tars_whose_identities_stand_elsewhere(tmp_path):
    write_tar(tmp_path / "a.tar", samples("who.txt"))
    assert seen(labelled_images(tmp_path / "a.tar", label_column="who.txt")) == EXPECTED
    write_tar(tmp_path / "b.tar", {f"all/{p}/{n}.png": png(p, n) for (p, n), _ in EXPECTED})
    assert seen(labelled_images(tmp_path / "b.tar")) == EXPECTED
    (tmp_path / "c.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(DatasetError, match=r"c\.tar: expected an uncompressed tar file"):
        labelled_images(tmp_path / "c.tar")


@pytest.fixture
def hugging_face(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    library.disable_progress_bars()
    return library


def table(library, image="image", label="label", **types):
    rows = [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2)]
    images = [{"bytes": png(*row), "path": None} for row in rows]
    features = {image: library.Image(), label: library.ClassLabel(names=["0", "1", "2"])} | types
    columns = {image: images, label: [person for person, _ in rows]}
    return library.Dataset.from_dict(columns, features=library.Features(features))


@pytest.mark.filterwarnings("ignore")
def test_tables(hugging_face, tmp_path):
    made = table(hugging_face)
    made.save_to_disk(tmp_path / "saved")
    made.to_parquet(tmp_path / "made.parquet")
    hugging_face.DatasetDict({"train": made, "test": made}).save_to_disk(tmp_path / "both")
    for name in ("saved", "made.parquet", "both"):
        dataset = labelled_images(tmp_path / name)
        assert seen(dataset) == EXPECTED, name
        assert str(dataset.paths[0]) == f"{name}/0"
    assert seen(pickle.loads(pickle.dumps(dataset))) == EXPECTED  # as it goes to workers


@pytest.mark.filterwarnings("ignore")
def test_tables_with_other_columns(hugging_face, tmp_path):
    value = hugging_face.Value("string")
    made = table(hugging_face, "face", "who", who=value).add_column("label", [0] * 6)
    made.save_to_disk(tmp_path / "saved")
    assert seen(labelled_images(tmp_path / "saved", image_column="face", label_column="who")) == EXPECTED
    assert set(labelled_images(tmp_path / "saved").names) == {"0"}
    with pytest.raises(
        DatasetError, match=r"expected the label_column whom, got the columns face, who, label \(--label"
    ):
        labelled_images(tmp_path / "saved", label_column="whom")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(DatasetError, match=r"bad\.parquet: expected a table"):
        labelled_images(tmp_path / "bad.parquet")


def test_without_the_library_a_table_says_which(tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(tables.importlib, "import_module", missing)
    with pytest.raises(DatasetError, match=r"No module named 'datasets': pip install 'protomem-kernels\[datasets\]'"):
        labelled_images(tmp_path / "a.parquet")


def test_nothing_of_these(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"a\.zip: expected a folder of images, \.rec, \.tar or \.parquet"):
        labelled_images(tmp_path / "a.zip")
    with pytest.raises(DatasetError, match="expected a folder with one sub-folder per identity, got nothing there"):
        labelled_images(tmp_path / "nowhere")
    write_rec(tmp_path / "a.rec", [1, 1])
    with pytest.raises(DatasetError, match="at least two images of each identity, got fewer for all of 2"):
        labelled_images(tmp_path / "a.rec")


def test_subsets_and_sizes_work_as_with_files(tmp_path):
    write_rec(tmp_path / "a.rec", [2, 2])
    dataset = labelled_images(tmp_path / "a.rec", image_size=(6, 5), mode="L")
    part = dataset.subset_of_identities(torch.tensor([1]))
    assert part[0][0].shape == (1, 6, 5)
    assert [str(path) for path in part.paths] == ["a.rec/3", "a.rec/4"]
