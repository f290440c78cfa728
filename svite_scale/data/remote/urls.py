"""The words of a shard's URL: what it is called, where its index is, and the command that reads it."""

from __future__ import annotations

import re
from shlex import quote
from urllib.parse import urlsplit, urlunsplit

from svite_scale.errors import DataError

INDEX_SUFFIX = ".index.json"
COMMANDS = {
    # Not the curl of webdataset.gopen, which hides why it failed, tries 31 times, and waits for a stalled server for ever.
    "http": "curl --fail --silent --show-error --location --connect-timeout 30 --speed-limit 1 --speed-time 60 {}",
    "https": "curl --fail --silent --show-error --location --connect-timeout 30 --speed-limit 1 --speed-time 60 {}",
    "s3": "aws s3 cp {} -",
    "gs": "gsutil cat {}",
}
"""By scheme, the command that writes a URL's bytes to its output."""

PIPE = "pipe:"
SHARD_IN_COMMAND = re.compile(r"""([^\s'"=;|&()<>]*\.tar)(?=$|[\s'"?&#;|()<>])""")
"""A word of a shell command that ends in ``.tar``, up to a URL's query."""


def is_remote(pattern: str) -> bool:
    """Whether a pattern of shards is of URLs that are fetched: ``http(s)://``, ``s3://``, ``gs://``, or ``pipe:COMMAND``."""
    return pattern.startswith((PIPE, *(f"{scheme}://" for scheme in COMMANDS)))


def shell_command(url: str) -> str:
    """The shell command that writes the bytes of ``url`` to its standard output."""
    if url.startswith(PIPE):
        return url.removeprefix(PIPE)
    return COMMANDS[urlsplit(url).scheme].format(quote(url))


def index_url(url: str) -> str:
    """Where the index of a shard is: ``.index.json`` after the URL's path, or after the shard's name in a ``pipe:`` command.

    Raises:
        DataError: the command has no word that ends in ``.tar``.
    """
    if not url.startswith(PIPE):
        parts = urlsplit(url)
        return urlunsplit(parts._replace(path=parts.path + INDEX_SUFFIX))
    command, count = SHARD_IN_COMMAND.subn(rf"\1{INDEX_SUFFIX}", url)
    if not count:
        raise DataError(
            f"{url} has no word that ends in .tar, whose index would be read; name the shard, which isn't compressed"
        )
    return command


def readable_name(url: str) -> str:
    """The last part of a shard's URL, or the shard's name in a command, in characters that a file name may have; for people."""
    words = SHARD_IN_COMMAND.findall(url) if url.startswith(PIPE) else [urlsplit(url).path]
    return re.sub(r"[^A-Za-z0-9._-]", "-", words[-1].rpartition("/")[2])[-80:]
