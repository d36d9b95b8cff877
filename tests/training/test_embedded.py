"""The embeddings of a folder: every image's, with its name, and what could not be read."""

import json
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from protomem_kernels.training import embedded, load_encoder
from protomem_kernels.training.embedding import VerifiedEncoder
from protomem_kernels.training.errors import RunError


@pytest.fixture
def photos(tmp_path, people):
    root = tmp_path / "photos"
    (root / "deep" / "er").mkdir(parents=True)
    (root / ".hidden").mkdir()
    for name in ("b.png", "a.JPG", "deep/er/c.bmp", ".hidden/d.png", ".e.png"):
        Image.open(people / "person1" / "0.png").save(root / name)
    (root / "broken.png").write_bytes(b"no image")
    (root / "notes.txt").write_text("no image either")
    return root


def test_every_image_has_its_row(photos, finished, monkeypatch):
    monkeypatch.setattr(embedded, "BATCH", 2)
    told = []
    names, rows, unreadable = embedded.embed_folder(photos, finished, watch=lambda *done: told.append(done))
    assert names == ["a.JPG", "b.png", "deep/er/c.bmp"]
    encoder, transform = load_encoder(finished)
    with torch.no_grad():
        expected = VerifiedEncoder(encoder).eval()(transform.pixels([photos / name for name in names]))
    torch.testing.assert_close(rows, expected, atol=1e-6, rtol=0)
    assert [line.split(": expected")[0] for line in unreadable] == [str(photos / "broken.png")]
    assert told == [(2, 4), (4, 4)]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_is_not_waited_for(photos, finished):
    os.mkfifo(photos / "c.png")
    found = embedded.embed_folder(photos, finished)
    assert found.names == ["a.JPG", "b.png", "deep/er/c.bmp"]
    assert f"{photos / 'c.png'}: expected a readable image, got a pipe, a socket or a device" in found.unreadable


def test_workers_change_nothing(photos, finished):
    alone = embedded.embed_folder(photos, finished)
    helped = embedded.embed_folder(photos, finished, workers=1)
    assert helped.names == alone.names
    assert helped.rows.equal(alone.rows)
    assert helped.unreadable == alone.unreadable


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux")
def test_names_that_are_no_text_and_both_files(photos, finished, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    os.rename(photos / "b.png", os.fsencode(photos) + b"/\xffb.png")
    (photos / "a.JPG").rename(photos / "\u5f20\u4f1f.jpg")
    found = embedded.embed_folder(photos, finished)
    assert found.names == ["deep/er/c.bmp", "\u5f20\u4f1f.jpg", r"\xffb.png"]
    assert embedded.write_embeddings(tmp_path / "x.parquet", found, finished) == [tmp_path / "x.parquet"]
    table = parquet.read_table(tmp_path / "x.parquet")
    assert table.column("file").to_pylist() == found.names
    assert torch.tensor(table.column("embedding").to_pylist()).equal(found.rows)
    assert table.schema.metadata[b"protomem_run"] == str(finished).encode()
    files = embedded.write_embeddings(tmp_path / "x.npy", found, finished)
    assert files == [tmp_path / "x.npy", tmp_path / "x.npy.json"]
    assert torch.from_numpy(np.load(files[0])).equal(found.rows)
    assert json.loads(files[1].read_text()) == found.names


def test_what_cannot_be_is_refused(photos, finished, tmp_path):
    with pytest.raises(RunError, match=r"out must end in \.parquet or \.npy, got .*x\.csv"):
        embedded.check_embeddings_path(tmp_path / "x.csv")
    with pytest.raises(RunError, match="in a folder that is there"):
        embedded.check_embeddings_path(tmp_path / "nowhere" / "x.npy")
    with pytest.raises(RunError, match="expected a readable folder, got No such file"):
        embedded.embed_folder(tmp_path / "nowhere", finished)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="expected images in the folder, got none"):
        embedded.embed_folder(tmp_path / "empty", finished)
    (tmp_path / "empty" / "1.png").write_bytes(b"")
    with pytest.raises(RunError, match=r"none of 1 images can be read, the first: .*1\.png.*an empty file"):
        embedded.embed_folder(tmp_path / "empty", finished)
