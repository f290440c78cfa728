"""Weights, masks and caches that others have written: nothing of them is run or believed, and one line names the file."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from svite_scale.config.plain_yaml import PlainYamlError, load
from svite_scale.data.remote.cache import ShardCache
from svite_scale.errors import DataError, OptionError, SparsifyError
from svite_scale.models.weights import open_weights
from svite_scale.sparsity.allocation.mask_file import MaskFile


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("legacy", [False, True])
def test_weights_run_nothing(tmp_path: Path, name: str, legacy: bool) -> None:
    path, code = tmp_path / name, Code(tmp_path / "ran")
    torch.save({"weight": torch.ones(2), "code": code}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(OptionError) as caught:
        open_weights(str(path))
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not code.proof.exists()


@pytest.mark.parametrize("content", [b"", b"\xff" * 8 + b"{}", (10**9).to_bytes(8, "little") + b"{", None])
def test_masks_run_nothing(tmp_path: Path, content: bytes | None) -> None:
    path, code = tmp_path / "masks.safetensors", Code(tmp_path / "ran")
    path.write_bytes(pickle.dumps(code) if content is None else content)
    with pytest.raises(SparsifyError) as caught:
        MaskFile(path)
    assert str(caught.value).startswith(f"masks = '{path}': can't be read as safetensors (")
    assert len(str(caught.value).splitlines()) == 1
    assert not code.proof.exists()


LAUGHS = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: !!python/object/apply:os.mkdir [/nowhere/ran]", "line 1, could not determine a constructor for the tag"),
        (LAUGHS, "it has more than 100,000 values, aliases counted each time"),
        ("a: " + "[" * 10_000, "it is nested too deeply"),
        ("a: &a [*a]", "line 1, found unconstructable recursive node"),
        ("a: " + "9" * 5000, "Exceeds the limit (4300 digits)"),
    ],
)
def test_yaml_is_data(text: str, problem: str) -> None:
    with pytest.raises(PlainYamlError) as caught:
        load(text)
    assert str(caught.value).startswith(problem)


OURS, THEIRS = b"as it was fetched", b"as it was forged!"


def forge_writable(path: Path) -> None:
    path.write_bytes(THEIRS)
    path.chmod(0o666)


def forge_link(path: Path) -> None:
    (path.parent / "elsewhere").write_bytes(THEIRS)
    path.unlink()
    path.symlink_to(path.parent / "elsewhere")


def forge_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.slow
@pytest.mark.parametrize("forge", [forge_writable, forge_link, forge_pipe])
def test_forged_files_of_a_cache_are_fetched_anew(tmp_path: Path, forge: Callable[[Path], None]) -> None:
    (tmp_path / "a.tar").write_bytes(OURS)
    (tmp_path / "a.tar.index.json").write_text('"ours"')
    folder, url = tmp_path / "cache", f"pipe:cat {tmp_path}/a.tar"
    cache = ShardCache(folder, 10_000, 1)

    def read() -> tuple[bytes, str]:
        descriptor = cache.shard(url, len(OURS), sha256(OURS).hexdigest()).open()
        try:
            return os.pread(descriptor, 100, 0), cache.index_text(url)
        finally:
            os.close(descriptor)

    assert read() == (OURS, '"ours"')
    files = [path for path in folder.iterdir() if path.is_file()]
    assert len(files) == 2
    for path in files:
        forge(path)
    assert read() == (OURS, '"ours"')


@pytest.mark.slow
def test_a_cache_that_others_can_write_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(0o777)
    cache = ShardCache(folder, 10_000, 1)
    with pytest.raises(DataError) as caught:
        cache.index_text("pipe:echo '\"a.tar\"'")
    problem = f"data.cache_dir = '{folder}': {folder} can be written by others; run chmod go-w {folder}, or name another"
    assert str(caught.value) == problem
    folder.chmod(0o755)
    assert cache.index_text("pipe:echo '\"a.tar\"'").strip() == '"a.tar.index.json"'


@pytest.mark.slow
def test_a_cache_removes_nothing_but_its_own(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_bytes(b"x" * 10_000)
    os.utime(tmp_path / "thesis.txt", (0, 0))
    cache = ShardCache(tmp_path, 30, 1)
    for name in ("a", "b"):
        assert cache.index_text(f"pipe:echo '\"{name}.tar\"'").strip() == f'"{name}.tar.index.json"'
    assert (tmp_path / "thesis.txt").exists()
