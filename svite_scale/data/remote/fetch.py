"""URLs of shards, and fetching their bytes through ``webdataset.gopen``, with retries."""

from __future__ import annotations

import random
import re
import shutil
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from shlex import quote
from tempfile import NamedTemporaryFile
from typing import TypeVar
from urllib.parse import urlsplit, urlunsplit

from webdataset.gopen import gopen, rewrite_url, set_options

from svite_scale.errors import DataError

INDEX_SUFFIX = ".index.json"
COMMANDS = {
    # webdataset.gopen's own curl hides why it failed, tries 31 times, and waits for ever if a server stalls.
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
    """Tests whether a pattern of shards is of URLs: ``http(s)://``, ``s3://``, ``gs://``, or ``pipe:COMMAND``."""
    return pattern.startswith((PIPE, *(f"{scheme}://" for scheme in COMMANDS)))


def shell_command(url: str) -> str:
    """Returns the shell command that writes the bytes of ``url`` to its standard output."""
    if url.startswith(PIPE):
        return url.removeprefix(PIPE)
    return COMMANDS[urlsplit(url).scheme].format(quote(url))


def index_url(url: str) -> str:
    """Returns the URL of a shard's index: ``.index.json`` follows the path, or the shard's name in a ``pipe:`` command.

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
    """Returns the last part of a shard's URL, or the shard's name in a command, in characters that a file name may have."""
    words = SHARD_IN_COMMAND.findall(url) if url.startswith(PIPE) else [urlsplit(url).path]
    return re.sub(r"[^A-Za-z0-9._-]", "-", words[-1].rpartition("/")[2])[-80:]


Received = TypeVar("Received")

CHUNK = 2**13
"""Bytes that are read at a time; ``read`` waits for all of them. Larger chunks aren't faster."""
BUFFER = 2**20
LONGEST_WAIT_S = 30.0
FINAL = re.compile(r"returned error: 4(?!08|25|29)\d\d|error occurred \((?:403|404|AccessDenied|NoSuch\w+)\)|No URLs matched")
"""Messages of curl, aws and gsutil after which another attempt is no use."""


class FetchError(Exception):
    """An attempt has failed.

    Args:
        reason: in one line.
        is_final: True if another attempt would fail too.
    """

    def __init__(self, reason: str, *, is_final: bool = False) -> None:
        super().__init__(reason)
        self.is_final = is_final


def fetch(url: str, receive: Callable[[Iterator[bytes]], Received], attempts: int, backoff_s: float, remedy: str) -> Received:
    """Calls ``receive`` with the bytes of a URL, in each attempt from the first byte on, and returns its result.

    The waits between attempts double, up to half a minute, and are spread at random, so that ranks which failed together don't
    try again together.

    Args:
        url: for which :func:`is_remote` is true.
        receive: takes chunks; may raise :class:`FetchError` too.
        attempts: at least 1.
        backoff_s: the mean of the first wait, in seconds.
        remedy: what to do after a failure, for the error.

    Raises:
        DataError: the last attempt failed.
    """
    for attempt in range(1, attempts + 1):
        try:
            with closing(read_chunks(url)) as parts:
                return receive(parts)
        except FetchError as error:
            failure = error
        if failure.is_final:
            break
        if attempt < attempts:
            # The global generators belong to the samples.
            time.sleep(min(LONGEST_WAIT_S, backoff_s * 2 ** (attempt - 1)) * random.SystemRandom().uniform(0.5, 1.5))
    raise DataError(
        f"{url} can't be fetched: {failure} (attempt {attempt} of data.fetch_attempts = {attempts}); {remedy}"
    ) from failure


def read_chunks(url: str) -> Generator[bytes, None, None]:
    """Yields the bytes of one attempt, in order.

    Raises:
        FetchError: the command that reads the URL isn't installed or ends with an error, perhaps after some bytes.
    """
    url = rewrite_url(url)
    command = shell_command(url)
    program = command.split(maxsplit=1)[0] if command.strip() else ""
    if not url.startswith(PIPE) and shutil.which(program) is None:
        raise FetchError(f"{program} isn't in PATH, install it", is_final=True)
    with NamedTemporaryFile("r", errors="replace") as messages:
        stream = gopen(f"{PIPE}exec 2>{quote(messages.name)}; {command}", bufsize=BUFFER)
        # Its own errors name the command in place of the reason, and GOPEN_VERBOSE silences some of them.
        set_options(stream, ignore_errors=True)
        with stream:
            while chunk := stream.read(CHUNK):
                yield chunk
        if stream.status:
            said = [line.strip() for line in messages.read().splitlines() if line.strip()]
            reason = said[-1][:300] if said else "no message"
            raise FetchError(f"exit status {stream.status}, {reason}", is_final=bool(FINAL.search(reason)))
