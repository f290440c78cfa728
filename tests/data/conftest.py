from __future__ import annotations

from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from tests.data.flaky_server import Server, serving
from tests.data.numbered import write_numbered
from tests.data.remote import NUM_BLOBS, write_blobs

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "make_shards.py"


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pattern of 53 numbered samples in shards of 10, the last of 3."""
    return write_numbered(Path(tmp_path_factory.mktemp("many")), 53, 10)


@pytest.fixture(scope="session")
def command() -> ModuleType:
    """``launch/make_shards.py``, to be called in this process."""
    spec = spec_from_file_location("make_shards", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of blobs, each with a JSON text as its index. A module may define another folder by this name."""
    folder = tmp_path_factory.mktemp("served")
    for name in write_blobs(folder, NUM_BLOBS):
        (folder / f"{name}.index.json").write_text(f'"{name}"')
    return folder


@pytest.fixture
def server(served: Path) -> Iterator[Server]:
    """Serves the folder ``served``; each test has a new server, whose counts of requests begin at 0."""
    with serving(served) as running:
        yield running
