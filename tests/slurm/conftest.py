from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.slurm.cluster import Cluster, why_not


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes, idle, of a real Slurm."""
    reason = "jobs would train on the machine's GPUs" if torch.cuda.is_available() else why_not()
    if reason is not None:
        pytest.skip(f"no Slurm cluster here: {reason}")
    cluster = Cluster(tmp_path_factory.mktemp("slurm") / "cluster")
    yield cluster
    cluster.stop()
