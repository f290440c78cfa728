from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.train.tiny import write_digits

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``train-*.tar`` and ``val-*.tar``."""
    return write_digits(Path(tmp_path_factory.mktemp("digits")))
