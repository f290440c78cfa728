"""Image folders: which files, in which order, with which labels."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from svite_scale.data.folder import image_folder, labelled_files
from svite_scale.errors import DataError
from tests.data.numbered import picture


def write_files(root: Path, files: list[str]) -> dict[str, bytes]:
    """Images of all different content."""
    contents = {file: picture(number, "png" if "png" in file else "jpg") for number, file in enumerate(files)}
    for file, content in contents.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(content)
    return contents


def test_image_folder(tmp_path: Path) -> None:
    names = ["ant.1", "bee", "cat"]
    contents = write_files(tmp_path, [f"{name}/{file}" for name in names for file in ("a.b.JPEG", "a-b.png", "deep/ü c.jpg")])
    (tmp_path / "bee" / "notes.txt").write_text("not an image")
    (tmp_path / "README").write_text("not a class")
    expected = [
        (content, file.rpartition(".")[2].lower(), names.index(file.partition("/")[0])) for file, content in contents.items()
    ]
    source = image_folder(tmp_path)
    samples = list(source.samples)
    assert Counter((sample.image, sample.extension, sample.label) for sample in samples) == Counter(expected)
    assert source.classes == names
    assert source.keys == [sample.key for sample in samples]
    assert len(set(source.keys)) == 9
    assert [sample.label for sample in samples] != sorted(sample.label for sample in samples)
    assert list(image_folder(tmp_path).samples) == samples
    assert list(image_folder(f"{os.path.relpath(tmp_path)}/").samples) == samples


def test_a_list_of_classes_picks_and_numbers_them(tmp_path: Path) -> None:
    contents = write_files(tmp_path, ["ant/a.png", "bee/b.png", "cat/c.png", "cat/d.png"])
    source = image_folder(tmp_path, {"cat": 0, "ant": 1})
    assert {(sample.image, sample.label) for sample in source.samples} == {
        (contents["cat/c.png"], 0),
        (contents["cat/d.png"], 0),
        (contents["ant/a.png"], 1),
    }
    with pytest.raises(DataError, match="has no folder 'dog', which line 2 of --classes names"):
        image_folder(tmp_path, {"cat": 0, "dog": 1})


def test_a_list_of_files_picks_and_labels_them(tmp_path: Path) -> None:
    contents = write_files(tmp_path, ["a.png", "deep/b.jpg", "c.png"])
    source = labelled_files(tmp_path, [("c.png", 4), ("deep/b.jpg", 2)], None)
    assert {(sample.image, sample.label) for sample in source.samples} == {(contents["c.png"], 4), (contents["deep/b.jpg"], 2)}
    (tmp_path / "list.txt").write_text("")
    for file in ("none.png", "list.txt", "deep"):
        with pytest.raises(DataError, match=rf"{file}, which --labels names, is no image \(jpeg, jpg, png\) there"):
            labelled_files(tmp_path, [(file, 0)], None)


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        image_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match="has no class folders"):
        image_folder(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty has no image"):
        image_folder(tmp_path)


def test_a_file_that_is_empty_or_vanished_is_named(tmp_path: Path) -> None:
    write_files(tmp_path, ["ant/a.png", "ant/b.png"])
    source = image_folder(tmp_path)
    (tmp_path / "ant" / "a.png").write_bytes(b"")
    (tmp_path / "ant" / "b.png").unlink()
    empty, gone = sorted(range(2), key=lambda number: source.keys[number][-1])
    with pytest.raises(DataError, match=r"ant/a\.png is empty; restore it"):
        source.sample(empty)
    for read in (source.sample, source.origin):
        with pytest.raises(DataError, match=r"ant/b\.png can't be read"):
            read(gone)
