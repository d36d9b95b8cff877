"""The encoder that a run leaves: the one that it verified, in two lines, from runs of every age."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from protomem_kernels import training
from protomem_kernels.data.images import image_folder
from protomem_kernels.training import checkpoints, load_encoder
from protomem_kernels.training.config import config_from, read_toml
from protomem_kernels.training.embedding import VerifiedEncoder, embed
from protomem_kernels.training.errors import RunError
from protomem_kernels.training.loop import go_on
from protomem_kernels.training.published import Published
from protomem_kernels.training.steps import Training
from protomem_kernels.training.trained import read_encoder


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "done")


def averaged(run):
    """The average of a run's weights, by the way of its checkpoint."""
    config = config_from(read_toml(run / "config.toml"), "")
    training = Training(config, channels=3, identities=torch.arange(6), device=torch.device("cpu"))
    go_on(Published(run, training), checkpoints.load_checkpoint(run / "checkpoint.pt")["trained_on"])
    return training.average.module.eval()


def test_two_lines_give_the_encoder_that_was_verified(finished, people):
    encoder, transform = load_encoder(finished)
    files = sorted(people.glob("*/*.png"))
    embeddings = encoder(transform(files))
    assert embeddings.shape == (32, 8)
    assert embeddings.equal(averaged(finished)(transform(files)))
    assert not any(module.training for module in encoder.modules())


def test_all_views_at_once_are_the_views_of_verification(finished, people):
    encoder, _ = load_encoder(str(finished))
    images = image_folder(people, image_size=(16, 12)).load_all().float() / 255
    expected = torch.nn.functional.normalize(embed(encoder, images.split(5), torch.device("cpu")))
    torch.testing.assert_close(VerifiedEncoder(encoder)(images), expected, atol=1e-6, rtol=0)
    assert VerifiedEncoder(encoder, all_views=False)(images).shape == (32, 8)


@pytest.mark.parametrize("unfinished", [False, True])
def test_a_run_from_before_is_read_from_its_checkpoint(copied, people, unfinished):
    now, _ = load_encoder(copied)
    (copied / "encoder.pt").unlink()
    if unfinished:
        (copied / "metrics.json").unlink()
    before, transform = load_encoder(copied)
    image = transform(people / "person0" / "0.png")[None]
    assert before(image).equal(now(image))


def test_the_file_holds_neither_memory_nor_optimiser(finished):
    assert set(read_encoder(finished)) == {"format", "version", "built", "images", "weights"}


def test_what_is_no_run_is_refused(copied, tmp_path):
    with pytest.raises(RunError, match=r"run must be the folder of a run.*nowhere"):
        load_encoder(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"neither encoder\.pt nor checkpoint\.pt"):
        load_encoder(tmp_path)
    shutil.copy(copied / "checkpoint.pt", copied / "encoder.pt")
    with pytest.raises(RunError, match="does not hold an encoder"):
        load_encoder(copied)
    content = (copied / "encoder.pt").read_bytes()
    (copied / "encoder.pt").write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    with pytest.raises(RunError, match="damaged"):
        load_encoder(copied)


def test_weights_of_another_shape_are_refused(copied):
    content = checkpoints.load_checkpoint(copied / "encoder.pt")
    content["built"]["embedding_dim"] = 16
    checkpoints.save_checkpoint(copied / "encoder.pt", {key: content[key] for key in ("built", "images", "weights")})
    with pytest.raises(RunError, match=r"(?s)does not hold an encoder.*size mismatch"):
        load_encoder(copied)


def test_the_room_is_light_until_it_is_asked():
    code = "import sys, protomem_kernels.training as room; assert 'PIL' not in sys.modules; print(room.load_encoder)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.startswith("<function load_encoder"), ran.stderr
    with pytest.raises(AttributeError, match="no attribute 'load_decoder'"):
        _ = training.load_decoder


def test_the_metrics_are_json_for_everybody(finished):
    def refuse(word):
        raise AssertionError(word)

    json.loads((finished / "metrics.json").read_text(), parse_constant=refuse)
