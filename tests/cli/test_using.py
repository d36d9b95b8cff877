"""``protomem embed``, ``verify`` and ``export``: what they print, and errors in one line."""

import pytest
import torch

from protomem_kernels.training import load_encoder
from protomem_kernels.training.embedding import VerifiedEncoder
from protomem_kernels.training.thresholds import read_thresholds
from tests.training.running import assert_refused, protomem


def test_verify_says_cosine_threshold_and_verdict(finished, people):
    one, other, third = people / "person1/0.png", people / "person1/3.png", people / "person2/0.png"
    encoder, transform = load_encoder(finished)
    with torch.no_grad():
        embeddings = VerifiedEncoder(encoder).eval()(transform.pixels([one, other, third])).double()
    threshold = read_thresholds(finished).at(0.1).threshold
    for image, row in ((other, 1), (third, 2)):
        cosine = float(embeddings[0] @ embeddings[row])
        result = protomem("verify", one, image, "--run", finished, "--far", 0.1)
        assert result.exit_code == 0, result.output
        lines = [line.split() for line in result.stdout.splitlines()]
        assert float(lines[0][1]) == pytest.approx(cosine, abs=1e-4)
        assert float(lines[1][1]) == pytest.approx(threshold, abs=1e-4)
        assert " ".join(lines[2]) == f"verdict {'one identity' if cosine >= threshold else 'two identities'} at FAR 0.1"
        assert "too small for FAR 0.1: of its 16 impostor pairs that is 1," in result.stdout


def test_an_image_is_itself(finished, people):
    result = protomem("verify", people / "person1/0.png", people / "person1/0.png", "--run", finished)
    assert "cosine     +1.0000" in result.stdout
    assert "one identity at FAR 0.001" in result.stdout
    assert "that is none" in result.stdout


def test_embed_writes_beside_and_says_what_was_left_out(finished, people, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for name in ("1.png", "2.png"):
        (tmp_path / "photos" / name).write_bytes((people / "person0" / name).read_bytes())
    (tmp_path / "photos" / "3.png").write_bytes(b"")
    result = protomem("embed", "photos", "--run", finished, "--out", "x.npy")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[:2] == [
        "x.npy and x.npy.json: 2 images, embeddings of 8 numbers",
        "left out, images that cannot be read: 1",
    ]
    assert "3.png: expected a readable image, got an empty file" in result.stdout
    pytest.importorskip("pyarrow")
    assert protomem("embed", "photos", "--run", finished).exit_code == 0
    assert (tmp_path / "photos.parquet").exists()


def test_export_says_what_was_compared(finished, tmp_path):
    pytest.importorskip("safetensors")
    result = protomem("export", "--run", finished, "--format", "safetensors", "--out", tmp_path / "x.safetensors")
    assert result.exit_code == 0, result.output
    assert "read back and compared, off by 0 at most" in result.stdout
    assert (tmp_path / "x.safetensors.json").exists()


def test_errors_are_one_line(finished, people, tmp_path):
    image = people / "person1/0.png"
    assert_refused(protomem("verify", image, image, "--run", tmp_path / "no"), "run must be the folder of a run")
    assert_refused(protomem("verify", image, image, "--run", finished / "encoder.pt"), "encoder.pt, which is a file")
    assert_refused(
        protomem("verify", image, tmp_path / "no.png", "--run", finished), "no.png: expected a readable image"
    )
    assert_refused(protomem("verify", image, image, "--run", finished, "--far", 3), "far must be between", "got 3")
    assert_refused(protomem("embed", people, "--run", finished, "--out", "x.csv"), "out must end in .parquet or .npy")
    assert_refused(protomem("export", "--run", finished, "--format", "tflite"), "format must be one of onnx")
