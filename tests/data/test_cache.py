"""A cache that processes share: it fetches each file once, stays within its bound, and isn't blocked by a kill."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from hashlib import sha256
from pathlib import Path

import pytest

from svite_scale.data.dataset import ShardReader
from svite_scale.data.options import DataConfig
from svite_scale.data.remote.cache import ROOM, CacheFolder, RemoteShard, ShardCache
from svite_scale.errors import DataError
from tests.data.flaky_server import Server
from tests.data.remote import NUM_BLOBS, SIZE, cache_of, content_of, files_of, in_processes
from tests.waiting import wait_until

DIGEST = "0" * 64


def names_of(served: Path) -> list[str]:
    return sorted(path.name for path in served.glob("*.tar"))


def piped(cache: ShardCache, served: Path, name: str) -> RemoteShard:
    return cache.shard(f"pipe:cat {served}/{name}", SIZE, sha256((served / name).read_bytes()).hexdigest())


def read_all(cache: ShardCache, root: str, served: Path, seed: int, rounds: int = 1) -> None:
    """Reads every shard and every index ``rounds`` times in a random order."""
    for name in random.Random(seed).sample(names_of(served) * rounds, NUM_BLOBS * rounds):
        assert cache.index_text(f"{root}/ok/{name}") == f'"{name}"'
        assert content_of(cache, f"{root}/ok/{name}", (served / name).read_bytes()) == (served / name).read_bytes()


def test_processes_fetch_each_file_once_between_them(tmp_path: Path, served: Path, server: Server) -> None:
    in_processes(read_all, [(cache_of(tmp_path), server.root, served, seed) for seed in (1, 1, 2, 3)])
    assert server.requests() == dict.fromkeys([f"{name}{end}" for name in names_of(served) for end in ("", ".index.json")], 1)
    read_all(cache_of(tmp_path), server.root, served, 4)
    assert sum(server.requests().values()) == 2 * NUM_BLOBS


def test_the_cache_is_never_above_its_bound(
    tmp_path: Path, served: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svite_scale.data.remote.cache.RECENTLY_USED_S", 0.02)
    bound = 4
    seen, done = [0], threading.Event()

    def watch() -> None:
        folder = CacheFolder(tmp_path, 0)
        while not done.is_set():
            with folder.locked(ROOM):  # or a file could come while others that have gone are still counted
                seen.append(sum(path.stat().st_size for path in tmp_path.iterdir() if path.is_file()))
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        in_processes(read_all, [(cache_of(tmp_path, bound), server.root, served, seed, 2) for seed in range(3)])
    finally:
        done.set()
        watcher.join()
    assert bound * SIZE // 2 < max(seen) <= bound * SIZE
    assert sum(server.requests().values()) > 2 * NUM_BLOBS


def age(folder: Path, name: str, seconds: float) -> None:
    """Makes a cached file look as if it had last been used so many seconds ago."""
    (path,) = folder.glob(f"*-{name}")
    os.utime(path, (time.time() - seconds,) * 2)


def test_the_least_recently_used_shard_is_evicted_first(tmp_path: Path, served: Path) -> None:
    names = names_of(served)
    cache = cache_of(tmp_path, 6)

    def use(name: str) -> None:
        os.close(piped(cache, served, name).open())

    for name in names[:6]:
        use(name)
    for seconds, name in zip((10, 60, 40, 20, 50, 30), names, strict=False):
        age(tmp_path, name, seconds)
    use(names[4])
    going = [names[number] for number in (1, 2, 5, 3, 0)]
    for count, name in enumerate(names[6:11], start=1):
        use(name)
        assert files_of(tmp_path) == sorted({*names[: 6 + count]} - {*going[:count]})


def test_a_time_of_use_in_the_future_does_not_prevent_eviction(tmp_path: Path, served: Path) -> None:
    """The clock was set back after the use."""
    first, second = names_of(served)[:2]
    cache = cache_of(tmp_path, 1)
    os.close(piped(cache, served, first).open())
    age(tmp_path, first, -3600)
    in_processes(content_of, [(cache, f"pipe:cat {served}/{second}", (served / second).read_bytes())], deadline_s=60)
    assert files_of(tmp_path) == [second]


def test_a_shard_is_not_evicted_right_after_its_use(tmp_path: Path, served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svite_scale.data.remote.cache.RECENTLY_USED_S", 0.4)
    cache = cache_of(tmp_path, 1)
    first, second = names_of(served)[:2]
    started = time.time()
    content_of(cache, f"pipe:cat {served}/{first}", (served / first).read_bytes())
    content_of(cache, f"pipe:cat {served}/{second}", (served / second).read_bytes())
    assert time.time() - started >= 0.4
    assert files_of(tmp_path) == [second]


def test_an_evicted_shard_stays_readable_while_it_is_open(
    tmp_path: Path, served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svite_scale.data.remote.cache.RECENTLY_USED_S", 0.0)
    first, second, third = names_of(served)[:3]
    cache, content = cache_of(tmp_path, 1), (served / first).read_bytes()
    reader = ShardReader([piped(cache, served, name) for name in (first, second)])
    assert reader.read(0, 0, 100) == content[:100]
    content_of(cache, f"pipe:cat {served}/{third}", (served / third).read_bytes())
    assert files_of(tmp_path) == [third]
    (served / first).rename(served / "moved")
    try:
        assert reader.read(0, SIZE - 100, 100) == content[-100:]
        reader.read(1, 0, 1)
        # Opening another closes what has gone, so that its bytes are freed.
        with pytest.raises(DataError, match="can't be fetched"):
            reader.read(0, 0, 100)
    finally:
        (served / "moved").rename(served / first)


def killed_midway(cache: ShardCache, folder: Path, url: str, content: bytes) -> None:
    """Kills a process that fetches ``url`` after the first half has come."""
    process = multiprocessing.get_context("fork").Process(target=content_of, args=(cache, url, content))
    process.start()
    wait_until(lambda: any(path.read_bytes()[:20_000] == content[:20_000] for path in folder.glob("*.part")))
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert [path.stat().st_size for path in folder.iterdir() if path.is_file()] == [SIZE]


def take(folder: CacheFolder, name: str) -> None:
    with folder.locked(name):
        pass


def test_a_process_forked_while_a_lock_is_held_does_not_keep_it(tmp_path: Path) -> None:
    folder = CacheFolder(tmp_path, 0)
    forked = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    try:
        with folder.locked("name"):
            forked.start()
        in_processes(take, [(folder, "name")], deadline_s=30)
    finally:
        forked.kill()


def test_others_fetch_the_same_shard_after_a_killed_fetch(tmp_path: Path, served: Path, server: Server) -> None:
    name = names_of(served)[0]
    cache, url, content = cache_of(tmp_path), f"{server.root}/hang-1/{name}", (served / name).read_bytes()
    killed_midway(cache, tmp_path, url, content)
    in_processes(content_of, [(cache, url, content)] * 3)
    assert files_of(tmp_path) == [name]
    assert server.requests() == {name: 2}


def test_the_file_of_a_killed_fetch_is_removed_when_room_is_needed(tmp_path: Path, served: Path, server: Server) -> None:
    name, other = names_of(served)[:2]
    cache = cache_of(tmp_path, 1)
    killed_midway(cache, tmp_path, f"{server.root}/hang-1/{name}", (served / name).read_bytes())
    in_processes(content_of, [(cache, f"pipe:cat {served}/{other}", (served / other).read_bytes())])
    assert files_of(tmp_path) == [other]


def test_a_fetch_takes_no_room_while_it_waits(tmp_path: Path, served: Path, server: Server) -> None:
    """A file that is being fetched stays, however old it is, until its process ends."""
    name, other = names_of(served)[:2]
    cache = cache_of(tmp_path, 1)
    context = multiprocessing.get_context("fork")
    hung = context.Process(target=content_of, args=(cache, f"{server.root}/hang-1/{name}", (served / name).read_bytes()))
    hung.start()
    wait_until(lambda: len(list(tmp_path.glob("*.part"))) == 1)
    arguments = (cache, f"pipe:cat {served}/{other}", (served / other).read_bytes())
    waiting = context.Process(target=content_of, args=arguments)
    waiting.start()
    waiting.join(1.5)
    assert waiting.is_alive()
    assert files_of(tmp_path) == [f"{name}.part"]
    hung.kill()
    waiting.join(60)
    assert waiting.exitcode == 0
    assert files_of(tmp_path) == [other]


@pytest.mark.parametrize(("seconds", "requests"), [(0, 1), (500, 1), (700, 2), (-700, 2)])
def test_an_index_is_fetched_again_when_its_copy_is_old(
    tmp_path: Path, served: Path, server: Server, seconds: float, requests: int
) -> None:
    name = names_of(served)[0]
    cache, url = cache_of(tmp_path), f"{server.root}/ok/{name}"
    cache.index_text(url)
    age(tmp_path, f"{name}.index.json", seconds)
    assert cache.index_text(url) == f'"{name}"'
    assert server.requests() == {f"{name}.index.json": requests}


def test_an_index_is_fetched_again_when_its_shard_does_not_match(tmp_path: Path, served: Path, server: Server) -> None:
    name = names_of(served)[0]
    cache, url = cache_of(tmp_path, attempts=1), f"{server.root}/ok/{name}"
    cache.index_text(url)
    with pytest.raises(DataError, match="if the shard was replaced, replace its index too"):
        cache.shard(url, SIZE + 1, DIGEST).open()
    assert files_of(tmp_path) == []


def test_another_version_of_a_shard_is_another_file(tmp_path: Path, served: Path) -> None:
    cache = cache_of(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"old")
    assert content_of(cache, f"pipe:cat {tmp_path}/a.tar", b"old") == b"old"
    (tmp_path / "a.tar").write_bytes(b"new")
    assert content_of(cache, f"pipe:cat {tmp_path}/a.tar", b"new") == b"new"


def test_a_shard_above_the_bound_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        ShardCache(tmp_path, 999_999, 3).shard("s3://bucket/a.tar", 1_000_000, DIGEST)
    assert str(caught.value) == (
        "data.cache_gb = 0.000999999 is smaller than one shard (s3://bucket/a.tar has 0.001 GB); raise it"
    )
    with pytest.raises(DataError, match=r"data\.cache_gb = 1e-08 is smaller than one index \(pipe:.*\); raise it"):
        ShardCache(tmp_path, 10, 3).index_text("pipe:echo '\"a.tar\"'")


def test_an_unusable_folder_is_refused(tmp_path: Path, served: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data\.cache_dir = '.*/file/x': .*; name a writable folder with enough room"):
        cache_of(tmp_path / "file" / "x").shard(f"pipe:cat {served}/a.tar", SIZE, DIGEST).open()


def test_the_default_folder_must_be_the_users(tmp_path: Path, served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    name = names_of(served)[0]
    config = DataConfig()
    content = (served / name).read_bytes()
    assert content_of(ShardCache.from_options(config), f"pipe:cat {served}/{name}", content) == content
    folder = tmp_path / f"svite_scale-{os.getuid()}"
    assert files_of(folder) == [name]
    assert folder.stat().st_mode & 0o777 == 0o700
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    folder.rename(tmp_path / f"svite_scale-{owner + 1}")
    with pytest.raises(DataError, match=r"data\.cache_dir = null: .* is another user's; name a folder of yours"):
        ShardCache.from_options(config).index_text(f"pipe:cat {served}/{name}")


def test_options_give_folder_bound_and_attempts(tmp_path: Path, served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    cache = ShardCache.from_options(DataConfig(cache_dir="~/kept", cache_gb=0.00005, fetch_attempts=1))
    name = names_of(served)[0]
    content_of(cache, f"pipe:cat {served}/{name}", (served / name).read_bytes())
    assert files_of(tmp_path / "kept") == [name]
    with pytest.raises(DataError, match="smaller than one shard"):
        cache.shard("s3://b/a.tar", 50_001, DIGEST)
    with pytest.raises(DataError, match=r"attempt 1 of data\.fetch_attempts = 1"):
        cache.shard(f"pipe:false {served}/{name}", SIZE, DIGEST).open()
