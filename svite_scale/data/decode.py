"""From the bytes of an image file to pixels."""

from __future__ import annotations

from contextlib import suppress
from io import BytesIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from simplejpeg import decode_jpeg
from torch import Tensor

MODES = {1: "L", 3: "RGB"}
"""Pillow's name for pixels of so many channels."""
COLOR_SPACES = {1: "GRAY", 3: "RGB"}
"""That of simplejpeg."""


class UndecodableError(Exception):
    """An image file can't be decoded; the message is one line that says why."""


def decode(data: bytes, channels: int) -> Tensor:
    """Decodes the first frame of an image file of any kind that Pillow reads.

    Colours become grey and grey colours as Pillow converts them; 16 bits become 8 by the nearest value where the image is grey
    without an alpha channel, and else by the high byte, all that Pillow reads of them. Transparency is left out, and an EXIF
    orientation isn't applied, as in timm. JPEGs of the wanted mode go through simplejpeg, which gives the pixels of Pillow
    in less time.

    Args:
        data: the file's content.
        channels: 3 decodes to RGB, 1 to grey.

    Returns:
        uint8 ``[channels, H, W]``, in memory row by row and pixel by pixel.

    Raises:
        UndecodableError: the content is empty, damaged, cut off, of an unknown kind or a mode without a defined scale
            (32-bit), or has more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    try:
        image = Image.open(BytesIO(data))
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and image.width * image.height > limit:
            raise UndecodableError(f"{image.width} x {image.height} pixels are more than the {limit:,} that Pillow allows")
        pixels = None
        if image.format == "JPEG" and image.mode == MODES[channels]:
            # What it finds fault with is left to Pillow, which puts up with a little more.
            with suppress(ValueError):
                pixels = decode_jpeg(data, colorspace=COLOR_SPACES[channels])
        if pixels is None:
            pixels = np.array(to_mode(image, MODES[channels]))
    except UndecodableError:
        raise
    except Exception as error:  # the decoders of damaged files raise many kinds
        raise UndecodableError(reason(error)) from error
    return torch.from_numpy(pixels.reshape(image.height, image.width, channels)).permute(2, 0, 1)


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
        return "no image file that Pillow knows"  # its own message names an object in memory
    return " ".join(str(error).split()) or type(error).__name__
