"""The C library's building and caching, in processes with a cache and a compiler of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOAD = """
import ctypes, importlib.util
spec = importlib.util.spec_from_file_location("cpu_library", "svite_scale/sparsity/kernels/cpu_library.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
number, mask = ctypes.c_int64, ctypes.c_char_p(bytes([0b10110]))
print(module.load_library("packed").expand_4_portable(None, number(0), mask, None, number(5)))
"""
"""Loads the library, without the torch that the package would import, and prints the 3 active positions that it refuses."""
USE = """
import torch
from svite_scale.sparsity import bits
from svite_scale.sparsity.kernels import compress, expand, kernels_for
active = torch.arange(1003) % 3 == 0
dense, mask = torch.arange(1.0, 1004.0), bits.pack(active)
for _ in range(2):
    assert torch.equal(compress(dense, mask, int(active.sum())), dense[active])
    assert torch.equal(expand(dense[active], mask, dense.shape), dense * active)
print(kernels_for(dense, mask).__name__)
"""
"""Uses both kernels twice, checks what they give, and prints which module they were of."""


def start(script: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script]
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(script: str, environment: dict[str, str]) -> tuple[str, str]:
    """What a process prints, and what it logs."""
    process = start(script, environment)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.strip(), err


@pytest.fixture
def compiler(tmp_path: Path) -> tuple[str, Path]:
    """A compiler that writes a line for each file that it compiles, and where."""
    log, script = tmp_path / "compiled", tmp_path / "compiler"
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *packed.c*) echo "$*" >>{log};; esac\nexec {os.environ.get("CC") or "cc"} "$@"\n'
    )
    script.chmod(0o755)
    log.touch()
    return str(script), log


def test_it_is_compiled_once_and_again_when_damaged(tmp_path: Path, compiler: tuple[str, Path]) -> None:
    cc, log = compiler
    environment = {"CC": cc, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    for _ in range(2):
        assert run(LOAD, environment) == ("3", "")
        assert len(log.read_text().splitlines()) == 1
    (library,) = (tmp_path / "cache" / "svite_scale").iterdir()
    assert library.parent.stat().st_mode & 0o777 == 0o700
    library.write_bytes(b"")
    assert run(LOAD, environment) == ("3", "")
    assert len(log.read_text().splitlines()) == 2
    assert [*library.parent.iterdir()] == [library], "no unfinished file is left"


def test_another_compiler_has_a_library_of_its_own(tmp_path: Path, compiler: tuple[str, Path]) -> None:
    cc, log = compiler
    for value in (cc, f"{cc} -g0"):
        assert run(LOAD, {"CC": value, "XDG_CACHE_HOME": str(tmp_path)}) == ("3", "")
    assert ["-g0" in line for line in log.read_text().splitlines()] == [False, True]
    assert len([*(tmp_path / "svite_scale").iterdir()]) == 2


def test_many_processes_may_build_at_once(tmp_path: Path) -> None:
    processes = [start(LOAD, {"XDG_CACHE_HOME": str(tmp_path)}) for _ in range(6)]
    ends = [process.communicate(timeout=300) for process in processes]
    assert ends == [("3\n", "")] * 6
    assert len([*(tmp_path / "svite_scale").iterdir()]) == 1


@pytest.mark.parametrize("kind", ["can't be made", "others may write"])
def test_an_unsafe_cache_folder_is_not_used(kind: str, tmp_path: Path, compiler: tuple[str, Path]) -> None:
    cc, log = compiler
    cache, temporary = tmp_path / "cache", tmp_path / "tmp"
    temporary.mkdir()
    if kind == "can't be made":
        cache.write_text("a file")
    else:
        (cache / "svite_scale").mkdir(parents=True)
        (cache / "svite_scale").chmod(0o777)
    environment = {"CC": cc, "XDG_CACHE_HOME": str(cache), "TMPDIR": str(temporary)}
    assert run(LOAD, environment) == ("3", "")
    assert str(temporary / "svite_scale-") in log.read_text()
    assert [*cache.rglob("*.so"), *temporary.iterdir()] == [], "nothing is left behind"


@pytest.mark.parametrize("kind", ["others may write", "a link"])
def test_a_library_that_others_could_write_is_compiled_again(kind: str, tmp_path: Path, compiler: tuple[str, Path]) -> None:
    """Left, say, from a time when they could write to the folder. One that was compiled under a lax umask is none."""
    cc, log = compiler
    environment = {"CC": cc, "XDG_CACHE_HOME": str(tmp_path)}
    assert run("import os; os.umask(0)\n" + LOAD, environment) == ("3", "")
    assert run(LOAD, environment) == ("3", "")
    assert len(log.read_text().splitlines()) == 1
    (library,) = (tmp_path / "svite_scale").iterdir()
    if kind == "a link":
        library.rename(tmp_path / "elsewhere")
        library.symlink_to(tmp_path / "elsewhere")
    else:
        library.chmod(0o666)
    assert run(LOAD, environment) == ("3", "")
    assert len(log.read_text().splitlines()) == 2
    assert library.is_file()
    assert not library.is_symlink()
    assert library.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("cc", "reason"),
    [
        ("/nowhere/cc", "/nowhere/cc --version: [Errno 2] No such file or directory"),
        ("false", "false --version failed"),
        ("sh -c 'case $0 in --version) exit 0;; esac; echo bad weather >&2; exit 3'", "failed: bad weather"),
    ],
)
def test_without_a_compiler_torch_operations_serve_and_one_warning_says_so(cc: str, reason: str, tmp_path: Path) -> None:
    name, logged = run(USE, {"CC": cc, "XDG_CACHE_HOME": str(tmp_path)})
    assert name == "svite_scale.sparsity.kernels.torch_kernels"
    (line,) = logged.splitlines()
    assert "slower torch operations take their place" in line
    assert "Install a C compiler (gcc or clang) or name one in CC." in line
    assert reason in line
    assert not [*tmp_path.rglob("*.so")]


BLOCKS = """
import torch
from svite_scale.sparsity.kernels import block_products
x, values, mask = torch.ones(3, 1), torch.ones(1, 1, 16), torch.ones(1, dtype=torch.uint8)
for _ in range(2):
    assert torch.equal(block_products.product(x, values, mask, None, torch.Size((16, 1))), torch.ones(3, 16))
print(type(block_products._path(values.shape, x.device, x.dtype)).__name__)
"""
"""Multiplies with a block twice, checks the product, and prints which path it was of."""


def test_blocks_are_multiplied_by_one_thread_when_the_compiler_has_no_openmp(tmp_path: Path) -> None:
    compiler = """sh -c 'for flag; do case $flag in -fopenmp) echo no OpenMP >&2; exit 1;; esac; done; exec cc "$@"' cc"""
    name, logged = run(BLOCKS, {"CC": compiler, "XDG_CACHE_HOME": str(tmp_path)})
    assert name == "CpuBlockProducts"
    (line,) = logged.splitlines()
    assert "can't be compiled with OpenMP, so they use one thread" in line
    assert len([*(tmp_path / "svite_scale").glob("blocks-*.so")]) == 1


def test_blocks_are_multiplied_by_torch_when_there_is_no_compiler(tmp_path: Path) -> None:
    name, logged = run(BLOCKS, {"CC": "/nowhere/cc", "XDG_CACHE_HOME": str(tmp_path)})
    assert name == "DenseProducts"
    (line,) = logged.splitlines()
    assert "The CPU kernels of weights in blocks can't be compiled, so slower torch operations take their place." in line


def test_an_import_builds_nothing(tmp_path: Path, compiler: tuple[str, Path]) -> None:
    cc, log = compiler
    script = "import svite_scale, svite_scale.sparsity.kernels, sys; print('triton' in sys.modules)"
    assert run(script, {"CC": cc, "XDG_CACHE_HOME": str(tmp_path / "cache")}) == ("False", "")
    assert log.read_text() == ""
    assert not (tmp_path / "cache").exists()
