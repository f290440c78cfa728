"""A real HTTP server in a process of its own that serves a folder, with faults that a URL requests.

``/FAULT-N/NAME`` does something wrong the first N times that it is asked for, and serves the file after that.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import PIPE, Popen
from typing import ClassVar
from urllib.request import urlopen

FOREVER = 99


class Server:
    """A running server.

    Attributes:
        root: ``http://127.0.0.1:PORT``
    """

    def __init__(self, root: str) -> None:
        self.root = root

    def arrivals(self) -> dict[str, list[float]]:
        """The times of requests in seconds, by path."""
        with urlopen(f"{self.root}/arrivals") as answer:
            return json.load(answer)

    def requests(self) -> dict[str, int]:
        """The number of requests, by file name."""
        counts: dict[str, int] = defaultdict(int)
        for path, times in self.arrivals().items():
            counts[path.rpartition("/")[2]] += len(times)
        return dict(counts)


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """Starts a server of a folder's files, and ends it."""
    with Popen([sys.executable, __file__, str(folder)], stdout=PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield Server(f"http://127.0.0.1:{int(process.stdout.readline())}")
        finally:
            process.kill()


class Handler(BaseHTTPRequestHandler):
    """Answers GET."""

    folder: Path
    arrived: ClassVar[defaultdict[str, list[float]]] = defaultdict(list)
    lock = threading.Lock()

    def do_GET(self) -> None:
        if self.path == "/arrivals":
            self.answer(json.dumps(self.arrived).encode())
            return
        path = self.path.partition("?")[0]
        with self.lock:
            self.arrived[path].append(time.monotonic())
            number = len(self.arrived[path])
        _, folder, name = path.split("/")
        fault, _, times = folder.partition("-")
        if not (self.folder / name).exists():
            self.send_error(404)
        elif number > int(times or 0):
            self.answer((self.folder / name).read_bytes())
        else:
            self.fail(fault, (self.folder / name).read_bytes())

    def fail(self, fault: str, content: bytes) -> None:
        if fault.isdecimal():
            self.send_error(int(fault))
        elif fault == "drop":
            self.connection.close()
        elif fault == "cut":  # fewer bytes than the header says
            self.answer(content[: len(content) // 2], length=len(content))
        elif fault == "short":  # an answer that seems whole
            self.answer(content[: len(content) // 2])
        elif fault == "long":
            self.answer(content + b"x")
        elif fault == "flip":
            self.answer(content[:-1] + bytes([content[-1] ^ 1]))
        elif fault == "hang":
            self.answer(content[: len(content) // 2], length=len(content))
            time.sleep(3600)

    def answer(self, content: bytes, length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        pass


if __name__ == "__main__":
    Handler.folder = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
