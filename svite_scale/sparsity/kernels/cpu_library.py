"""The C libraries of the CPU kernels: compiled once by the system's C compiler, cached for the user, loaded with ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC")
"""Nothing in them asks for this machine's own instructions, so that a library in a shared home serves every node."""


class BuildError(Exception):
    """Raised where the library can't be built. The message says why."""


def load_library(source: str, *flags: str) -> ctypes.CDLL:
    """Loads a compiled library: from the cache if it is there and valid, else after building it.

    Args:
        source: name of a C file of this folder, without its ending.
        flags: for the compiler, besides ``FLAGS``. Libraries with other flags are other libraries.

    Raises:
        BuildError: there is no compiler, or it fails.
        OSError: the library can't be written or loaded.
    """
    file = Path(__file__).with_name(f"{source}.c")
    compiler = shlex.split(os.environ.get("CC") or "cc")
    command = [*compiler, *FLAGS, *flags, str(file)]
    name = f"{source}-{_digest(file, compiler, flags)}.so"
    folder = _cache_folder()
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="svite_scale-") as private:
            return ctypes.CDLL(str(_build(command, Path(private) / name)))  # stays loaded without its file
    path = folder / name
    try:
        # A library runs as it is loaded, and one may be left from a time when others could write to the folder.
        status = path.lstat()
        if stat.S_ISREG(status.st_mode) and _is_private(status):
            return ctypes.CDLL(str(path))
    except OSError:  # not there, or damaged
        pass
    return ctypes.CDLL(str(_build(command, path)))


def c_function(library: ctypes.CDLL, name: str, result: type[Any], *arguments: type[Any]) -> Any:
    """Returns a C function from ``arguments`` to ``result``."""
    function = library[name]
    function.argtypes, function.restype = arguments, result
    return function


def _cache_folder() -> Path | None:
    """Returns the package's folder in the user's cache; None unless it is writable, and by this user alone."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "svite_scale"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return None
    return folder if _is_private(status) and os.access(folder, os.W_OK | os.X_OK) else None


def _is_private(status: os.stat_result) -> bool:
    """Returns whether nobody but this user may write it."""
    return status.st_uid == os.getuid() and not status.st_mode & 0o022


def _digest(file: Path, compiler: list[str], flags: Sequence[str]) -> str:
    """Returns a digest of all that the library depends on: source, flags, compiler and architecture."""
    parts = [file.read_text(), *FLAGS, *flags, *compiler, _run([*compiler, "--version"]), platform.machine()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _build(command: list[str], path: Path) -> Path:
    """Compiles by a command under a name of this process, then renames: many may build at once, and none sees half a file."""
    handle, unfinished = tempfile.mkstemp(dir=path.parent, suffix=".so")
    os.close(handle)
    try:
        _run([*command, "-o", unfinished])
        os.chmod(unfinished, 0o700)  # linkers leave it as the umask says, which may let the group write
        with open(unfinished, "rb") as library:
            os.fsync(library.fileno())  # half a library would end the process that loads it
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise
    return path


def _run(command: list[str]) -> str:
    """Runs the compiler, and returns what it prints."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{shlex.join(command)}: {error}") from error
    if done.returncode:
        raise BuildError(f"{shlex.join(command)} failed: {done.stderr.strip()[-500:]}")
    return done.stdout
