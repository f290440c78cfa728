"""One rule for folders and tars: both give the same samples and classes, and count all other files."""

from __future__ import annotations

import os
import socket
import subprocess
import tarfile
from collections import Counter
from io import BytesIO
from pathlib import Path
from types import ModuleType

import pytest

from svite_scale.data.format.index import load_index
from svite_scale.data.format.labels import LabelRule
from svite_scale.data.format.rule import MAX_IMAGE_BYTES
from svite_scale.data.format.scan import scan_tar
from svite_scale.data.make.folder import image_folder
from svite_scale.errors import DataError
from tests.data.numbered import picture, samples_of
from tests.data.tars import make_tar

CLASSES = {"__background__": 0, "Cat.v2": 1, "10": 2, "caf\udce9 noir": 3}
IMAGES = [
    "__background__/0.jpg",
    "__background__/__deep__/1.JPEG",
    "Cat.v2/images/2.png",
    "Cat.v2/x.jpg/3.jpg",
    "Cat.v2/4.a.b.png",
    "Cat.v2/5.jpg",
    "Cat.v2/5.png",
    "10/6 6.jpg",
    "10/7\udce9.jpg",
    "caf\udce9 noir/8.jpg",
]
"""Contents by path; the outermost folder is the class."""
OTHERS = {
    "hidden": ["10/._6 6.jpg", "10/.trash/deep/a.jpg", ".git/10/a.jpg"],
    ".seg.png": ["10/6 6.seg.png"],
    ".webp": ["10/a.webp", "dog/a.v2.webp"],
    ".cls": ["10/6 6.cls"],
    "without extension": ["10/README", "__index__"],
    ".jpg of no class in --classes": ["dog/a.jpg", "top.jpg", "dogs/cat/b.jpg"],
}
LEFT_OUT = {kind: len(files) for kind, files in OTHERS.items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rule") / "train"
    for number, file in enumerate([*IMAGES, *(file for files in OTHERS.values() for file in files)]):
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number, "jpg"))
    (folder / "10" / "empty").mkdir()
    return folder


def expected(root: Path) -> Counter[tuple[bytes, int]]:
    return Counter(((root / file).read_bytes(), CLASSES[file.partition("/")[0]]) for file in IMAGES)


def test_the_rule_holds_for_a_folder(root: Path) -> None:
    source = image_folder(root, CLASSES)
    assert Counter((sample.image, sample.label) for sample in samples_of(source)) == expected(root)
    assert source.left_out == LEFT_OUT


@pytest.mark.parametrize(
    "packed",
    [["-C{0}", "."], ["-C{0}", "--no-recursion", "-T{1}"], ["-C{0}/..", "train"], ["-C{0}/..", "./train"]],
    ids=["dotted", "bare", "in a folder", "in a dotted folder"],
)
@pytest.mark.parametrize("format", ["gnu", "pax"])
def test_the_rule_holds_for_a_tar_of_that_folder(root: Path, tmp_path: Path, packed: list[str], format: str) -> None:
    files = sorted(os.fsencode(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    (tmp_path / "list").write_bytes(b"\n".join(files) + b"\n")
    command = [
        "tar",
        f"--format={format}",
        "-cf",
        f"{tmp_path}/a.tar",
        *(word.format(root, tmp_path / "list") for word in packed),
    ]
    subprocess.run(command, check=True, timeout=60)
    found, left_out = scan_tar(tmp_path / "a.tar", LabelRule(None, CLASSES))
    content = (tmp_path / "a.tar").read_bytes()
    assert Counter((content[s.offset :][: s.length], s.label) for s in found) == expected(root)
    assert left_out == LEFT_OUT


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["train/cat/1.jpg", "train/train/2.jpg"], [0, 1]),
        (["train/1.jpg", "cat/train/2.jpg"], [1, 0]),
        (["cat/cat/1.jpg"], [0]),
        (["data/train/images/1.jpg", "data/cat/images/2.jpg"], [1, 0]),
        (["train/cat/1.jpg"], None),
        (["cat/train/1.jpg", "cat/cat/2.jpg", "train/3.jpg"], None),
    ],
)
def test_a_folder_around_the_classes_may_have_the_name_of_one(
    tmp_path: Path, names: list[str], labels: list[int] | None
) -> None:
    """If a path has two classes, one folder must hold all class folders; otherwise it is an error."""
    shard = make_tar(tmp_path / "a.tar", [(name, b"x") for name in names])
    rule = LabelRule(None, {"cat": 0, "train": 1})
    if labels is None:
        with pytest.raises(DataError, match=r"a\.tar: '\S+' lies in 'cat' and in 'train', all in --classes; take out what is"):
            scan_tar(shard, rule)
    else:
        assert [sample.label for sample in scan_tar(shard, rule).samples] == labels


def test_the_remedy_for_a_name_in_cls_works(command: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfdog\r\nn01\r\n")
    for name, label in {"a.cls": b"\xef\xbb\xbfn01\r\n", "a.json": b'{"label": "n01"}'}.items():
        shard = make_tar(tmp_path / "a.tar", [("part/a.jpg", b"x"), (f"part/{name}", label)])
        assert command.main(["--index", str(shard)]) == 2
        assert "name the classes with --classes" in capsys.readouterr().out
        assert command.main(["--index", str(shard), "--classes", f"{tmp_path}/classes.txt"]) == 0
        assert load_index(shard).labels.tolist() == [1]
        capsys.readouterr()


@pytest.mark.parametrize("label", [b"1", b"1.0", b"cat"])
def test_a_number_is_never_taken_for_that_of_a_class_of_another_list(tmp_path: Path, label: bytes) -> None:
    shard = make_tar(tmp_path / "a.tar", [("n05/a.jpg", b"x"), ("n05/a.cls", label)])
    with pytest.raises(
        DataError, match=r"\.cls holds b'\S+', which is no class of --classes \(numbers are labels only without it\)"
    ):
        scan_tar(shard, LabelRule(None, {"n01": 0, "n02": 1}))


@pytest.mark.parametrize("label", [b"3.0", b"\xef\xbb\xbf3\r\n", b" 3.00 "])
def test_numbers_with_zero_decimals_are_labels(tmp_path: Path, label: bytes) -> None:
    for name, content in {"a.cls": label, "a.json": b'{"label": 3.0}'}.items():
        shard = make_tar(tmp_path / "a.tar", [("a.jpg", b"x"), (name, content)])
        assert [sample.label for sample in scan_tar(shard).samples] == [3]


def test_folders_named_by_numbers_are_sorted_as_text_with_a_warning(
    command: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in range(12):
        (tmp_path / "in" / str(name)).mkdir(parents=True)
        (tmp_path / "in" / str(name) / "a.png").write_bytes(picture(name))
    arguments = ["--source", f"{tmp_path}/in", "--out", f"{tmp_path}/out"]
    assert command.main(arguments) == 0
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert "'11' is label 3, and '2' is label 4; for the order of numbers" in warning
    listed = subprocess.run("ls | sort -n > ../classes.txt", shell=True, cwd=tmp_path / "in", timeout=60)
    assert listed.returncode == 0
    assert command.main([*arguments[:3], f"{tmp_path}/again", "--classes", f"{tmp_path}/classes.txt"]) == 0
    assert "warning: " not in capsys.readouterr().err
    content = (tmp_path / "again" / "train-000000.tar").read_bytes()
    index = load_index(tmp_path / "again" / "train-000000.tar")
    for offset, length, label in zip(index.offsets, index.lengths, index.labels, strict=True):
        assert content[offset : offset + length] == picture(int(label))


def test_files_without_content_are_counted_and_never_opened(tmp_path: Path) -> None:
    """Opening a pipe would wait for ever; the links lead to one, to nothing, and to themselves."""
    folder = tmp_path / "in" / "cat"
    folder.mkdir(parents=True)
    (folder / "a.jpg").write_bytes(picture(1, "jpg"))
    os.mkfifo(folder / "pipe.jpg")
    (folder / "link.jpg").symlink_to(folder / "pipe.jpg")
    os.mkfifo(tmp_path / "in" / "top")
    (folder / "gone.txt").symlink_to("nowhere")
    (folder / "itself.txt").symlink_to("itself.txt")
    here = os.getcwd()
    with socket.socket(socket.AF_UNIX) as unix:
        os.chdir(folder)  # a socket's path is short
        try:
            unix.bind("socket.jpg")
        finally:
            os.chdir(here)
        source = image_folder(tmp_path / "in")
    assert [sample.image for sample in samples_of(source)] == [picture(1, "jpg")]
    assert source.left_out == {"special (pipe, socket or device)": 4, ".txt": 2}
    (folder / "gone.jpg").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"gone\.jpg can't be read"):
        [image_folder(tmp_path / "in").origin(number) for number in range(2)]


def odd(name: str, kind: bytes, linkname: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, linkname, size
    return info


def test_members_that_are_no_files_are_counted(tmp_path: Path) -> None:
    """A volume label, a pipe and devices hold nothing; a hard link has the content of its first name."""
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w") as tar:
        tar.addfile(odd("backup of today", b"V"))
        tar.addfile(odd("./n/a.jpg", tarfile.REGTYPE, size=3), BytesIO(b"abc"))
        for name, kind in {"n/p.jpg": tarfile.FIFOTYPE, "n/c.jpg": tarfile.CHRTYPE, "n/b.jpg": tarfile.BLKTYPE}.items():
            tar.addfile(odd(name, kind))
        tar.addfile(odd("n/again.jpg", tarfile.LNKTYPE, "./n/a.jpg"))
    found, left_out = scan_tar(shard, LabelRule(None, {"n": 0}))
    assert [(sample.key, shard.read_bytes()[sample.offset :][:3]) for sample in found] == [("n/a", b"abc"), ("n/again", b"abc")]
    assert left_out == {"volume label": 1, "special (pipe, socket or device)": 3}


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (odd("n/a.jpg", tarfile.SYMTYPE, "b.jpg"), "is a link, sparse or in parts"),
        (odd("n/a.jpg", tarfile.LNKTYPE, "gone.jpg"), "is a link, sparse or in parts"),
        (odd("n/a.jpg", b"M"), "is a link, sparse or in parts"),
        (odd("n/a.jpg", tarfile.GNUTYPE_SPARSE), "is a link, sparse or in parts"),
    ],
)
def test_members_without_a_content_in_one_piece_are_refused(tmp_path: Path, member: tarfile.TarInfo, message: str) -> None:
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w") as tar:
        tar.addfile(member)
    with pytest.raises(DataError, match=rf"a\.tar: 'n/a\.jpg' {message}"):
        scan_tar(shard, LabelRule(None, {"n": 0}))


def test_an_image_of_two_gibibytes_is_named_and_the_other_shards_are_indexed(
    command: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sparse file, which takes no room on the disk."""
    image = tarfile.TarInfo("x.jpg")
    image.size = MAX_IMAGE_BYTES + 1
    with open(tmp_path / "a.tar", "wb") as file:
        file.write(image.tobuf(tarfile.GNU_FORMAT))
        file.seek(-(-image.size // 512) * 512, os.SEEK_CUR)
        file.write(odd("x.cls", tarfile.REGTYPE, size=1).tobuf() + b"0".ljust(512, b"\0") + bytes(1024))
    make_tar(tmp_path / "b.tar", [("y.jpg", b"x"), ("y.cls", b"0")])
    os.mkfifo(tmp_path / "c.tar")
    (tmp_path / "d.tar").mkdir()
    assert command.main(["--index", str(tmp_path), "--workers", "1"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 indexes are written: 1 samples"
    assert "a.tar: the image of sample 'x' has 2,147,479,553 bytes, and one has 2,147,479,552 at most" in lines[1]
    assert [line for line in lines if "c.tar is no ordinary file" in line]
    assert [line for line in lines if "d.tar is no ordinary file" in line]
    assert load_index(tmp_path / "b.tar").count == 1
    (tmp_path / "in" / "cat").mkdir(parents=True)
    with open(tmp_path / "in" / "cat" / "a.jpg", "wb") as file:
        file.truncate(MAX_IMAGE_BYTES + 1)
    with pytest.raises(DataError, match=r"a\.jpg has 2,147,479,553 bytes"):
        image_folder(tmp_path / "in").sample(0)
