"""Glyphs: letters and digits that fonts draw, with the fonts that come with matplotlib."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from types import ModuleType

import matplotlib
import numpy as np
import pytest
from fontTools.ttLib import TTFont
from PIL import Image

from svite_scale.data.format.patterns import load_indexes
from svite_scale.data.make.glyphs import CHARACTERS, CLASSES, Font, Glyph, Glyphs, Pixels, find_glyphs
from svite_scale.data.make.shards import Sample
from svite_scale.errors import DataError
from tests.data.numbered import samples_of

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
SANS, SERIF, MATHS, LAST_RESORT = "DejaVuSans.ttf", "DejaVuSerif.ttf", "STIXGeneral.ttf", "LastResortHE-Regular.ttf"


def folder_of(folder: Path, *names: str) -> str:
    """A folder with copies of some fonts."""
    folder.mkdir(exist_ok=True)
    for name in names:
        shutil.copy(FONTS / name, folder)
    return str(folder)


def with_characters(path: Path, glyph_of: Callable[[str], str]) -> None:
    """Writes DejaVu Sans with the glyphs of other characters in the places of letters and digits."""
    font = TTFont(FONTS / SANS)
    names = dict(font.getBestCmap())
    for table in font["cmap"].tables:
        if table.isUnicode():
            table.cmap |= {ord(character): names[ord(glyph_of(character))] for character in CHARACTERS}
    font.save(path)


def pixels_of(sample: Sample) -> Pixels:
    return np.asarray(Image.open(BytesIO(sample.image)))


@pytest.fixture(scope="module")
def glyphs() -> dict[str, list[Glyph]]:
    return find_glyphs([str(FONTS)], 1)[0]


def test_families_are_in_one_split_and_pictures_are_unique(glyphs: dict[str, list[Glyph]]) -> None:
    first_words = {split: {glyph.font.family.split()[0] for glyph in found} for split, found in glyphs.items()}
    assert "DejaVu" in first_words["train"]
    assert "STIXGeneral" in first_words["val"]
    assert not first_words["train"] & first_words["val"]
    pictures = [glyph.content for found in glyphs.values() for glyph in found]
    assert len(pictures) == len(set(pictures)) > 1000


def test_a_glyph_is_scaled_and_in_the_middle(glyphs: dict[str, list[Glyph]]) -> None:
    for sample in samples_of(Glyphs(glyphs["val"])):
        pixels = pixels_of(sample)
        assert pixels.shape == (28, 28)
        rows, columns = np.flatnonzero(pixels.max(1)), np.flatnonzero(pixels.max(0))
        # The faintest pixels at an edge may round to black.
        assert 21 <= max(np.ptp(rows), np.ptp(columns)) + 1 <= 22
        for inked in (rows, columns):
            assert abs(inked[0] + inked[-1] - 27) <= 2
        assert sample.label == CLASSES.index(sample.key[-1].lower())


def test_a_font_gives_each_of_its_characters_once(tmp_path: Path) -> None:
    found, left_out = find_glyphs([folder_of(tmp_path / "fonts", SANS, SERIF, MATHS)], 1)
    positions = [glyph.position for glyph in found["train"] if glyph.font.family == "DejaVu Serif"]
    assert positions == list(range(62))
    labels = Counter(sample.label for sample in samples_of(Glyphs(found["train"])))
    assert labels == {label: 4 if label < 26 else 2 for label in range(36)}
    assert not left_out
    serif = next(glyph.font for glyph in found["train"] if glyph.font.family == "DejaVu Serif")
    assert "Bitstream" in serif.licence


def test_the_result_depends_on_the_fonts_only(tmp_path: Path) -> None:
    def checksum(*folders: str) -> str:
        source = Glyphs(find_glyphs(folders, 1)[0]["train"])
        return source.details["checksum"]

    together = checksum(folder_of(tmp_path / "all", SANS, SERIF, MATHS))
    apart = [folder_of(tmp_path / f"{number}", name) for number, name in enumerate((SERIF, MATHS, SANS))]
    (tmp_path / "2" / SANS).rename(tmp_path / "2" / "another-name.TTF")
    assert checksum(*apart) == together
    assert checksum(folder_of(tmp_path / "more", SANS, SERIF, MATHS, "cmr10.ttf")) != together


def test_unsuitable_fonts_are_left_out_by_reason(tmp_path: Path) -> None:
    folder = Path(folder_of(tmp_path / "fonts", SANS, SERIF, MATHS, LAST_RESORT, "cmex10.ttf", "STIXNonUni.ttf"))
    shutil.copy(FONTS / SANS, folder / "copy.ttf")
    (folder / "damaged.otf").write_bytes((FONTS / SERIF).read_bytes()[:5000])
    (folder / "readme.txt").write_text("no font")
    with_characters(folder / "boxes.ttf", lambda character: "a" if character in "abcd" else character)
    with_characters(folder / "symbols.ttf", lambda character: CHARACTERS[(CHARACTERS.index(character) + 7) % 62])
    found, left_out = find_glyphs([str(folder)], 1)
    assert left_out == {
        "of symbols": 2,
        "with empty boxes": 2,
        "copies of others": 1,
        "without all letters and digits": 1,
        "unreadable": 1,
    }
    assert len(found["train"]) == 124


def test_a_larger_canvas_has_the_picture_at_a_place_of_the_sample(glyphs: dict[str, list[Glyph]]) -> None:
    plain, placed = Glyphs(glyphs["val"][:20], 56), Glyphs(glyphs["val"][:20], 56, 84)
    places = set()
    for small, large in zip(samples_of(plain), samples_of(placed), strict=True):
        picture, canvas = pixels_of(small), pixels_of(large)
        assert (picture.shape, canvas.shape) == ((56, 56), (84, 84))
        (place,) = [
            (top, left) for top, left in np.ndindex(29, 29) if (canvas[top : top + 56, left : left + 56] == picture).all()
        ]
        assert canvas.sum() == picture.sum()
        places.add(place)
    assert len(places) > 15
    assert plain.origin(0) != placed.origin(0)


def test_a_font_that_vanishes_is_named(tmp_path: Path) -> None:
    found, _ = find_glyphs([folder_of(tmp_path / "fonts", SANS, MATHS)], 1)
    (tmp_path / "fonts" / SANS).unlink()
    with pytest.raises(DataError, match=r"DejaVuSans.ttf can't be read .*; restore it"):
        Glyphs(found["train"]).sample(0)


def test_one_split_without_a_font_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"for val \(2 can be used, and a family is in one split\); give folders of more families"
    ):
        find_glyphs([folder_of(tmp_path / "fonts", SANS, SERIF)], 1)


@pytest.mark.slow
def test_the_command_writes_glyphs_and_lists_their_fonts(
    command: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fonts, out = folder_of(tmp_path / "fonts", SANS, SERIF, MATHS), tmp_path / "out"
    arguments = ["--source", "glyphs", "--fonts", fonts, "--out", str(out), "--image-size", "14", "--canvas", "16"]
    assert command.main(arguments) == 0
    assert capsys.readouterr().out.startswith("3 fonts of 3 families\nwrote 1 of 1 shards: 124 images in ")
    info = json.loads((out / "_info.json").read_text())["splits"]
    assert info["val"]["classes"] == CLASSES
    assert (info["train"]["num_samples"], info["train"]["image_size"], info["train"]["canvas"]) == (124, 14, 16)
    assert [(font["family"], font["file"]) for font in info["train"]["fonts"]] == [
        ("DejaVu Sans", SANS),
        ("DejaVu Serif", SERIF),
    ]
    assert {len(font["sha256"]) for split in info.values() for font in split["fonts"]} == {64}
    (index,) = load_indexes(f"{out}/val-*.tar")
    assert index.count == info["val"]["num_samples"] == 62

    assert command.main(arguments) == 0
    assert capsys.readouterr().out.count("already complete: ") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fonts", "{}/nowhere"], "{}/nowhere is not a folder; give one that holds fonts"),
        (
            ["--fonts", "{}"],
            "there is no font (.ttf or .otf) under {}; install packages of fonts (docs/data.md names Debian's)",
        ),
        (["--canvas", "20"], "--canvas is 20; use at least the image size, 28"),
        (["--image-size", "0"], "--image-size is 0; use at least 1"),
    ],
)
def test_mistakes_are_errors_of_one_line(
    command: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    given = [argument.format(tmp_path) for argument in arguments]
    assert command.main(["--source", "glyphs", "--out", f"{tmp_path}/out", *given]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message.format(tmp_path)}")


def test_a_split_is_chosen_by_the_first_word_of_the_family() -> None:
    def split(family: str) -> str:
        return Font(Path(), family, "", "", np.zeros((62, 28, 28), np.uint8)).split

    families = [f"Family{number}" for number in range(1000)]
    assert 100 < sum(split(family) == "val" for family in families) < 200
    assert all(split(family) == split(f"{family.upper()} Sans Mono") for family in families)
