"""URLs of shards: the command that reads one, its index, and its name."""

from __future__ import annotations

import pytest

from svite_scale.data.format.patterns import find_shards, find_urls
from svite_scale.data.remote.fetch import index_url, is_remote, readable_name, shell_command
from svite_scale.errors import DataError


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("http://host/a.tar", True),
        ("https://host/a-{0..9}.tar", True),
        ("s3://bucket/a.tar", True),
        ("gs://bucket/a.tar", True),
        ("pipe:cat a.tar", True),
        ("shards/a.tar", False),
        ("/http/a.tar", False),
        ("s3/a.tar", False),
        ("httpx://a.tar", False),
        ("", False),
    ],
)
def test_patterns_of_urls_are_remote(pattern: str, expected: bool) -> None:
    assert is_remote(pattern) == expected


@pytest.mark.parametrize(
    ("url", "index", "name"),
    [
        ("http://host/d/a-00.tar", "http://host/d/a-00.tar.index.json", "a-00.tar"),
        ("https://host/a.tar?key=x.tar", "https://host/a.tar.index.json?key=x.tar", "a.tar"),
        ("s3://bucket/d/a.tar", "s3://bucket/d/a.tar.index.json", "a.tar"),
        ("gs://bucket/a b.tar", "gs://bucket/a b.tar.index.json", "a-b.tar"),
        ("pipe:cat /d/a.tar", "pipe:cat /d/a.tar.index.json", "a.tar"),
        ("pipe:ssh host 'cat /d/a.tar' | pv", "pipe:ssh host 'cat /d/a.tar.index.json' | pv", "a.tar"),
        ("pipe:curl 'http://h/a.tar?k=1'", "pipe:curl 'http://h/a.tar.index.json?k=1'", "a.tar"),
        ("pipe:dd if=a.tar; sync", "pipe:dd if=a.tar.index.json; sync", "a.tar"),
        ("pipe:cat d.tar.d/a.tar", "pipe:cat d.tar.d/a.tar.index.json", "a.tar"),
    ],
)
def test_an_index_is_beside_its_shard(url: str, index: str, name: str) -> None:
    assert index_url(url) == index
    assert readable_name(url) == name


@pytest.mark.parametrize("url", ["pipe:zcat a.tar.gz", "pipe:cat a", "pipe:"])
def test_a_command_must_name_its_shard(url: str) -> None:
    with pytest.raises(DataError, match=r"no word that ends in \.tar"):
        index_url(url)


def test_urls_are_quoted_in_commands_and_commands_are_not() -> None:
    assert shell_command("s3://bucket/a b;ls.tar") == "aws s3 cp 's3://bucket/a b;ls.tar' -"
    assert shell_command("gs://bucket/a.tar") == "gsutil cat gs://bucket/a.tar"
    assert shell_command("https://host/a.tar?x=1&y=2").endswith(" 'https://host/a.tar?x=1&y=2'")
    assert shell_command("pipe:cat 'a b.tar' | pv") == "cat 'a b.tar' | pv"


def test_braces_of_urls_are_expanded() -> None:
    assert find_urls("http://h/{b,a}-{00..01}.tar", "data.val") == [
        f"http://h/{n}.tar" for n in ("a-00", "a-01", "b-00", "b-01")
    ]
    assert find_urls("pipe:cat {2..1}.tar{,}", "data.val") == ["pipe:cat 1.tar", "pipe:cat 2.tar"]


@pytest.mark.parametrize(
    ("find", "pattern", "message"),
    [
        (find_urls, "http://h/{00..1.tar", "data.val = 'http://h/{00..1.tar' has unbalanced braces"),
        (find_urls, "s3://b/a-*.tar", r"data.val = 's3://b/a-\*.tar': URLs can't be listed by a glob; write braces"),
        (
            find_shards,
            "ftp://h/a.tar",
            "data.val = 'ftp://h/a.tar': such URLs aren't known; use http://, https://, s3://, gs://, pipe:",
        ),
        (find_shards, "s3://b/a.tar", "data.val = 's3://b/a.tar' is remote; do this where the shards are stored"),
    ],
)
def test_bad_patterns_of_urls_are_refused(find: object, pattern: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        find(pattern, "data.val")  # type: ignore[operator]
