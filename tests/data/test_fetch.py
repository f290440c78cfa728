"""Fetched files are complete, or it is an error: faults of a real server, of commands, and missing programs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from svite_scale.errors import DataError
from tests.data.flaky_server import FOREVER, Server, serving
from tests.data.remote import cache_of, content_of, files_of

NAME = "blob-00.tar"
INDEX = f'"{NAME}"'


@pytest.fixture(scope="module")
def server(served: Path) -> Iterator[Server]:
    """One server for all tests here, which ask for different paths."""
    with serving(served) as running:
        yield running


def blob(served: Path) -> bytes:
    return (served / NAME).read_bytes()


@pytest.mark.parametrize("fault", ["500-2", "503-2", "429-2", "drop-2", "cut-2", "short-2", "flip-2"])
def test_a_shard_is_fetched_after_temporary_faults(tmp_path: Path, served: Path, server: Server, fault: str) -> None:
    url = f"{server.root}/{fault}/{NAME}"
    assert content_of(cache_of(tmp_path), url, blob(served)) == blob(served)
    assert len(server.arrivals()[f"/{fault}/{NAME}"]) == 3
    assert files_of(tmp_path) == [NAME]


@pytest.mark.parametrize("fault", ["500-2", "drop-2", "cut-2", "short-2"])
def test_an_index_is_fetched_after_temporary_faults(tmp_path: Path, server: Server, fault: str) -> None:
    assert cache_of(tmp_path).index_text(f"{server.root}/{fault}/{NAME}?key=1") == INDEX
    assert len(server.arrivals()[f"/{fault}/{NAME}.index.json"]) == 3
    assert files_of(tmp_path) == [f"{NAME}.index.json"]


@pytest.mark.parametrize(
    ("fault", "attempts", "reason"),
    [
        (f"502-{FOREVER}", 3, "exit status 22, curl: (22) The requested URL returned error: 502"),
        (f"drop-{FOREVER}", 3, "exit status 52, curl: (52) Empty reply from server"),
        (f"cut-{FOREVER}", 3, "exit status 18, curl: (18) transfer closed with 25000 bytes remaining to read"),
        (f"short-{FOREVER}", 3, "it ended after 25000 of the 50000 bytes that its index states"),
        (f"flip-{FOREVER}", 3, "its SHA-256 isn't the one that its index states"),
        (f"long-{FOREVER}", 1, "it has more than the 50000 bytes that its index states"),
        (f"403-{FOREVER}", 1, "exit status 22, curl: (22) The requested URL returned error: 403"),
        (f"404-{FOREVER}", 1, "exit status 22, curl: (22) The requested URL returned error: 404"),
    ],
)
def test_a_permanent_fault_is_reported_after_the_last_attempt(
    tmp_path: Path, served: Path, server: Server, monkeypatch: pytest.MonkeyPatch, fault: str, attempts: int, reason: str
) -> None:
    monkeypatch.setenv("GOPEN_VERBOSE", "1")  # with which webdataset's own check of the exit status does nothing
    url = f"{server.root}/{fault}/{NAME}"
    with pytest.raises(DataError) as caught:
        content_of(cache_of(tmp_path), url, blob(served))
    assert str(caught.value) == (
        f"{url} can't be fetched: {reason} (attempt {attempts} of data.fetch_attempts = 3); "
        "check the network or raise data.fetch_attempts; if the shard was replaced, replace its index too"
    )
    assert len(server.arrivals()[f"/{fault}/{NAME}"]) == attempts
    assert files_of(tmp_path) == []


def test_waits_between_attempts_double_and_are_spread(tmp_path: Path, served: Path, server: Server) -> None:
    with pytest.raises(DataError, match=r"attempt 5 of data\.fetch_attempts = 5"):
        content_of(cache_of(tmp_path, attempts=5, backoff_s=0.1), f"{server.root}/500-9/{NAME}", blob(served))
    arrivals = server.arrivals()[f"/500-9/{NAME}"]
    waits = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    assert [wait >= 0.05 * 2**number for number, wait in enumerate(waits)] == [True] * 4
    assert len({round(wait / 2**number, 3) for number, wait in enumerate(waits)}) > 1


def test_an_error_names_curls_reason_when_no_server_listens(tmp_path: Path, served: Path) -> None:
    with serving(served) as gone:
        url = f"{gone.root}/ok/{NAME}"
    with pytest.raises(DataError, match=r"curl: \(7\) .*attempt 3 of"):
        content_of(cache_of(tmp_path), url, blob(served))


def test_a_missing_index_names_the_remedy(tmp_path: Path, server: Server) -> None:
    url = f"{server.root}/ok/none.tar"
    with pytest.raises(DataError, match=re.escape(f"{url}.index.json can't be fetched")) as caught:
        cache_of(tmp_path).index_text(url)
    assert "error: 404 (attempt 1 of" in str(caught.value)
    assert "a shard without an index gets one where it is stored (python launch/make_shards.py --index)" in str(caught.value)


def test_an_index_that_is_no_json_is_refused(tmp_path: Path, server: Server) -> None:
    with pytest.raises(DataError, match=r"it isn't JSON .*attempt 3 of"):
        cache_of(tmp_path).index_text(f"pipe:echo {server.root}/a.tar")
    assert files_of(tmp_path) == []


def test_a_command_gives_shard_and_index(tmp_path: Path, served: Path) -> None:
    cache = cache_of(tmp_path)
    url = f"pipe:cat '{served}/{NAME}' | cat"
    assert content_of(cache, url, blob(served)) == blob(served)
    assert cache.index_text(url) == INDEX
    assert files_of(tmp_path) == [NAME, f"{NAME}.index.json"]


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("cat {}; exit 3", "exit status 3, no message"),
        ("head -c 100 {}; echo some words >&2; echo 'the last words' >&2; false", "exit status 1, the last words"),
        ("kill -9 $$; cat {}", "exit status -9, no message"),
        ("nosuchprogram {}", "exit status 127, .*nosuchprogram.*not found"),
        ("cat {0} {0}", "it has more than the 50000 bytes"),
        ("true {}", "it ended after 0 of the 50000 bytes"),
    ],
)
def test_a_failed_command_is_reported_by_its_last_words(
    tmp_path: Path, served: Path, capfd: pytest.CaptureFixture[str], command: str, reason: str
) -> None:
    with pytest.raises(DataError, match=f"can't be fetched: {reason}"):
        content_of(cache_of(tmp_path, attempts=2), f"pipe:{command.format(served / NAME)}", blob(served))
    assert capfd.readouterr() == ("", "")


STAND_INS = {
    "aws": '[ "$1 $2 $4" = "s3 cp -" ] && cat "$SERVED/${3#s3://bucket/}"',
    "gsutil": '[ "$1" = cat ] && cat "$SERVED/${2#gs://bucket/}"',
}


@pytest.mark.parametrize(("scheme", "program"), [("s3", "aws"), ("gs", "gsutil")])
def test_object_stores_are_read_by_their_own_programs(
    tmp_path: Path, served: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, program: str
) -> None:
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    monkeypatch.setenv("SERVED", str(served))
    monkeypatch.setenv("PATH", f"{bin_folder}:/usr/bin:/bin")
    (bin_folder / program).write_text(f"#!/bin/sh\n{STAND_INS[program]}\n")
    (bin_folder / program).chmod(0o755)
    cache, url = cache_of(tmp_path / "cache"), f"{scheme}://bucket/{NAME}"
    assert content_of(cache, url, blob(served)) == blob(served)
    assert cache.index_text(url) == INDEX


@pytest.mark.parametrize(
    ("url", "program"), [("http://host/a.tar", "curl"), ("s3://b/a.tar", "aws"), ("gs://b/a.tar", "gsutil")]
)
def test_a_missing_program_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, program: str) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=rf"{program} isn't in PATH, install it \(attempt 1 of"):
        cache_of(tmp_path / "cache").index_text(url)


def test_urls_are_rewritten_as_webdataset_does(
    tmp_path: Path, served: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOPEN_REWRITE", f"s3://bucket/={server.root}/ok/")
    assert content_of(cache_of(tmp_path), f"s3://bucket/{NAME}", blob(served)) == blob(served)
