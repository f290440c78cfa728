from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.small_disk import mounted
from tests.tiny import write_digits

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``train-*.tar`` and ``val-*.tar``."""
    return write_digits(Path(tmp_path_factory.mktemp("digits")))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB, that can be filled."""
    with mounted(tmp_path / "disk") as path:
        yield path
