"""From the bytes of an image file to pixels."""

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
"""Pillow's name for pixels of so many channels."""
COLOR_SPACES = {1: "GRAY", 3: "RGB"}
"""That of simplejpeg."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA")
"""Pillow's names of the kinds of files that are read, JPEG with MPO. Of the others it hands some to programs (EPS to
Ghostscript), and some hold further files, of any size or kind (ICO, ICNS, IPTC)."""
SCAN = re.compile(rb"\xff\xda\0[\x08\x0a\x0c\x0e][\x01-\x04]")
"""A scan of a JPEG begins so."""
MAX_SCANS = 100
"""A progressive JPEG has about 10; each costs time for all its pixels, however few bytes it has."""
LEAST_ROW = 64
"""Pixels that a row of an image counts as, at least: Pillow takes memory for each row too."""
STRIP = 1 << 22
"""Pixels that are converted at a time."""


class UndecodableError(Exception):
    """An image file can't be decoded; the message is one line that says why."""


def decode(data: bytes, channels: int, max_pixels: int = DataConfig.max_pixels) -> Tensor:
    """Decodes the first frame of an image file of a kind in ``FORMATS``.

    Colours become grey and grey colours as Pillow converts them; 16 bits become 8 by the nearest value where the image is grey
    without an alpha channel, and else by the high byte, all that Pillow reads of them. Transparency is left out, and an EXIF
    orientation isn't applied, as in timm. JPEGs of the wanted mode go through simplejpeg, which gives the pixels of Pillow
    in less time.

    Args:
        data: the file's content.
        channels: 3 decodes to RGB, 1 to grey.
        max_pixels: of the largest image that is decoded; takes the place of Pillow's limit.

    Returns:
        uint8 ``[channels, H, W]``, in memory row by row and pixel by pixel.

    Raises:
        UndecodableError: the content is empty, damaged, cut off, of an unknown kind or a mode without a defined scale
            (32-bit), or has more pixels than ``max_pixels``, or a JPEG more than ``MAX_SCANS`` scans.
    """
    try:
        with no_limit_of_pillow():
            image = Image.open(BytesIO(data), formats=FORMATS)
            if max(image.width, LEAST_ROW) * image.height > max_pixels:
                raise UndecodableError(
                    f"{image.width} x {image.height} pixels are more than data.max_pixels = {max_pixels:,} allows"
                )
            if image.format in ("JPEG", "MPO") and (scans := len(SCAN.findall(data))) > MAX_SCANS:
                raise UndecodableError(f"a JPEG of {scans:,} scans, which would take minutes; {MAX_SCANS} are read at most")
            pixels = None
            if image.format == "JPEG" and image.mode == MODES[channels]:
                # What it finds fault with is left to Pillow, which puts up with a little more.
                with suppress(ValueError):
                    pixels = decode_jpeg(data, colorspace=COLOR_SPACES[channels])
            if pixels is None:
                pixels = converted(image, channels)
    except UndecodableError:
        raise
    except Exception as error:  # the decoders of damaged files raise many kinds
        raise UndecodableError(reason(error)) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


@contextmanager
def no_limit_of_pillow() -> Iterator[None]:
    """Has Pillow neither warn of many pixels nor refuse them within the block, which isn't for several threads at once."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def converted(image: Image.Image, channels: int) -> npt.NDArray[np.uint8]:
    """The pixels, ``[H, W, channels]``, converted some at a time, so that a large image isn't there in several modes."""
    image.load()
    pixels = np.empty((image.height, image.width, channels), dtype=np.uint8)
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        for left in range(0, image.width, STRIP):  # Pillow hands out no row of 90 million pixels
            part = pixels[top : top + rows, left : left + STRIP]
            height, width = part.shape[:2]
            whole = (width, height) == image.size
            strip = image if whole else image.crop((left, top, left + width, top + height))
            part[...] = np.asarray(to_mode(strip, MODES[channels])).reshape(part.shape)
    return pixels


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow would clip: all above 255 white.
        wide = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise UndecodableError(f"its mode {image.mode!r} has 32 bits per pixel, of no defined scale")
    elif "transparency" in image.info:
        image = image.convert("RGBA")  # a palette with several transparencies warns otherwise
    return image.convert(mode)


def reason(error: Exception) -> str:
    """An error of Pillow's in one line."""
    if isinstance(error, UnidentifiedImageError):
        return f"no image file of a kind that is read ({', '.join(FORMATS)})"  # Pillow's message names an object in memory
    if isinstance(error, MemoryError):
        return "it takes more memory, or has longer rows, than Pillow can have"
    return " ".join(str(error).split()) or type(error).__name__
