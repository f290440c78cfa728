"""Decoding the bytes of an image file to pixels."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from simplejpeg import decode_jpeg
from torch import Tensor

from svite_scale.data.options import DataConfig

MODES = {1: "L", 3: "RGB"}
"""Pillow's modes, by the number of channels."""
COLOR_SPACES = {1: "GRAY", 3: "RGB"}
"""simplejpeg's color spaces, by the number of channels."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA")
"""Pillow's names of the formats that are read; JPEG includes MPO. Of the other formats, Pillow gives some to programs (EPS to
Ghostscript), and some contain other files of any size and format (ICO, ICNS, IPTC)."""
SCAN = re.compile(rb"\xff\xda\0[\x08\x0a\x0c\x0e][\x01-\x04]")
"""The beginning of a JPEG's scan."""
MAX_SCANS = 100
"""A progressive JPEG has about 10. Each scan takes time for all pixels, however few bytes it has."""
LEAST_ROW = 64
"""Least number of pixels that a row counts as, because Pillow takes memory for each row too."""
STRIP = 1 << 22
"""Pixels that are converted at the same time."""


class UndecodableError(Exception):
    """An image file can't be decoded; the message is the reason in one line."""


def decode(data: bytes, channels: int, max_pixels: int = DataConfig.max_pixels) -> Tensor:
    """Decodes the first frame of an image file of a format in ``FORMATS``.

    Pillow converts between colours and grey. Values of 16 bits become the nearest of 8 bits if the image is grey without an
    alpha channel; of other images Pillow reads the high byte only. Transparency is dropped, and an EXIF orientation isn't
    applied, as in timm. simplejpeg decodes JPEGs that are already in the requested mode; it gives the same pixels as Pillow in
    less time.

    Args:
        data: the file's content.
        channels: 3 decodes to RGB, 1 to grey.
        max_pixels: pixels of the largest image that is decoded; replaces Pillow's limit.

    Returns:
        uint8 ``[channels, H, W]``, in memory row by row and pixel by pixel.

    Raises:
        UndecodableError: the content is empty, damaged, truncated, of another format, or of a mode without a defined scale
            (32-bit); or it has more pixels than ``max_pixels``, or a JPEG has more than ``MAX_SCANS`` scans.
    """
    try:
        with without_pillow_limit():
            image = Image.open(BytesIO(data), formats=FORMATS)
            if max(image.width, LEAST_ROW) * image.height > max_pixels:
                raise UndecodableError(
                    f"{image.width} x {image.height} pixels are more than data.max_pixels = {max_pixels:,} allows"
                )
            if image.format in ("JPEG", "MPO") and (scans := len(SCAN.findall(data))) > MAX_SCANS:
                raise UndecodableError(f"a JPEG of {scans:,} scans, which would take minutes; {MAX_SCANS} are read at most")
            pixels = None
            if image.format == "JPEG" and image.mode == MODES[channels]:
                # Pillow tolerates a few faults that simplejpeg refuses.
                with suppress(ValueError):
                    pixels = decode_jpeg(data, colorspace=COLOR_SPACES[channels])
            if pixels is None:
                pixels = to_array(image, channels)
    except UndecodableError:
        raise
    except Exception as error:  # the decoders of damaged files raise many kinds
        raise UndecodableError(describe_error(error)) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


@contextmanager
def without_pillow_limit() -> Iterator[None]:
    """Switches Pillow's limit of pixels off within the block; not for several threads at the same time."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def to_array(image: Image.Image, channels: int) -> npt.NDArray[np.uint8]:
    """Returns the pixels, uint8 ``[H, W, channels]``. Strips are converted, so a large image isn't in memory in two modes."""
    image.load()
    pixels = np.empty((image.height, image.width, channels), dtype=np.uint8)
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        for left in range(0, image.width, STRIP):  # Pillow can't convert a row of 90 million pixels to an array
            part = pixels[top : top + rows, left : left + STRIP]
            height, width = part.shape[:2]
            whole = (width, height) == image.size
            strip = image if whole else image.crop((left, top, left + width, top + height))
            part[...] = np.asarray(to_mode(strip, MODES[channels])).reshape(part.shape)
    return pixels


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow would clip: all values above 255 would become white.
        wide = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise UndecodableError(f"its mode {image.mode!r} has 32 bits per pixel, of no defined scale")
    elif "transparency" in image.info:
        image = image.convert("RGBA")  # otherwise Pillow warns of a palette with several transparencies
    return image.convert(mode)


def describe_error(error: Exception) -> str:
    """Returns an error of Pillow in one line."""
    if isinstance(error, UnidentifiedImageError):
        return f"no image file of a kind that is read ({', '.join(FORMATS)})"  # Pillow's message names an object in memory
    if isinstance(error, MemoryError):
        return "it takes more memory, or has longer rows, than Pillow can have"
    return " ".join(str(error).split()) or type(error).__name__
