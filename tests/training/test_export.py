"""Exported encoders: another program computes what the run's encoder does, of a batch of any size."""

import json
import re
import stat

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from protomem_kernels.training import export, extras, load_encoder
from protomem_kernels.training.embedding import VerifiedEncoder
from protomem_kernels.training.errors import RunError


@pytest.fixture
def images():
    return torch.rand(5, 3, 16, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def expected(finished, images):
    encoder, _ = load_encoder(finished)
    with torch.no_grad():
        return VerifiedEncoder(encoder).eval()(images)


def test_onnx(finished, tmp_path, images, expected):
    runtime = pytest.importorskip("onnxruntime")
    file, beside, difference = export.export(finished, "onnx", tmp_path / "mine.onnx")
    assert difference < 1e-5
    assert {path.name for path in tmp_path.iterdir()} == {"mine.onnx", "mine.onnx.json"}  # weights are within
    contract = json.loads(beside.read_text())
    session = runtime.InferenceSession(file)
    (theirs,) = session.run([contract["output"]["name"]], {contract["input"]["name"]: images.numpy()})
    np.testing.assert_allclose(theirs, expected, atol=1e-5)
    assert [session.run(None, {"images": images[:n].numpy()})[0].shape for n in (1, 2)] == [(1, 8), (2, 8)]
    assert contract["input"] == {
        "name": "images",
        "shape": ["batch", 3, 16, 12],
        "dtype": "float32",
        "range": [0, 1],
        "channels": "RGB",
    }
    metrics = json.loads((finished / "metrics.json").read_text())
    assert contract["impostor_pairs"] == metrics["impostor_pairs"]
    kept = [point for point in metrics["operating_points"] if point["threshold"] is not None]
    assert [{**point, "enough_pairs": False} for point in kept] == contract["operating_points"]
    assert "as Pillow does" in " ".join(contract["before_the_model"])
    assert len(contract["in_the_model"]) == 5


def test_torch_export(finished, tmp_path, images):
    file, beside, _ = export.export(finished, "torch.export", tmp_path / "mine.pt2", all_views=False)
    module = torch.export.load(file).module()
    encoder, transform = load_encoder(finished)
    for count in (1, 2, 5):
        torch.testing.assert_close(module(images[:count]), F.normalize(encoder(transform(images[:count]))))
    contract = json.loads(beside.read_text())
    assert contract["operating_points"] == []  # those are of ten views
    assert not re.search("ten views", " ".join(contract["in_the_model"]))


def test_safetensors(finished, tmp_path):
    library = pytest.importorskip("safetensors.torch")
    file, beside, difference = export.export(finished, "safetensors", tmp_path / "mine.safetensors")
    encoder, _ = load_encoder(finished)
    weights = library.load_file(file)
    assert weights.keys() == encoder.state_dict().keys()
    assert all(value.equal(weights[name]) for name, value in encoder.state_dict().items())
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE(beside.stat().st_mode)
    assert difference == 0
    contract = json.loads(beside.read_text())
    assert contract["encoder"]["name"] == "residual"
    assert len(contract["around_the_weights"]) == 5


@pytest.mark.parametrize("form", ["safetensors", "torch.export", "onnx"])
def test_a_file_that_computes_something_else_never_appears(finished, tmp_path, monkeypatch, form):
    if form != "torch.export":
        pytest.importorskip("onnxruntime" if form == "onnx" else "safetensors")
    kind = export.FORMATS[form]

    def write_another(path, embedder, images):
        path.write_bytes(b"written")

    def read_another(path, embedder, built):
        assert path.read_bytes() == b"written"
        return lambda images: embedder(images) + 1e-3

    monkeypatch.setitem(export.FORMATS, form, kind._replace(write=write_another, read=read_another))
    with pytest.raises(RunError, match=r"was not written.*off by 0\.001"):
        export.export(finished, form, tmp_path / f"mine{kind.suffix}")
    monkeypatch.setitem(export.FORMATS, form, kind._replace(write=write_another, read=lambda *_: lambda images: images))
    with pytest.raises(RunError, match="returns shape"):
        export.export(finished, form, tmp_path / f"mine{kind.suffix}")
    monkeypatch.setitem(export.FORMATS, form, kind._replace(write=write_another))
    with pytest.raises(RunError, match=f"cannot be exported as {form}"):
        export.export(finished, form, tmp_path / f"mine{kind.suffix}")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_is_refused(finished, tmp_path, monkeypatch):
    with pytest.raises(RunError, match=r"format must be one of onnx, safetensors, torch\.export, got 'tflite'"):
        export.export(finished, "tflite")
    with pytest.raises(RunError, match=r"out must end in \.onnx"):
        export.export(finished, "onnx", tmp_path / "mine.pt2")
    with pytest.raises(RunError, match=r"cannot write .*nowhere"):
        export.export(finished, "torch.export", tmp_path / "nowhere" / "mine.pt2")

    def missing(module):
        raise ImportError(f"No module named {module!r}")

    monkeypatch.setattr(extras.importlib, "import_module", missing)
    for form, library in (("onnx", "onnx"), ("safetensors", "safetensors")):
        with pytest.raises(RunError, match=rf"{library}, which cannot be imported .*protomem-kernels\[export\]"):
            export.export(finished, form, tmp_path / f"mine{export.FORMATS[form].suffix}")
    assert not list(tmp_path.iterdir())
