"""Checkpoints, packed against dense: the time for which a save makes training wait, its whole time, and its bytes on the disk.

    python benchmarks/checkpoint.py [--model deit_small_patch16_224] [--density 0.3] [--ranks 2] [--saves 5] [--folder /tmp]

The stall is the time that ``save()`` takes on rank 0, in which training waits. The save is the time until all is on the disk.
Both are medians. Loading includes the checksums, and finds the files in memory. The state is that of a training after a few
topology updates, because these change the statistics.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the tests' ranks, too

from benchmarks.bytes import BACKENDS, BATCH_SIZE
from benchmarks.machine import describe_machine
from svite_scale.checkpoint.checkpoint import Checkpoint
from svite_scale.checkpoint.state import RunParts
from svite_scale.config.schema import Config, SparsityConfig
from svite_scale.engines.backend import Backend, EngineOptions
from svite_scale.engines.build import build_backend
from svite_scale.models.dense import blocks
from svite_scale.models.options import ModelConfig
from svite_scale.models.sparse import build_sparse
from svite_scale.sparsity.topology.engine import TopologyEngine
from svite_scale.sparsity.topology.schedule import UpdateSchedule
from svite_scale.train.ema import Ema
from svite_scale.train.optimizer import build_optimizer
from svite_scale.train.options import OptimizerConfig, TrainConfig
from tests.ranks import close_all, run_on_ranks

UPDATES = 2


@dataclass(frozen=True)
class Measured:
    """The figures of one engine and density.

    Attributes:
        parameters: trainable elements.
        size: bytes of a checkpoint's files.
        stall_ms: median over saves.
        save_s: median over saves.
        load_s: for the last save.
    """

    parameters: int
    size: int
    stall_ms: float
    save_s: float
    load_s: float


def measure(backend_name: str, model_name: str, density: float, ema: bool, num_saves: int, folder: Path) -> Measured:
    """Measures one engine and density. A collective: all ranks call it."""
    config = Config(
        run_dir=str(folder),
        model=ModelConfig(name=model_name),
        sparsity=SparsityConfig(density=density),
        train=TrainConfig(ema_decay=0.9999 if ema else None),
        parallel=BACKENDS[backend_name],
    )
    model, _ = build_sparse(config.model, config.sparsity, seed=0)
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    options = EngineOptions(device=torch.device("cpu"), wrap_units=blocks(model), micro_batch_size=BATCH_SIZE)
    backend = build_backend(config.parallel, model, lambda module: build_optimizer(module, OptimizerConfig()), options)
    schedule = UpdateSchedule(total_steps=2 * UPDATES, update_every=1, stop_fraction=0.5)
    topology = TopologyEngine(model, backend.access, schedule, group=dist.group.WORLD)
    average = Ema(model, topology, 0.9999) if ema else None
    name = f"{backend_name}-{density}-{ema}"
    checkpoint = Checkpoint(folder / name, config, RunParts(backend, topology, average))
    for _ in range(UPDATES):
        train_step(backend, topology)
    stalls, seconds = [], []
    for _ in range(num_saves):
        metrics: dict[str, float] = {}
        checkpoint.save(topology.steps)
        while "checkpoint_seconds" not in metrics:
            metrics |= checkpoint.metrics()
            train_step(backend, topology)
        stalls.append(metrics["checkpoint_stall_ms"])
        seconds.append(metrics["checkpoint_seconds"])
    started = time.perf_counter()
    checkpoint.load_newest()
    load_s = time.perf_counter() - started
    assert checkpoint.last_saved is not None
    size = sum(path.stat().st_size for path in checkpoint.last_saved.iterdir())
    checkpoint.close()
    return Measured(parameters, size, statistics.median(stalls), statistics.median(seconds), load_s)


def train_step(backend: Backend, topology: TopologyEngine) -> None:
    images, labels = torch.randn(BATCH_SIZE, 3, 224, 224), torch.zeros(BATCH_SIZE, dtype=torch.int64)
    backend.backward(F.cross_entropy(backend.forward(images).float(), labels))
    backend.step()
    topology.step()


def row(backend: str, ema: bool, packed: Measured, dense: Measured) -> str:
    """Returns one line of the table."""
    fraction = packed.parameters / dense.parameters
    cells = [
        backend + (" with EMA" if ema else ""),
        f"{packed.size / 1e6:.1f} / {dense.size / 1e6:.1f}",
        f"{packed.size / dense.size:.4f}",
        f"{fraction:.4f}",
        f"{packed.stall_ms:.0f} / {dense.stall_ms:.0f}",
        f"{packed.save_s:.2f} / {dense.save_s:.2f}",
        f"{packed.load_s:.2f} / {dense.load_s:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--density", type=float, default=0.3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=["fsdp2", "zero3"])
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure; default: a temporary one")
    arguments = parser.parse_args()
    print(describe_machine())
    print(f"{arguments.model}, density {arguments.density}, {arguments.ranks} ranks; packed / dense twin\n")
    print(
        "| engine | size MB | ratio | active fraction of parameters | stall ms | save s | load s |\n"
        "|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for backend in arguments.backends:
            for ema in (False, True):
                packed, dense = (
                    run_on_ranks(
                        arguments.ranks, measure, backend, arguments.model, density, ema, arguments.saves, Path(folder)
                    )[0]
                    for density in (arguments.density, 1.0)
                )
                print(row(backend, ema, packed, dense), flush=True)
    close_all()


if __name__ == "__main__":
    main()
