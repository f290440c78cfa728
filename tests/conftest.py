"""The two tiers of tests, and fixtures that several folders use."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from svite_scale.sparsity.kernels import block_products, expand
from tests.small_disk import mounted
from tests.tiny import write_config_file, write_digits

# On tensors as small as these a second thread costs time.
torch.set_num_threads(1)
# A busy machine is slow at times; that is no failure.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

SLOW_IMPORTS = {
    "Cluster",
    "Job",
    "Server",
    "forked",
    "in_processes",
    "kill_at_random",
    "multiprocessing",
    "run_command",
    "run_on_ranks",
    "run_on_ranks_once",
    "subprocess",
}
"""What starts processes: a file of tests that imports one of these is slow."""

SLOW_FIXTURES = {"saved", "small_disk"}

_started: list[str] = []
"""The processes that were started since the present test began."""


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Marks as slow the tests that start processes, as far as it shows; the others carry the mark themselves.

    Those on a Slurm take minutes, one after another, so they begin early; but not first, since they need DeepSpeed compiled.
    """
    on_slurm = [item for item in items if item.path.parent.name == "slurm"]
    others = [item for item in items if item.path.parent.name != "slurm"]
    start = next((number for number, item in enumerate(others) if item.path.parent.name == "data"), 0)
    items[:] = [*others[:start], *on_slurm, *others[start:]]
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        by_parameter = parameters.get("workers")
        if SLOW_IMPORTS & vars(item.module).keys() or SLOW_FIXTURES & set(item.fixturenames) or by_parameter:
            item.add_marker(pytest.mark.slow)


@sys.addaudithook
def _note_start(event: str, arguments: tuple[object, ...]) -> None:
    if event in ("os.fork", "os.posix_spawn", "os.system", "subprocess.Popen", "tests.run_on_ranks"):
        _started.append(f"{event}{arguments[:2]}")


@pytest.fixture(scope="session", autouse=True)
def _cpu_kernels() -> None:
    """Compiles the CPU kernels, if they aren't yet, so that no test does."""
    mask = torch.ones(1, dtype=torch.uint8)
    expand(torch.ones(1), mask, torch.Size((1,)))
    block_products.product(torch.ones(1, 1), torch.ones(1, 1, 16), mask, None, torch.Size((16, 1)))


@pytest.fixture(autouse=True)
def _starts_processes_only_if_slow(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test of the fast tier that starts a process."""
    _started.clear()
    yield
    if _started and request.node.get_closest_marker("slow") is None:
        pytest.fail(f"a test that starts a process must be marked slow: {_started[0]}")


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``train-*.tar`` and ``val-*.tar``."""
    return write_digits(Path(tmp_path_factory.mktemp("digits")))


@pytest.fixture
def config_path(digits: Path, tmp_path: Path) -> Path:
    """The tiny run's config, whose run directory is ``tmp_path / "run"``."""
    return write_config_file(digits, tmp_path / "run", tmp_path / "tiny.yaml")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB, that can be filled."""
    with mounted(tmp_path / "disk") as path:
        yield path


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the directory of a run of ``tests.saved.RUNS``."""
    from tests.saved import SavedRuns  # imports the trainer, which most tests needn't wait for

    return SavedRuns(tmp_path_factory.mktemp("saved"))
