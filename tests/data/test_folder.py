"""Image folders: their files, order and labels."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from svite_scale.data.make.folder import image_folder, labelled_files
from svite_scale.errors import DataError
from tests.data.numbered import picture, samples_of


def write_files(root: Path, files: list[str]) -> dict[str, bytes]:
    """Images with different contents."""
    contents = {file: picture(number, "png" if "png" in file else "jpg") for number, file in enumerate(files)}
    for file, content in contents.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(content)
    return contents


def test_a_folder_of_class_folders_gives_samples_in_a_fixed_order(tmp_path: Path) -> None:
    names = ["ant.1", "bee", "cat"]
    contents = write_files(tmp_path, [f"{name}/{file}" for name in names for file in ("a.b.JPEG", "a-b.png", "deep/ü c.jpg")])
    (tmp_path / "bee" / "notes.txt").write_text("not an image")
    (tmp_path / "README").write_text("not a class")
    expected = [
        (content, file.rpartition(".")[2].lower(), names.index(file.partition("/")[0])) for file, content in contents.items()
    ]
    source = image_folder(tmp_path)
    samples = samples_of(source)
    assert Counter((sample.image, sample.extension, sample.label) for sample in samples) == Counter(expected)
    assert source.classes == names
    assert source.keys == [sample.key for sample in samples]
    assert len(set(source.keys)) == 9
    assert [sample.label for sample in samples] != sorted(sample.label for sample in samples)
    assert samples_of(image_folder(tmp_path)) == samples
    assert samples_of(image_folder(f"{os.path.relpath(tmp_path)}/")) == samples


def test_hidden_files_are_no_samples_and_no_classes(tmp_path: Path) -> None:
    contents = write_files(tmp_path, ["ant/a.png", "ant/._a.png", "ant/.trash/b.png", ".ipynb_checkpoints/c.png"])
    source = image_folder(tmp_path)
    assert source.classes == ["ant"]
    assert [sample.image for sample in samples_of(source)] == [contents["ant/a.png"]]
    assert source.left_out == {"hidden": 3}


def test_a_list_of_classes_picks_and_numbers_them(tmp_path: Path) -> None:
    contents = write_files(tmp_path, ["ant/a.png", "bee/b.png", "cat/c.png", "cat/d.png"])
    source = image_folder(tmp_path, {"cat": 0, "ant": 1})
    assert {(sample.image, sample.label) for sample in samples_of(source)} == {
        (contents["cat/c.png"], 0),
        (contents["cat/d.png"], 0),
        (contents["ant/a.png"], 1),
    }
    with pytest.raises(DataError, match="has no folder 'dog', which line 2 of --classes names"):
        image_folder(tmp_path, {"cat": 0, "dog": 1})


def test_a_list_of_files_picks_and_labels_them(tmp_path: Path) -> None:
    contents = write_files(tmp_path, ["a.png", "deep/b.jpg", "c.png"])
    source = labelled_files(tmp_path, [("c.png", 4), ("deep/b.jpg", 2)], None)
    assert {(sample.image, sample.label) for sample in samples_of(source)} == {
        (contents["c.png"], 4),
        (contents["deep/b.jpg"], 2),
    }
    (tmp_path / "list.txt").write_text("")
    for file in ("none.png", "list.txt", "deep"):
        with pytest.raises(DataError, match=rf"{file}, which --labels names, is no image \(jpeg, jpg, png\) there"):
            labelled_files(tmp_path, [(file, 0)], None)


def test_links_to_folders_are_followed(tmp_path: Path) -> None:
    contents = write_files(tmp_path, ["in/ant/a.png", "elsewhere/b.png", "elsewhere/deep/c.png"])
    link = tmp_path / "in" / "ant" / "more"
    link.symlink_to(tmp_path / "elsewhere")
    assert {sample.image for sample in samples_of(image_folder(tmp_path / "in"))} == set(contents.values())
    (tmp_path / "elsewhere" / "deep" / "loop").symlink_to(tmp_path / "in" / "ant")
    with pytest.raises(DataError, match=r"ant/more/deep/loop leads to \S+/in/ant, whose files are read already; take the link"):
        image_folder(tmp_path / "in")


def test_an_unreadable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, ["ant/a.png", "ant/deep/b.png"])
    scandir = os.scandir

    def denied(path: str) -> Iterator[os.DirEntry[str]]:
        if os.path.basename(path) == "deep":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(DataError, match=r"ant/deep can't be read \(Permission denied\); make it readable"):
        image_folder(tmp_path)


def test_folders_without_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        image_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match="has no class folders"):
        image_folder(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty has no image \(jpeg, jpg, png\) but nothing"):
        image_folder(tmp_path)
    for number in range(12):
        (tmp_path / "empty" / f"{number}.k{number:02d}").touch()
    (tmp_path / "empty" / "1.k11").touch()
    with pytest.raises(DataError, match=r"but 2 \.k11, 1 \.k00, 1 \.k01, .* 1 \.k08, 2 others; every folder"):
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
