"""Image files of every format give the documented pixels, computed here independently; damaged ones give a reason."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from svite_scale.data.decode import UndecodableError, decode

NOISE = np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)
RAMP = np.linspace(0, 65535, 108).astype(np.uint16).reshape(12, 9)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    content = BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def photograph(width: int = 64, height: int = 48, mode: str = "RGB", **options: object) -> bytes:
    """A JPEG of smooth colours."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    pixels = np.stack([x, y, (x + y) / 2], axis=2).astype(np.uint8)
    return encoded(Image.fromarray(pixels).convert(mode), "jpeg", **options)


def pixels(content: bytes, channels: int = 3) -> np.ndarray:
    """``[H, W, channels]``"""
    found = decode(content, channels)
    assert str(found.dtype) == "torch.uint8"
    assert found.shape[0] == channels
    return found.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("quality", [60, 95])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpegs_have_the_pixels_of_pillow(quality: int, subsampling: int, progressive: bool) -> None:
    content = photograph(61, 47, quality=quality, subsampling=subsampling, progressive=progressive)
    np.testing.assert_array_equal(pixels(content), np.array(Image.open(BytesIO(content))))
    grey = photograph(61, 47, "L", quality=quality, progressive=progressive)
    np.testing.assert_array_equal(pixels(grey, 1)[..., 0], np.array(Image.open(BytesIO(grey))))


def test_grey_and_colour_become_each_other() -> None:
    grey = NOISE[..., 0]
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(grey), "png")), np.repeat(grey[..., None], 3, axis=2))
    luma = NOISE @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(pixels(encoded(Image.fromarray(NOISE), "png"), 1)[..., 0], luma, atol=0.51)
    grey_jpeg = photograph(mode="L")
    np.testing.assert_array_equal(pixels(grey_jpeg), np.repeat(pixels(grey_jpeg, 1), 3, axis=2))
    colour_jpeg = encoded(Image.fromarray(NOISE), "jpeg", quality=30)
    np.testing.assert_array_equal(pixels(colour_jpeg, 1)[..., 0], np.array(Image.open(BytesIO(colour_jpeg)).convert("L")))


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_are_scaled(channels: int) -> None:
    """Pillow's own conversion clips at 255."""
    found = pixels(encoded(Image.fromarray(RAMP), "png"), channels)
    expected = np.round(RAMP / 257).astype(np.uint8)
    np.testing.assert_array_equal(found, np.repeat(expected[..., None], channels, axis=2))


def test_cmyk_is_converted_to_light() -> None:
    inks = np.zeros((16, 16, 4), dtype=np.uint8)
    inks[...] = (30, 90, 200, 60)
    found = pixels(encoded(Image.fromarray(inks, "CMYK"), "jpeg", quality=100))
    expected = [(255 - ink) * (255 - 60) / 255 for ink in (30, 90, 200)]
    np.testing.assert_allclose(found, np.broadcast_to(expected, (16, 16, 3)), atol=4)


@pytest.mark.filterwarnings("error")
def test_transparency_is_left_out() -> None:
    palette = Image.fromarray((np.arange(108) % 4).astype(np.uint8).reshape(12, 9), "P")
    colours = [10, 20, 30, 200, 100, 50, 0, 255, 0, 90, 90, 90]
    palette.putpalette(colours)
    content = encoded(palette, "png", transparency=bytes([0, 100, 255, 255]))
    assert isinstance(Image.open(BytesIO(content)).info["transparency"], bytes)
    expected = np.array(colours, dtype=np.uint8).reshape(4, 3)[np.arange(108) % 4].reshape(12, 9, 3)
    np.testing.assert_array_equal(pixels(content), expected)
    alpha = np.concatenate([NOISE, np.full((12, 9, 1), 7, dtype=np.uint8)], axis=2)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(alpha), "png")), NOISE)


@pytest.mark.parametrize("kind", ["png", "gif", "webp"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if kind == "webp" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (pixels(content) == (255, 0, 0)).all()


def test_an_orientation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert pixels(photograph(64, 48, exif=exif)).shape == (48, 64, 3)
    np.testing.assert_array_equal(pixels(photograph(64, 48, exif=exif)), pixels(photograph(64, 48)))


def test_images_that_pillow_tolerates_are_decoded() -> None:
    """Bytes between segments: libjpeg warns, and simplejpeg refuses."""
    content = photograph()
    start = content.index(b"\xff\xda")
    odd = content[:start] + b"\x00" * 7 + content[start:]
    np.testing.assert_array_equal(pixels(odd), pixels(content))


@pytest.mark.parametrize(("kind", "depth"), [(2, 3), (4, 2), (6, 4)], ids=["RGB", "grey and alpha", "RGB and alpha"])
def test_16_bits_of_colours_or_beside_alpha_lose_the_low_byte(kind: int, depth: int) -> None:
    values = np.array([0, 128, 200, 255, 256, 511, 32767, 65535], dtype=">u2")
    content = png(8, 1, 16, kind, b"\0" + np.repeat(values, depth).tobytes())
    np.testing.assert_array_equal(pixels(content), np.repeat(values.astype(int) // 256, 3).reshape(1, 8, 3))


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header states a very large size."""
    return png(width, height, 8, 0, bytes(1000))


def png(width: int, height: int, bits: int, kind: int, rows: bytes) -> bytes:
    """A PNG written by hand; Pillow writes no 16-bit colours."""
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no image file of a kind that is read"),
        (b"junk", "no image file of a kind that is read"),
        (photograph()[:-20], "image file is truncated"),
        (photograph()[:-2], "image file is truncated"),
        (photograph()[:300], "."),
        (photograph(mode="L")[:-20], "image file is truncated"),
        (encoded(Image.fromarray(NOISE), "png")[:-40], "."),
        (encoded(Image.fromarray(NOISE), "png").replace(b"IDAT", b"IDAX"), "."),
        (bomb(30000, 30000), "30000 x 30000 pixels are more than data.max_pixels = 100,000,000 allows"),
        (bomb(10001, 10000), "10001 x 10000 pixels are more than data.max_pixels = 100,000,000 allows"),
        (bomb(1, 2_000_000), "1 x 2000000 pixels are more than"),
        (encoded(Image.fromarray(np.ones((4, 4), dtype=np.float32)), "tiff"), "mode 'F' has 32 bits"),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_undecodable_images_are_refused_with_a_reason(content: bytes, reason: str, channels: int) -> None:
    with pytest.raises(UndecodableError, match=reason) as caught:
        decode(content, channels)
    assert "\n" not in str(caught.value)
    assert "0x" not in str(caught.value)


def scans(number: int) -> bytes:
    """A progressive JPEG whose last scan is repeated so many times."""
    content = photograph(progressive=True)
    last, end = content.rfind(b"\xff\xda"), content.rfind(b"\xff\xd9")
    return content[:end] + content[last:end] * number + content[end:]


def test_nothing_runs_a_program_to_read_an_image(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pillow gives EPS to Ghostscript, whatever the file's name."""
    ghostscript, proof = tmp_path / "gs", tmp_path / "ran"
    ghostscript.write_text(f"#!/bin/sh\ntouch {proof}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(UndecodableError, match="no image file of a kind that is read"):
        decode(encoded(Image.fromarray(NOISE), "eps"), 3)
    assert not proof.exists()


def test_a_file_within_a_file_does_not_pass_the_limit_of_pixels() -> None:
    """An icon whose header states 16 x 16, with an image of 900 million pixels in it."""
    content = bomb(30000, 30000)
    icon = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(content), 22) + content
    with pytest.raises(UndecodableError, match="no image file of a kind that is read"):
        decode(icon, 3)


@pytest.mark.parametrize("kind", ["webp", "gif", "bmp", "tiff", "ppm", "jpeg2000", "avif", "tga", "mpo"])
def test_kinds_that_are_read_whatever_the_file_is_called(kind: str) -> None:
    content = encoded(Image.fromarray(NOISE), kind)
    np.testing.assert_array_equal(pixels(content), np.array(Image.open(BytesIO(content)).convert("RGB")))


def test_a_jpeg_of_thousands_of_scans_is_refused_before_they_cost_time() -> None:
    # 10 that every progressive one has
    assert decode(scans(90), 3).shape == (3, 48, 64)
    with pytest.raises(UndecodableError, match="a JPEG of 101 scans, which would take minutes; 100 are read at most"):
        decode(scans(91), 3)


def test_an_image_of_one_very_long_row_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow can't convert a row of 90 million pixels to an array; here a shorter row is converted in small parts."""
    asked = []
    image = encoded(Image.fromarray(NOISE), "png")
    monkeypatch.setattr("svite_scale.data.decode.STRIP", 4)
    convert = Image.Image.convert
    monkeypatch.setattr(Image.Image, "convert", lambda part, mode: (asked.append(part.size), convert(part, mode))[1])
    np.testing.assert_array_equal(pixels(image), NOISE)
    assert set(asked) == {(4, 1), (1, 1)}


@pytest.mark.filterwarnings("error")
def test_a_large_image_is_converted_in_strips() -> None:
    """Pillow only warns of it. The strips together equal a conversion of the whole image."""
    colours = np.random.default_rng(1).integers(0, 256, (2100, 2000, 3), dtype=np.uint8)
    for image in (
        Image.fromarray(colours).quantize(7),
        Image.fromarray(colours).convert("CMYK"),
        Image.fromarray(colours[..., 0]),
    ):
        content = encoded(image, "png" if image.mode != "CMYK" else "tiff")
        np.testing.assert_array_equal(pixels(content), np.array(Image.open(BytesIO(content)).convert("RGB")))
    wide = np.linspace(0, 65535, 2100 * 2000).astype(np.uint16).reshape(2100, 2000)
    np.testing.assert_array_equal(
        pixels(encoded(Image.fromarray(wide), "png"), 1)[..., 0], np.round(wide / 257).astype(np.uint8)
    )


@pytest.mark.filterwarnings("error")
def test_the_limit_of_pixels_is_ours_and_not_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    content = photograph(64, 48)
    assert decode(content, 3).shape == (3, 48, 64)
    assert decode(content, 3, max_pixels=64 * 48).shape == (3, 48, 64)
    with pytest.raises(UndecodableError, match=r"64 x 48 pixels are more than data\.max_pixels = 3,071 allows"):
        decode(content, 3, max_pixels=64 * 48 - 1)
    narrow = encoded(Image.new("L", (1, 48)), "png")
    assert decode(narrow, 3, max_pixels=64 * 48).shape == (3, 48, 1)
    with pytest.raises(UndecodableError, match="1 x 48 pixels"):
        decode(narrow, 3, max_pixels=64 * 48 - 1)
    assert Image.MAX_IMAGE_PIXELS == 100
