"""Shards written by several processes: the same bytes for any number of them, and after any kill."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from svite_scale.data.format.index import load_index, sidecar_path
from svite_scale.data.format.patterns import load_indexes
from svite_scale.data.make.folder import ImageFiles, image_folder
from svite_scale.data.make.processes import in_processes
from svite_scale.data.make.shards import Output
from svite_scale.errors import DataError
from tests.data.numbered import picture

ROOT = Path(__file__).parents[2]
NUM_IMAGES, PER_SHARD = 310, 13
NUM_SHARDS = 24


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of files of up to 60 kB, which needn't be images to be written."""
    root = tmp_path_factory.mktemp("images")
    for number in range(NUM_IMAGES):
        path = root / "abc"[number % 3] / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(random.Random(number).randbytes(1 + number * 200))
    return root


def write(source: ImageFiles, folder: Path, workers: int) -> int:
    """Writes what is missing, and returns the number of shards written."""
    output = Output(source, folder, "train", PER_SHARD)
    missing = output.missing(workers)
    assert sum(output.write(missing, workers)) == sum(output.counts[number] for number in missing)
    return len(missing)


def contents(folder: Path) -> dict[str, str]:
    """Every file's name, and a checksum."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files that an uninterrupted process writes."""
    folder = tmp_path_factory.mktemp("whole")
    assert write(image_folder(images), folder, 1) == NUM_SHARDS
    return contents(folder)


def test_every_image_is_written_once(images: Path, tmp_path: Path) -> None:
    write(image_folder(images), tmp_path, 2)
    found = []
    for index in load_indexes(str(tmp_path)):
        content = index.path.read_bytes()
        places = zip(index.offsets, index.lengths, index.labels, strict=True)
        found += [(content[offset:][:length], int(label)) for offset, length, label in places]
        assert index.sha256 == hashlib.sha256(content).hexdigest()
    expected = [(path.read_bytes(), "abc".index(path.parent.name)) for path in images.rglob("*.jpg")]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("workers", [2, 5])
def test_bytes_do_not_depend_on_the_number_of_processes(
    images: Path, whole: dict[str, str], tmp_path: Path, workers: int
) -> None:
    assert write(image_folder(images), tmp_path, workers) == NUM_SHARDS
    assert contents(tmp_path) == whole
    assert write(image_folder(images), tmp_path, workers) == 0


def start(images: Path, folder: Path) -> int:
    """Starts writing in a forked process, and returns its id."""
    child = os.fork()
    if not child:
        status = 1
        try:
            write(image_folder(images), folder, 2)
            status = 0
        finally:
            os._exit(status)
    return child


def ended(child: int) -> bool:
    return os.waitpid(child, os.WNOHANG)[0] == child


def test_writing_gives_the_same_bytes_after_random_kills(images: Path, whole: dict[str, str], tmp_path: Path) -> None:
    """Each kill comes at a random moment after a few more files, also temporary ones, have appeared."""
    draw = random.Random(7)
    workers = set()
    for _ in range(10):
        child = start(images, tmp_path)
        appear = len(list(tmp_path.iterdir())) + draw.randrange(8)
        while not (finished := ended(child)) and len(list(tmp_path.iterdir())) < appear:
            time.sleep(0.0002)
        if finished:  # too late for a kill: begin again with a part of it
            for path in sorted(tmp_path.iterdir())[::3]:
                path.unlink()
            continue
        time.sleep(draw.uniform(0, 0.01))
        workers |= set(psutil.Process(child).children(recursive=True))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    write(image_folder(images), tmp_path, 2)
    assert contents(tmp_path) == whole
    assert workers
    _, alive = psutil.wait_procs(workers, timeout=300)
    assert not alive  # a worker ends with its parent
    assert contents(tmp_path) == whole


def test_the_command_resumes_after_it_is_killed(images: Path, whole: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "launch" / "make_shards.py"), "--source", str(images), "--out", str(tmp_path)]
    command += ["--samples-per-shard", str(PER_SHARD), "--workers", "3"]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and len(list(tmp_path.iterdir())) < 9:
        time.sleep(0.0002)
    process.kill()
    process.wait()
    (tmp_path / "_info.json").unlink(missing_ok=True)  # of a command that was quicker than the kill
    write(image_folder(images), tmp_path, 2)
    assert contents(tmp_path) == whole


def test_only_what_is_missing_or_differs_is_written(images: Path, whole: dict[str, str], tmp_path: Path) -> None:
    source = image_folder(images)
    write(source, tmp_path, 2)
    for name in (".train-000003.tar.99.tmp", ".train-000004.tar.index.json.7.tmp"):
        (tmp_path / name).write_bytes(b"left by a killed process")
    of_others = tmp_path / ".train-extra-000003.tar.99.tmp"
    of_others.write_bytes(b"being written")
    (tmp_path / "train-000004.tar").unlink()
    sidecar_path(tmp_path / "train-000005.tar").unlink()
    sidecar_path(tmp_path / "train-000006.tar").write_text("{}")
    os.truncate(tmp_path / "train-000007.tar", 1024)
    assert Output(source, tmp_path, "train", PER_SHARD).missing(2) == [4, 5, 6, 7]
    assert write(source, tmp_path, 2) == 4
    of_others.unlink()
    assert contents(tmp_path) == whole


def small_source(root: Path) -> ImageFiles:
    return ImageFiles(root, [(f"{number}.png", number) for number in range(6)], None)


def missing(root: Path, out: Path, per_shard: int = 2) -> list[int]:
    return Output(small_source(root), out, "train", per_shard).missing(1)


def test_changed_sources_are_written_again(tmp_path: Path) -> None:
    root, out = tmp_path / "in", tmp_path / "out"
    root.mkdir()
    for number in range(6):
        (root / f"{number}.png").write_bytes(picture(number))
    output = Output(small_source(root), out, "train", 2)
    list(output.write(output.missing(1), 1))
    assert missing(root, out) == []
    shard_of = {index.key(row)[-1]: number for number, index in enumerate(load_indexes(str(out))) for row in range(2)}

    longer = root / "3.png"
    content, changed = longer.read_bytes(), longer.stat().st_mtime_ns
    longer.write_bytes(content + b" ")
    os.utime(longer, ns=(changed, changed))
    assert missing(root, out) == [shard_of["3"]]
    longer.write_bytes(content)  # as before, but of another time
    for other in (changed - 10**9, changed + 10**13):
        os.utime(longer, ns=(other, other))
        assert missing(root, out) == [shard_of["3"]]
    assert write_all(output, 1) == 2
    assert missing(root, out) == []  # also where the time is in the future
    os.utime(longer, ns=(changed, changed))
    assert write_all(output, 1) == 2
    assert missing(root, out) == []

    relabelled = ImageFiles(root, [(f"{number}.png", number + (number == 5)) for number in range(6)], None)
    assert Output(relabelled, out, "train", 2).missing(1) == [shard_of["5"]]
    assert missing(root, out, per_shard=1) == [0, 1, 2, 3, 4, 5]


def test_an_error_ends_the_work_and_keeps_what_is_finished(tmp_path: Path) -> None:
    root, out = tmp_path / "in", tmp_path / "out"
    root.mkdir()
    for number in range(6):
        (root / f"{number}.png").write_bytes(picture(number) if number != 4 else b"")
    output = Output(small_source(root), out, "train", 1)
    with pytest.raises(DataError, match=r"4\.png is empty"):
        list(output.write(output.missing(2), 2))
    left = contents(out)
    assert all(load_index(path) for path in out.glob("*.tar"))
    assert not [name for name in left if name.endswith(".tmp")]
    (root / "4.png").write_bytes(picture(4))
    assert write_all(output, 2) <= 6
    assert {name: left[name] for name in left} == {name: contents(out)[name] for name in left}
    assert len(load_indexes(str(out))) == 6


def write_all(output: Output, workers: int) -> int:
    return sum(output.write(output.missing(workers), workers))


def test_a_longer_output_before_is_refused_at_once(tmp_path: Path) -> None:
    source = small_source(tmp_path)
    (tmp_path / "train-000003.tar").touch()
    with pytest.raises(DataError, match=r"train-000003\.tar remains .* after train-000002\.tar"):
        Output(source, tmp_path, "train", 2)
    assert Output(source, tmp_path, "val", 2).counts == [2, 2, 2]
    assert Output(source, tmp_path, "train", 1).counts == [1] * 6


def die(item: int) -> int:
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_a_killed_worker_is_an_error_and_not_a_hang() -> None:
    with pytest.raises(DataError, match="a worker process was killed"):
        list(in_processes(die, range(8), 2))


def dawdle(path: Path | None) -> None:
    """Writes a file, unless the process is ended before."""
    if path is not None:
        time.sleep(200)
        path.touch()


def test_leaving_early_ends_the_workers_at_once(tmp_path: Path) -> None:
    before = set(psutil.Process().children())
    work = in_processes(dawdle, [None, *(tmp_path / str(number) for number in range(7))], 2)
    next(work)
    work.close()
    assert set(psutil.Process().children()) <= before
    assert not list(tmp_path.iterdir())
