from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.data.numbered import write_numbered

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pattern of 53 numbered samples in shards of 10, the last of 3."""
    return write_numbered(Path(tmp_path_factory.mktemp("many")), 53, 10)
