"""Images of every depth and state, from a path and from bytes, as 8-bit pixels."""

import io
import struct
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from protomem_kernels.data import decoding
from protomem_kernels.data.decoding import decode, image_suffixes, size_of
from protomem_kernels.data.errors import DatasetError

RAMP = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (3, 1))  # 64 grey levels


def encoded(pixels, format="png", **options):
    file = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, format, **options)
    return file.getvalue()


def deep(factor, dtype):
    return (RAMP.astype(np.float64) * factor).astype(dtype)


def unsigned_32_bits():
    """Pillow writes 32 bits with a sign only; the tag of the sample format says which."""
    signed = encoded(deep(2**24, np.uint32).view(np.int32), "tiff")
    tag = struct.pack("<HHI", 339, 3, 1)
    assert signed.count(tag + b"\x02") == 1
    return signed.replace(tag + b"\x02", tag + b"\x01")


DEEP = {
    "8 bits": encoded(RAMP),
    "16-bit PNG": encoded(deep(257, np.uint16)),
    "16-bit TIFF": encoded(deep(257, np.uint16), "tiff"),
    "16-bit TIFF, big-endian": encoded(Image.fromarray(deep(257, ">u2")), "tiff"),
    "16-bit PGM": encoded(deep(257, np.uint16), "ppm"),
    "16-bit JPEG 2000": encoded(deep(257, np.uint16), "jpeg2000"),
    "12 bits in a 16-bit PNG": encoded(deep(4095 / 255, np.uint16)),
    "8 bits in a 16-bit PNG": encoded(deep(1, np.uint16)),
    "32-bit TIFF of 16 bits": encoded(deep(257, np.int32), "tiff"),
    "32-bit TIFF": encoded(deep(2**23, np.int32), "tiff"),
    "32-bit TIFF without sign": unsigned_32_bits(),
    "float TIFF up to 1": encoded(deep(1 / 255, np.float32), "tiff"),
    "float TIFF up to 255": encoded(deep(1, np.float32), "tiff"),
    "float PFM": encoded(deep(1 / 255, np.float32), "ppm"),
}


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_64_grey_levels_stay_64(name, mode):
    image = decode(DEEP[name], mode=mode)
    assert image.shape == (1 if mode == "L" else 3, 3, 64)
    assert (image.int() - torch.tensor(RAMP).int()).abs().max() <= 1
    assert len(image.unique()) == 64


def test_white_is_the_full_scale_that_holds_the_image():
    def scaled(*values, dtype=np.float32):
        return decode(encoded(np.array([values], dtype), "tiff"), mode="L").flatten().tolist()

    assert scaled(0, 600, 1023, dtype=np.uint16) == [0, 150, 255]
    assert scaled(0, 1024, dtype=np.uint16) == [0, 64]
    assert scaled(0, 1, dtype=np.uint16) == [0, 1]
    assert scaled(-1, 0, 1) == [0, 128, 255]  # of negative values, the smallest is black
    assert scaled(0, 0.5, 2.5) == [0, 0, 2]
    assert scaled(0, 1e6 + 0.5) == [0, 255]
    assert scaled(0, 0.5, 1, np.nan, np.inf, -np.inf) == [0, 128, 255, 0, 255, 0]
    assert scaled(0, 0) == [0, 0]
    with pytest.raises(DatasetError, match=r"an image in memory: expected a readable image, got .*no finite pixel"):
        scaled(np.nan, np.nan)


@pytest.mark.parametrize("kind", ["RGB", "P", "CMYK", "RGBA", "LAB"])
def test_colours_come_as_grey_or_rgb(kind):
    colour = (255, 51, 0)  # one of a web palette's
    picture = Image.new("RGB", (2, 1), colour)
    if kind == "LAB":
        picture, colour = Image.new("LAB", (2, 1), (255, 128, 128)), (255, 255, 255)
    else:
        picture = picture.convert(kind)
    file = encoded(picture, "tiff" if kind in ("CMYK", "LAB") else "png")
    assert (decode(file)[:, 0, 0].int() - torch.tensor(colour)).abs().max() <= 1
    assert (
        abs(
            int(decode(file, mode="L")[0, 0, 0])
            - sum(w * c for w, c in zip((0.299, 0.587, 0.114), colour, strict=True))
        )
        <= 1
    )


EXIF = Image.Exif()
EXIF[0x0112] = 6
TURNED = EXIF.tobytes()
JUNK = {
    "none": (b"", False),
    "orientation 6": (TURNED, True),
    "header twice": (b"Exif\x00\x00" + TURNED, True),
    "nothing behind the header": (b"Exif\x00\x00", False),
    "no TIFF": (b"Exif\x00\x00not a tiff at all", False),
    "cut": (TURNED[:16], False),
    "offset beyond the end": (b"Exif\x00\x00II*\x00\xff\xff\xff\x7f", False),
    "orientation 9": (TURNED.replace(b"\x06\x00\x00\x00", b"\x09\x00\x00\x00"), False),
    "orientation a word": (
        b"Exif\x00\x00II*\x00\x08\x00\x00\x00" + struct.pack("<HHHI4sI", 1, 0x0112, 2, 4, b"abc\x00", 0),
        False,
    ),
}


@pytest.mark.parametrize("format", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("name", JUNK)
def test_junk_in_metadata_does_not_refuse_an_image(name, format):
    exif, turned = JUNK[name]
    file = encoded(np.zeros((4, 2, 3), np.uint8), format, **({"exif": exif} if exif else {}))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        assert decode(file).shape == ((3, 2, 4) if turned else (3, 4, 2))
        assert size_of(file) == ((2, 4) if turned else (4, 2))
    assert heard == []


def test_pillows_warnings_are_not_shown():
    palette = Image.new("P", (2, 2))
    palette.putpalette([0, 0, 0, 255, 255, 255])
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        decode(encoded(palette, transparency=b"\x00\x80"))
        large = encoded(Image.new("1", (10_000, 9_000)))  # beyond the size from which on Pillow warns
        size_of(large)
        with pytest.raises(
            DatasetError, match=r"at most 50 megapixels \(--max-megapixels\), got 9000 x 10000 = 90.00 megapixels$"
        ):
            decode(large, name="x", max_megapixels=50)
    assert heard == []


def test_a_small_file_of_a_large_image_is_refused_with_its_size(tmp_path, monkeypatch):
    file = tmp_path / "bomb.png"
    file.write_bytes(encoded(Image.new("1", (20_000, 10_000))))
    assert file.stat().st_size < 50_000
    with pytest.raises(DatasetError) as refused:
        decode(file)
    assert str(refused.value) == (
        f"{file}: expected an image of at most 100 megapixels (--max-megapixels), got 10000 x 20000 = 200.00 megapixels"
    )
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    assert decode(encoded(RAMP), max_megapixels=1).shape == (3, 3, 64)  # Pillow's limit does not come first
    assert Image.MAX_IMAGE_PIXELS == 50


def test_paths_bytes_and_files_give_the_same(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(RAMP))
    with open(tmp_path / "a.png", "rb") as file:
        read = [decode(tmp_path / "a.png"), decode(str(tmp_path / "a.png")), decode(encoded(RAMP)), decode(file)]
    assert all(torch.equal(image, read[0]) for image in read)
    assert decode(encoded(RAMP), image_size=(6, 32)).shape == (3, 6, 32)
    for source, name in [(b"", "an image in memory"), (io.BytesIO(b""), "an image in memory")]:
        with pytest.raises(DatasetError, match=f"^{name}: expected a readable image, got an empty file$"):
            decode(source)
    with pytest.raises(
        DatasetError, match=r"^record 7: expected a readable image, got UnidentifiedImageError: [^\n]+$"
    ):
        decode(b"no image", name="record 7")


def test_suffixes_are_those_that_pillow_reads(monkeypatch):
    assert {".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".webp"} <= image_suffixes()
    assert not {".eps", ".pdf", ".h5", ".mpg", ".txt"} & image_suffixes()
    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=lambda: called.append(1)))
    called: list[int] = []
    decoding.image_formats.__wrapped__()
    assert called


def test_what_hands_pixels_to_another_program_is_not_opened():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    with pytest.raises(DatasetError, match="UnidentifiedImageError"):
        decode(postscript)


def test_the_aspect_ratio_is_kept_by_cropping():
    wide = np.zeros((8, 32), np.uint8)
    wide[:, 12:20] = 255
    assert decode(encoded(wide), mode="L", image_size=(4, 4)).unique().tolist() == [255]  # the middle alone
    assert decode(encoded(wide.T.copy()), mode="L", image_size=(4, 4)).unique().tolist() == [255]
    assert decode(encoded(wide), mode="L", image_size=(4, 16))[0, :, [0, 8]].unique().tolist() == [0, 255]
