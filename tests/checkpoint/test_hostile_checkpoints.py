"""A checkpoint may be somebody else's: loading one runs nothing that it holds, and says in one line what is wrong with it."""

from __future__ import annotations

import copyreg
import json
import os
import pickle
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, BytesStorageMetadata, Metadata, MetadataIndex

from benchmarks.kills import SAVING
from svite_scale.checkpoint.compatibility import check_same_tensors
from svite_scale.checkpoint.load import TensorReader, read_run_state
from svite_scale.checkpoint.manifest import problem_of
from svite_scale.errors import CheckpointError
from tests.checkpoint.test_checkpoint_choice import load, rewrite_manifest, save_steps
from tests.ranks import run_on_ranks

PROOF = Path(f"/tmp/svite_scale-test-{os.getpid()}-code-ran")
"""A folder that a hostile file tries to make."""


class Code:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(PROOF),)


STATE = {"model/a": torch.arange(5.0), "model/b": torch.tensor([1, 2, 3], dtype=torch.uint8)}


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Metadata]:
    """Of a checkpoint of :data:`STATE`, as torch reads it, and where it is."""
    folder = tmp_path_factory.mktemp("whole")
    dcp.save(STATE, checkpoint_id=folder, no_dist=True)
    return folder, dcp.FileSystemReader(folder).read_metadata()


def changed(**fields: Any) -> Callable[[Metadata], object]:
    return lambda metadata: replace(metadata, **fields)


def with_state(name: str, entry: object) -> Callable[[Metadata], object]:
    return lambda metadata: replace(metadata, state_dict_metadata={**metadata.state_dict_metadata, name: entry})  # type: ignore[dict-item]


def in_file(path: str, **fields: Any) -> Callable[[Metadata], object]:
    def change(metadata: Metadata) -> object:
        info = _StorageInfo(path, 0, 9, **fields)
        return replace(metadata, storage_data=dict.fromkeys(metadata.storage_data, info))

    return change


def without_chunk(metadata: Metadata) -> object:
    metadata = deepcopy(metadata)
    metadata.state_dict_metadata["model/a"].chunks = []  # type: ignore[union-attr]
    return metadata


def repeated(metadata: Metadata) -> object:
    """A tensor of a thousand pieces, a thousand times, in a few kilobytes."""
    entry = deepcopy(metadata.state_dict_metadata["model/a"])
    entry.size = torch.Size([1000])  # type: ignore[union-attr]
    entry.chunks = [dcp.metadata.ChunkStorageMetadata(torch.Size([0]), torch.Size([1]))] * 1000  # type: ignore[union-attr]
    return replace(metadata, state_dict_metadata={str(number): entry for number in range(1000)})


def state_of_class(metadata: Metadata) -> bytes:
    """Gives torch's own class another method."""
    return b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\nN}(\x8c\x08__init__Nu\x86b."


HOSTILE: dict[str, tuple[Callable[[Metadata], object], str]] = {
    "code beside it": (lambda metadata: (metadata, Code()), "it names 'posix.mkdir', which has no place in it"),
    "code alone": (lambda _: Code(), "it names 'posix.mkdir'"),
    "code, protocol 0": (lambda _: pickle.dumps(Code(), 0), "it names 'posix.mkdir'"),
    "code, protocol 2": (lambda metadata: pickle.dumps((metadata, Code()), 2, fix_imports=False), "it names 'posix.mkdir'"),
    "code, as INST": (lambda _: b"(S'" + str(PROOF).encode() + b"'\niposix\nmkdir\n.", "it has the instruction STRING"),
    "code for the planner": (changed(planner_data=Code()), "it names 'posix.mkdir'"),
    "code as a version": (changed(version=Code()), "it names 'posix.mkdir'"),
    "code as a key": (lambda metadata: replace(metadata, planner_data={Code(): 1}), "it names 'posix.mkdir'"),
    "code as a tensor": (with_state("model/a", Code()), "it names 'posix.mkdir'"),
    "torch's own code": (
        lambda _: b"\x80\x04\x8c\x05torch\x8c\x04load\x93\x8c\x04fileR0N.",
        "it names 'torch.load', which has no place in it",
    ),
    "a method of a known class": (
        lambda _: b"\x80\x04\x8c\x05torch\x8c\x0aSize.numel\x93.",
        "it names 'torch.Size.numel', which has no place in it",
    ),
    "an extension of pickle's": (lambda _: b"\x80\x02\x82\x01.", "it has the instruction EXT1"),
    "a persistent name": (lambda _: b"\x80\x04K\x01Q.", "it has the instruction BINPERSID"),
    "a class changed": (state_of_class, "it is no complete pickle (TypeError)"),
    "an object, unpickled when loaded": (
        with_state("model/a", BytesStorageMetadata()),
        "it has a BytesStorageMetadata in place of a TensorStorageMetadata",
    ),
    "an object of another class": (
        with_state("model/a", MetadataIndex("model/a")),
        "it has a MetadataIndex in place of a TensorStorageMetadata",
    ),
    "another directory": (in_file("../__0_0.distcp"), "a tensor is in '../__0_0.distcp', which is no file of a checkpoint"),
    "another file": (in_file("/etc/passwd"), "a tensor is in '/etc/passwd', which is no file of a checkpoint"),
    "transformed": (in_file("__0_0.distcp", transform_descriptors=["zstd"]), "its tensors are transformed, which no run does"),
    "a missing piece": (without_chunk, "the chunks of model/a don't make up its 5 elements"),
    "pieces without end": (repeated, "it has more pieces than it can hold"),
    "a negative number": (
        lambda metadata: replace(metadata, storage_data={MetadataIndex("model/a"): _StorageInfo("__0_0.distcp", -1, 2)}),
        "a number is none",
    ),
    "other data": (lambda _: {"a": 1}, "it has a PlainDict in place of a Metadata"),
    "text": (lambda _: b"<html>", "it has the instruction 60, which has no place in it"),
    "nothing": (lambda _: b"", "it is no complete pickle (EOFError)"),
    "cut": (lambda metadata: pickle.dumps(metadata)[:-9], "it is no complete pickle ("),
    "deep": (lambda _: b"\x80\x04)" + b"\x85" * 100_000 + b".", "it has a tuple in place of a Metadata"),
    "deep keys": (lambda _: b"\x80\x04}()" + b"\x85" * 100_000 + b"Nu.", "a key of it is a tuple"),
    "deep lists": (lambda _: b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".", "it has a list in place of a Metadata"),
    "a place far away": (lambda _: b"\x80\x04Nr\xff\xff\xff\x7f.", "it has a NoneType in place of a Metadata"),
    "a text too long": (lambda _: b"\x80\x04X\xff\xff\xff\x7fa.", "it is no complete pickle ("),
    "bytes without end": (lambda _: b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.", "it has the instruction BYTEARRAY8"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_metadata_is_refused_without_running_it(tmp_path: Path, metadata: tuple[Path, Metadata], kind: str) -> None:
    whole, read = metadata
    folder = shutil.copytree(whole, tmp_path / "checkpoint")
    change, problem = HOSTILE[kind]
    content = change(read)
    (folder / ".metadata").write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    copyreg.add_extension("posix", "mkdir", 1)
    try:
        with pytest.raises(CheckpointError) as caught:
            check_same_tensors(folder, STATE)
    finally:
        copyreg.remove_extension("posix", "mkdir", 1)
    assert str(caught.value).startswith(f"{folder}/.metadata can't be read: {problem}")
    assert len(str(caught.value).splitlines()) == 1
    assert not PROOF.exists()


ENUM_FORMS: dict[str, Callable[[Enum, int], tuple[object, ...]]] = {
    "by value": lambda member, protocol: (type(member), (member.value,)),
    "by name": lambda member, protocol: (getattr, (type(member), member.name)),
}
"""How versions of Python pickle a member of an enum; 3.11.0 to 3.11.3 do it by name."""


@pytest.mark.parametrize("enum_form", ENUM_FORMS)
@pytest.mark.parametrize("protocol", [None, 2, 3, 4, 5])
def test_metadata_is_read_as_torch_reads_it(
    tmp_path: Path, metadata: tuple[Path, Metadata], protocol: int | None, enum_form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Versions of Python pickle in different ways."""
    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", ENUM_FORMS[enum_form])
    whole, expected = metadata
    folder = shutil.copytree(whole, tmp_path / "checkpoint")
    if protocol is not None:
        (folder / ".metadata").write_bytes(pickle.dumps(expected, protocol, fix_imports=False))
    found = TensorReader(folder).read_metadata()
    assert found.storage_data == expected.storage_data
    assert found.state_dict_metadata.keys() == expected.state_dict_metadata.keys()
    for name, entry in expected.state_dict_metadata.items():
        mine = found.state_dict_metadata[name]
        assert (mine.size, mine.chunks, mine.properties.dtype) == (entry.size, entry.chunks, entry.properties.dtype)  # type: ignore[union-attr]
    loaded = {name: torch.zeros_like(tensor) for name, tensor in STATE.items()}
    dcp.load(loaded, storage_reader=TensorReader(folder), no_dist=True)
    assert all(torch.equal(loaded[name], STATE[name]) for name in STATE)


def poisoned_tensor(step: Path) -> None:
    """An object in place of a tensor, in the file that torch reads tensors from."""
    sizes = {path.name: path.stat().st_size for path in step.glob("*.distcp")}
    for name, size in sizes.items():
        (step / name).write_bytes(pickle.dumps(Code()).ljust(size, b"\0"))


def poisoned_metadata(step: Path) -> None:
    content = pickle.loads((step / ".metadata").read_bytes())
    (step / ".metadata").write_bytes(pickle.dumps((content, Code())))


def changed_state(**fields: object) -> Callable[[Path], None]:
    def change(step: Path) -> None:
        state = json.loads((step / "run.json").read_text())
        (step / "run.json").write_text(json.dumps({**state, **fields}))

    return change


POISONED: dict[str, tuple[Callable[[Path], object], str]] = {
    "metadata": (poisoned_metadata, "/.metadata can't be read: it names 'posix.mkdir'"),
    "tensors": (poisoned_tensor, " can't be read: "),
    "no metadata": (lambda step: (step / ".metadata").unlink(), "/.metadata can't be read: [Errno 2] No such file"),
    "no state": (lambda step: (step / "run.json").unlink(), "/run.json can't be read (FileNotFoundError"),
    "deep state": (lambda step: (step / "run.json").write_text("[" * 10**5), "/run.json can't be read (RecursionError"),
    "another state": (changed_state(topology=[1]), "/run.json can't be read (TypeError('a section is no mapping'))"),
    "a step below 0": (
        changed_state(topology={"steps": -1}),
        "/run.json can't be read (TypeError('its step is none'))",
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run_on_ranks(2, save_steps, folder / "checkpoints", SAVING, 1)
    return folder / "checkpoints"


@pytest.mark.parametrize("kind", POISONED)
def test_a_poisoned_checkpoint_is_refused_on_all_ranks(tmp_path: Path, saved: Path, kind: str) -> None:
    """It has a manifest that fits, as its author can write one."""
    directory = shutil.copytree(saved, tmp_path / "checkpoints")
    step = directory / "step-00000001"
    poison, message = POISONED[kind]
    poison(step)
    (step / "manifest.json").unlink()
    rewrite_manifest(step)
    for found in run_on_ranks(2, load, directory):
        assert found.step is None
        assert found.message.startswith(f"{step}{message}"), found.message
    assert not PROOF.exists()


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("../outside", "its manifest.json names '../outside', which is no file of this directory"),
        ("/dev/zero", "its manifest.json names '/dev/zero', which is no file of this directory"),
        ("..", ".. is no file"),
        ("zeros", "zeros is no file"),
        ("pipe", "pipe is no file"),
    ],
)
def test_a_manifest_is_refused_when_it_names_anything_but_a_file_beside_it(tmp_path: Path, name: str, problem: str) -> None:
    """Without the look at it, the checksum of some of these would never be done."""
    step = tmp_path / "step-00000001"
    step.mkdir()
    (tmp_path / "outside").touch()
    (step / "zeros").symlink_to("/dev/zero")
    os.mkfifo(step / "pipe")
    (step / "manifest.json").write_text(json.dumps({"files": {name: {"size": 0, "sha256": "0" * 64}}}))
    assert problem_of(step, to_read=slice(0)) == problem


def test_a_manifest_is_damaged_when_it_is_nested_too_deep(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("[" * 10**5)
    assert problem_of(tmp_path) == "its manifest.json is damaged"


def test_a_run_state_is_read_when_nothing_is_wrong_with_it(saved: Path) -> None:
    assert read_run_state(saved / "step-00000001")["step"] == 1
