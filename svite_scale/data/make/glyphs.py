"""Letters and digits, drawn from the fonts of a machine."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase, digits
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from fontTools.ttLib import TTFont
from PIL import Image, ImageFont

from svite_scale.data.make.folder import readable_stem, require_folder
from svite_scale.data.make.processes import in_processes
from svite_scale.data.make.shards import Sample, Source, permutation
from svite_scale.errors import DataError

CHARACTERS = ascii_uppercase + ascii_lowercase + digits
CLASSES = [*ascii_lowercase, *digits]
"""Case doesn't count, because many letters have one form in both cases."""
LABELS = [CLASSES.index(character.lower()) for character in CHARACTERS]

FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts")
EXTENSIONS = frozenset({".ttf", ".otf"})
REMEDY = "install packages of fonts (docs/data.md names Debian's), or give folders of fonts as --fonts"
MORE_FAMILIES = "give folders of more families as --fonts, or install packages of fonts (docs/data.md names Debian's)"

IMAGE_SIZE, GLYPH_SIZE = 28, 22
"""Pixels of a picture, and of the longer side of the letter in its middle; other sizes have the same ratio."""
OVERSAMPLING = 4
VAL_FRACTION = 0.15
MAX_LICENCE = 200
"""Characters of a licence that are listed."""

Pixels = npt.NDArray[np.uint8]


class Font(NamedTuple):
    """A font with all characters."""

    path: Path
    family: str
    digest: str
    """SHA-256 of the file."""
    licence: str
    """The font's own statement, shortened; empty if it has none."""
    pictures: Pixels
    """``[62, 28, 28]``, of ``CHARACTERS``."""

    @property
    def split(self) -> Literal["train", "val"]:
        """The split of the font, by the first word of its family: DejaVu Sans and DejaVu Serif are in the same split."""
        group = (self.family.lower().split() or [""])[0]
        number = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big")
        return "val" if number < VAL_FRACTION * 2**64 else "train"


class Glyph(NamedTuple):
    """One character of a font."""

    font: Font
    position: int
    """In ``CHARACTERS``."""

    @property
    def content(self) -> bytes:
        return self.font.pictures[self.position].tobytes()


class Glyphs(Source):
    """The letters and digits of fonts as grey PNG, white on black, in a fixed permutation.

    Args:
        glyphs: at least one.
        image_size: pixels of the picture that has the letter in its middle.
        canvas: pixels of the image, at least ``image_size``; the picture is at a place that the sample's key decides.
    """

    classes = CLASSES

    def __init__(self, glyphs: Sequence[Glyph], image_size: int = IMAGE_SIZE, canvas: int | None = None) -> None:
        self._glyphs = [glyphs[number] for number in permutation(len(glyphs))]
        self._image_size, self._canvas = image_size, canvas or image_size
        self.keys = [
            f"{number:06d}-{readable_stem(font.path.name)}-{CHARACTERS[position]}"
            for number, (font, position) in enumerate(self._glyphs)
        ]
        checksum = hashlib.sha256()
        for glyph in self._glyphs:
            checksum.update(glyph.content)
        fonts = {font.digest: font for font, _ in glyphs}
        self.details: dict[str, Any] = {
            "image_size": self._image_size,
            "canvas": self._canvas,
            "checksum": checksum.hexdigest(),
            "fonts": [
                {"family": font.family, "file": font.path.name, "sha256": font.digest, "licence": font.licence}
                for font in fonts.values()
            ],
        }

    def sample(self, number: int) -> Sample:
        key, (font, position) = self.keys[number], self._glyphs[number]
        try:
            picture = draw(open_font(font.path.read_bytes(), self._image_size), CHARACTERS[position], self._image_size)
        except OSError as error:
            raise DataError(
                f"{font.path} can't be read ({error}); restore it, or remove it from the folder of fonts"
            ) from error
        random = np.random.RandomState(list(key.encode()))
        left, top = random.randint(self._canvas - self._image_size + 1, size=2)
        image = Image.new("L", (self._canvas, self._canvas))
        image.paste(picture, (left, top))
        content = BytesIO()
        image.save(content, "png")
        return Sample(key, content.getvalue(), "png", LABELS[position])

    def origin(self, number: int) -> str:
        return f"{self.keys[number]} {self._glyphs[number].font.digest} {self._image_size} {self._canvas}"


def open_font(content: bytes, image_size: int) -> ImageFont.FreeTypeFont:
    """Opens a font file in a size from which pictures of ``image_size`` pixels are scaled down."""
    return ImageFont.truetype(BytesIO(content), OVERSAMPLING * glyph_size(image_size), layout_engine=ImageFont.Layout.BASIC)


def glyph_size(image_size: int) -> int:
    return max(1, image_size * GLYPH_SIZE // IMAGE_SIZE)


def draw(font: ImageFont.FreeTypeFont, character: str, image_size: int) -> Image.Image:
    """Returns a square picture with a character in its middle, cropped and scaled; black if the font draws nothing."""
    picture = Image.new("L", (image_size, image_size))
    mask = font.getmask(character, mode="L")
    box = mask.getbbox()
    if box is None:
        return picture
    letter = Image.frombytes("L", mask.size, bytes(mask)).crop(box)
    scale = glyph_size(image_size) / max(letter.size)
    width, height = (max(1, round(side * scale)) for side in letter.size)
    letter = letter.resize((width, height), Image.Resampling.LANCZOS)
    picture.paste(letter, ((image_size - width) // 2, (image_size - height) // 2))
    return picture


def find_glyphs(folders: Sequence[str] | None, workers: int) -> tuple[dict[str, list[Glyph]], Counter[str]]:
    """Reads all fonts under some folders, in processes.

    The result depends on the fonts, not on their places. Two glyphs never have the same picture.

    Args:
        folders: of fonts, at any depth; by default the folders in which a machine has its fonts.
        workers: processes.

    Returns:
        The glyphs of the splits ``train`` and ``val``, and the number of files that are left out, by reason.

    Raises:
        DataError: a folder is missing, or one of the splits has no glyph.
    """
    paths = find_fonts(folders)
    found = list(in_processes(read_font, paths, workers))
    left_out = Counter(font for font in found if isinstance(font, str))
    fonts = sorted((font for font in found if isinstance(font, Font)), key=lambda font: (font.family, font.digest, font.path))
    alphabets = [font for font, matches in zip(fonts, count_matches(fonts), strict=True) if matches >= len(CHARACTERS) / 4]
    left_out["of symbols"] = len(fonts) - len(alphabets)
    splits: dict[str, list[Glyph]] = {"train": [], "val": []}
    known: set[bytes] = set()
    for font in alphabets:
        glyphs = new_glyphs(font, known)
        left_out["copies of others"] += not glyphs
        splits[font.split] += glyphs
    for split, chosen in splits.items():
        if not chosen:
            problem = (
                f"{len(paths)} fonts give no image for {split} ({len(alphabets)} can be used, and a family is in one split)"
            )
            raise DataError(f"{problem}; {MORE_FAMILIES}")
    return splits, +left_out


def new_glyphs(font: Font, known: set[bytes]) -> list[Glyph]:
    """Returns the glyphs of a font whose pictures aren't known yet, and adds their pictures to the known ones."""
    glyphs = []
    for position in range(len(CHARACTERS)):
        glyph = Glyph(font, position)
        if glyph.content not in known:
            known.add(glyph.content)
            glyphs.append(glyph)
    return glyphs


def find_fonts(folders: Sequence[str] | None) -> list[Path]:
    """Returns the paths of the font files under some folders."""
    if folders is None:
        searched = [folder for name in FOLDERS if (folder := Path(name).expanduser()).is_dir()]
    else:
        searched = [require_folder(name, "fonts") for name in folders]
    paths = [path for folder in searched for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file()]
    if not paths:
        raise DataError(f"there is no font (.ttf or .otf) under {', '.join(folders or FOLDERS)}; {REMEDY}")
    return sorted(set(paths))


def read_font(path: Path) -> Font | str:
    """Returns a font, or the reason why it is left out."""
    logging.getLogger("fontTools").setLevel(logging.CRITICAL)  # it reports small faults of many fonts
    try:
        content = path.read_bytes()
        with TTFont(BytesIO(content), lazy=True) as tables:
            codes = tables.getBestCmap() or {}
            names = tables["name"]
            family = names.getDebugName(16) or names.getDebugName(1) or path.stem
            # The licence, its address, or the copyright.
            licence = names.getDebugName(13) or names.getDebugName(14) or names.getDebugName(0) or ""
        if not all(ord(character) in codes for character in CHARACTERS):
            return "without all letters and digits"
        font = open_font(content, IMAGE_SIZE)
        pictures = np.stack([np.asarray(draw(font, character, IMAGE_SIZE)) for character in CHARACTERS])
    except Exception:  # both libraries raise nearly anything for a damaged file
        return "unreadable"
    if pictures.max(axis=(1, 2)).min() < 128 or has_boxes(pictures):
        return "with empty boxes"
    return Font(path, family, hashlib.sha256(content).hexdigest(), " ".join(licence.split())[:MAX_LICENCE], pictures)


def has_boxes(pictures: Pixels) -> bool:
    """Tests whether four classes share a picture, the box that stands for a missing glyph. (i, l and 1 may be the same.)"""
    classes: dict[bytes, set[int]] = {}
    for picture, label in zip(pictures, LABELS, strict=True):
        classes.setdefault(picture.tobytes(), set()).add(label)
    return max(map(len, classes.values())) >= 4


def count_matches(fonts: Sequence[Font]) -> list[int]:
    """Counts each font's characters that look most like a character of the same class in the mean of the other fonts.

    Symbols in the places of letters look like other letters.
    """
    if len(fonts) < 2:
        return [len(CHARACTERS)] * len(fonts)
    labels = np.array(LABELS)
    total = sum(normalized(font.pictures) for font in fonts)
    matches = []
    for font in fonts:
        pictures = normalized(font.pictures)
        nearest = (pictures @ normalized(total - pictures).T).argmax(axis=1)
        matches.append(int((labels[nearest] == labels).sum()))
    return matches


def normalized(pictures: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Returns pictures as rows ``[62, pixels]`` of mean 0 and norm 1."""
    rows = pictures.reshape(len(pictures), -1).astype(np.float64)
    rows -= rows.mean(axis=1, keepdims=True)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
