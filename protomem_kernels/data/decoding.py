"""One encoded image to 8-bit pixels: whatever Pillow reads, from a path or from bytes.

**Depth.** What a file holds in 16 or 32 bits or as floats is brought to 8: black is 0, white is the smallest full scale
that holds the image's largest value, of 8, 10, 12, 14, 16, 24, 31 or 32 bits (of fractions: 1, 255, 65535, or the
largest value itself). So 12-bit data stored in 16 bits does not go black, and levels that 8 bits can hold stay apart.
Where there are negative values, the smallest is black and the largest white. Of colour with 16 bits a channel Pillow
itself reads the upper 8.

**Metadata.** Images are turned upright by their EXIF orientation; metadata that cannot be read means upright. Pillow's
warnings are not shown.

**Size.** The header's size is held against a limit before a pixel is decoded.
"""

from __future__ import annotations

import importlib
import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError
from torch import Tensor

from protomem_kernels.data.errors import ImageError

__all__ = [
    "MAX_MEGAPIXELS",
    "PLUG_INS",
    "Source",
    "as_pixels",
    "decode",
    "image_formats",
    "image_suffixes",
    "open_image",
    "size_of",
]

Source: TypeAlias = str | os.PathLike[str] | bytes | IO[bytes]

MAX_MEGAPIXELS = 100.0  # 400 MB once decoded, more than any camera of a telephone's but a few; see --max-megapixels

# What Pillow does not read by itself -> the package whose import teaches it, and how that is asked to.
PLUG_INS = {
    ".heic": ("pillow-heif", "pillow_heif", "register_heif_opener"),
    ".heif": ("pillow-heif", "pillow_heif", "register_heif_opener"),
    ".hif": ("pillow-heif", "pillow_heif", "register_heif_opener"),
    ".avif": ("pillow>=11.3", "pillow_avif", ""),
    ".jxl": ("pillow-jxl-plugin", "pillow_jxl", ""),
}
# Formats that hold no picture of pixels, that Pillow hands to another program, or whose files any bytes can be.
_NO_PICTURES = {
    "BUFR",
    "EPS",
    "GRIB",
    "HDF5",
    "MPEG",
    "PDF",
    "PALM",
    "WMF",
    "IPTC",
    "FITS",
    "SPIDER",
    "XVTHUMB",
    "MCIDAS",
}

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FULL_SCALES = [2**bits - 1 for bits in (8, 10, 12, 14, 16, 24, 31, 32)]
_FLOAT_SCALES = [1, 255, 65535]
_BITS, _SAMPLE_FORMAT = 258, 339  # tags of TIFF

_pillows_limit = Lock()


def decode(
    source: Source,
    *,
    mode: str = "RGB",
    image_size: tuple[int, int] | None = None,
    name: str | None = None,
    max_megapixels: float = MAX_MEGAPIXELS,
) -> Tensor:
    """Read one image.

    Args:
        source: a path, the bytes of an encoded image, or a binary file at its start. Of an animation, the first frame.
        mode: "L" (grey, C = 1) or "RGB" (C = 3).
        image_size: (height, width) in pixels to resize to (bilinear, antialiased), after what its aspect ratio has no
            room for is cut off on both sides alike; None: as it is, upright.
        name: what errors call the image; default: the path, or the file's name.
        max_megapixels: larger images are refused before they are decoded; a million pixels each.

    Returns:
        (C, H, W) uint8.

    Raises:
        ImageError: it is none that Pillow reads, broken, or larger than the limit; one line that names it.

    Example:
        >>> file = io.BytesIO()
        >>> Image.fromarray(np.array([[0, 1023], [2047, 4095]], np.uint16)).save(file, "png")  # 12 bits in 16
        >>> decode(file.getvalue(), mode="L")
        tensor([[[  0,  64],
                 [127, 255]]], dtype=torch.uint8)

    """
    return _pixels(open_image(source, mode=mode, name=name, max_megapixels=max_megapixels), image_size)


def as_pixels(image: Image.Image, *, mode: str = "RGB", image_size: tuple[int, int] | None = None) -> Tensor:
    """Return what :func:`decode` makes of a file that holds this image of Pillow's: (C, H, W) uint8."""
    image = image.copy()
    return _pixels(_upright(_eight_bits(image, mode), _orientation(image)), image_size)


def _pixels(picture: Image.Image, image_size: tuple[int, int] | None) -> Tensor:
    if image_size is not None:
        box = crop_box((picture.height, picture.width), image_size)
        picture = picture.crop(box).resize(image_size[::-1], Image.Resampling.BILINEAR)
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(picture.height, picture.width, -1).permute(2, 0, 1).contiguous()


def crop_box(size: tuple[int, int], image_size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of the largest part in the middle that has the aspect ratio of ``image_size``.

    Whole pixels, at least one a side.

    Example:
        >>> crop_box((112, 112), (56, 46))
        (10, 0, 102, 112)

    """
    (height, width), (rows, columns) = size, image_size
    kept_height = max(1, min(height, round(width * rows / columns)))
    kept_width = max(1, min(width, round(height * columns / rows)))
    top, left = (height - kept_height) // 2, (width - kept_width) // 2
    return left, top, left + kept_width, top + kept_height


def open_image(
    source: Source, *, mode: str = "RGB", name: str | None = None, max_megapixels: float = MAX_MEGAPIXELS
) -> Image.Image:
    """Read one image as :func:`decode` does, at the size that it has, as an image of Pillow's in 8 bits.

    Raises:
        ImageError: as :func:`decode`.

    """
    name = _name(source) if name is None else name
    try:
        with _opened(source) as image:
            width, height = image.size
            if width * height > max_megapixels * 1e6:
                raise ImageError.of(
                    name,
                    f"expected an image of at most {max_megapixels:g} megapixels (--max-megapixels)",
                    f"{height} x {width} = {width * height / 1e6:.2f} megapixels",
                )
            image.load()
            return _upright(_eight_bits(image, mode), _orientation(image))
    except ImageError:
        raise
    except Exception as error:  # decoders raise many kinds: OSError, SyntaxError, ValueError, struct.error ...
        raise ImageError.of(name, "expected a readable image", _reason(source, error)) from error


def size_of(source: Source, *, name: str | None = None) -> tuple[int, int]:
    """Read (height, width) of an image, upright, from its header alone.

    Raises:
        ImageError: it is none that Pillow reads.

    """
    name = _name(source) if name is None else name
    try:
        with _opened(source) as image:
            width, height = image.size
            return (width, height) if _orientation(image) in (5, 6, 7, 8) else (height, width)
    except Exception as error:
        raise ImageError.of(name, "expected a readable image", _reason(source, error)) from error


@cache
def image_formats() -> tuple[str, ...]:
    """Return the names of the formats that are read: Pillow's own and those of the plug-ins that are installed."""
    for _, module, register in PLUG_INS.values():
        try:
            plug_in = importlib.import_module(module)
        except ImportError:
            continue
        if register:
            getattr(plug_in, register)()
    Image.init()
    return tuple(sorted(set(Image.OPEN) - _NO_PICTURES))


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes of files that are taken for images, in lower case: ".jpg", ".png" ..."""
    formats = image_formats()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def _name(source: Source) -> str:
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    return str(getattr(source, "name", "an image in memory"))


def _reason(source: Source, error: Exception) -> str:
    try:
        if isinstance(source, (str, os.PathLike)):
            empty = os.stat(source).st_size == 0
        else:
            empty = not source if isinstance(source, bytes) else source.seek(0, os.SEEK_END) == 0
    except OSError:
        empty = False
    if empty:
        return "an empty file"
    what = "none of a format that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
    return f"{type(error).__name__}: {what}"


@contextmanager
def _opened(source: Source) -> Iterator[Image.Image]:
    """Open an image of any size, which is known then; nothing is decoded yet."""
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with warnings.catch_warnings():
        # Only Pillow's own: what leaks where threads decode at once does no harm.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        try:
            image = Image.open(file, formats=image_formats())
        except Image.DecompressionBombError:  # Pillow's own limit, a global, which says too little and may be too low
            if not isinstance(file, (str, os.PathLike)):
                file.seek(0)
            with _pillows_limit:
                limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
                try:
                    image = Image.open(file, formats=image_formats())
                finally:
                    Image.MAX_IMAGE_PIXELS = limit
        with image:
            yield image


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1, upright, where there is none that can be read."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # junk in metadata raises as many kinds as junk in pixels
        return 1
    return orientation if type(orientation) is int and orientation in _TURNS else 1


def _upright(picture: Image.Image, orientation: int) -> Image.Image:
    return picture.transpose(_TURNS[orientation]) if orientation in _TURNS else picture


def _eight_bits(image: Image.Image, mode: str) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_scaled(_values(image))).convert(mode)
    if image.mode == "LAB":
        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
        assert converted is not None
        return converted.convert(mode)
    image.info.pop("transparency", None)  # alpha is dropped anyway, and a broken one would raise
    return image.convert(mode)


def _values(image: Image.Image) -> npt.NDArray[Any]:
    values = np.asarray(image)
    if image.mode == "I" and image.format == "TIFF":
        tags = getattr(image, "tag_v2", {})
        if tuple(tags.get(_BITS, ())) == (32,) and tuple(tags.get(_SAMPLE_FORMAT, (1,))) == (1,):
            return values.view(np.uint32)  # Pillow reads 32 bits with a sign
    return values


def _scaled(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Bring (H, W) values to 0 ... 255 by the rule of this file. What is no number becomes black."""
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError("no finite pixel")
    low, high = float(values[finite].min()), float(values[finite].max())
    if low < 0:
        black, white = low, high
    else:
        whole = values.dtype.kind in "iu" or (high > 1 and bool((np.floor(values) == values)[finite].all()))
        scales = _FULL_SCALES if whole else _FLOAT_SCALES
        black, white = 0.0, float(next((scale for scale in scales if scale >= high), high))
    scaled = np.empty(values.shape, np.uint8)
    for row, line in zip(scaled, values, strict=True):  # a line at a time, so that a large image stays one in 8 bits
        numbers = np.nan_to_num(line.astype(np.float64), nan=black, posinf=white, neginf=black)
        row[:] = np.rint((numbers - black) * (255 / (white - black or 1)))
    return scaled
