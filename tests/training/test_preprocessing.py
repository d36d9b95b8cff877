"""What an encoder is given of what a user has: to the bit what training and verification saw."""

import io
import pathlib

import numpy as np
import pytest
import torch
from PIL import Image

from protomem_kernels.data.errors import DatasetError
from protomem_kernels.data.images import ImageDataset
from protomem_kernels.training.augmentation import standardise
from protomem_kernels.training.preprocessing import Transform


@pytest.fixture(params=["L", "RGB"])
def mode(request):
    return request.param


@pytest.fixture
def file(people):
    return people / "person3" / "2.png"


def as_trained(file, mode, size):
    """What a run makes of an image, by its own way."""
    dataset = ImageDataset([file], [0], ["one"], image_size=size, mode=mode)
    return standardise(dataset.load_all().float() / 255)


def test_a_file_is_what_the_run_saw(file, mode):
    transform, expected = Transform(mode, (16, 12)), as_trained(file, mode, (16, 12))
    image = Image.open(file)
    tensor = torch.from_numpy(np.asarray(image).copy()).movedim(2, 0)
    for source in (str(file), pathlib.Path(file), file.read_bytes(), image, tensor):
        assert transform(source).equal(expected[0]), type(source)
    for several in ([file, image, tensor], tensor.expand(3, -1, -1, -1)):
        assert transform(several).equal(expected.expand(3, -1, -1, -1))
    assert transform(file).dtype == torch.float32


def test_a_turned_photograph_of_pillows_is_turned_as_its_file_is(tmp_path, file):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = tmp_path / "turned.png"
    Image.open(file).save(turned, exif=exif)
    transform = Transform("RGB", (16, 12))
    image = Image.open(turned)
    assert transform(image).equal(transform(turned))
    assert not transform(turned).equal(transform(file))
    assert image.getexif()[0x0112] == 6  # the user's own is left alone


def test_floats_of_the_right_size_are_only_standardised(mode):
    images = torch.rand(4, len(mode), 16, 12)
    assert Transform(mode, (16, 12)).pixels(images).equal(images)
    assert Transform(mode, (16, 12))(images).equal(standardise(images))


def test_floats_are_resized_and_made_grey_as_bytes_are_to_rounding(file, mode):
    transform = Transform(mode, (9, 7))
    pixels = torch.from_numpy(np.asarray(Image.open(file)).copy()).movedim(2, 0)
    torch.testing.assert_close(transform.pixels(pixels / 255), transform.pixels(pixels), atol=2 / 255, rtol=0)
    grey = torch.rand(1, 20, 15)
    assert Transform("RGB", (20, 15)).pixels(grey).equal(grey.expand(3, -1, -1))


@pytest.mark.parametrize(
    ("source", "error", "said"),
    [
        (torch.zeros(20, 15), ValueError, r"\(C, H, W\).*got \(20, 15\)"),
        (torch.zeros(20, 15, 3), ValueError, r"got \(20, 15, 3\)"),
        (torch.zeros(3, 0, 5), ValueError, r"got \(3, 0, 5\)"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), TypeError, "got torch.int64"),
        (torch.full((3, 4, 4), 255.0), ValueError, r"in \[0, 1\].*got 255 to 255"),
        (torch.full((3, 4, 4), float("nan")), ValueError, "got nan"),
        (3, TypeError, "got int"),
        ([], TypeError, "got list of 0"),
        ([torch.zeros(2, 3, 4, 4)], TypeError, "got list of 1"),
        (b"no image", DatasetError, "expected a readable image"),
        ("nowhere.png", DatasetError, "nowhere.png"),
    ],
)
def test_what_is_no_image_is_refused(source, error, said):
    with pytest.raises(error, match=said):
        Transform("RGB", (16, 12))(source)


def test_it_is_made_again_of_what_a_file_holds():
    transform = Transform("L", (16, 12))
    again = Transform(**transform.as_dict())
    assert repr(again) == repr(transform) == "Transform('L', (16, 12))"
    with pytest.raises(ValueError, match="mode"):
        Transform("CMYK", (1, 1))


def test_bytes_of_a_file_in_memory():
    file = io.BytesIO()
    Image.new("L", (12, 16), 9).save(file, "PNG")
    assert Transform("L", (16, 12)).pixels(file.getvalue()).mul(255).unique().tolist() == [9]
