from __future__ import annotations

from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from tests.data.flaky_server import Server, serving
from tests.data.numbered import write_numbered

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


@pytest.fixture
def server(served: Path) -> Iterator[Server]:
    """Serves the folder ``served`` of the test's module, and counts its requests anew for each test."""
    with serving(served) as running:
        yield running
