"""Time of a model whose weights are active in blocks, beside its dense twin, and of its updates beside those of single weights.

    python benchmarks/blocks.py [--sections step joined update] [--blocks 16x16 32x1] [--densities 0.5 0.3 0.1] [--threads 2]

DeiT-Small at 224 px, fp32, fused AdamW. A training step is forward, loss, backward and optimizer. All models of a density run
in turn in one process, so that other load on the machine affects all alike. Times are medians; a ratio is the median of the
ratios of a model's time to its dense twin's in the same round. ``benchmarks/bytes.py --block 16 16`` counts bytes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the helpers beside this file

from benchmarks.machine import describe_machine
from benchmarks.structure import Twin
from svite_scale import attach
from svite_scale.config.schema import SparsityConfig
from svite_scale.cost.flops import count_flops
from svite_scale.evaluation.timing import WARMUP, alternate, ratio
from svite_scale.models.options import ModelConfig, StructuredConfig, TokensConfig

Block = tuple[int, int]
SINGLE: Block = (1, 1)
HALF = TokensConfig(keep=0.5)


def step_section(arguments: argparse.Namespace) -> None:
    """Prints training and inference of each block at each density."""
    print_header("block")
    for density in arguments.densities:
        rows = {name_of(block): SparsityConfig(density=density, block=block) for block in arguments.blocks}
        print_ratios(density, rows, arguments)


def joined_section(arguments: argparse.Namespace) -> None:
    """Prints the same of blocks of the first size, joined with half of the tokens, and with neurons of the same density."""
    block = arguments.blocks[0]
    print_header(f"{name_of(block)} and")
    for density in arguments.densities:
        units = StructuredConfig(neurons=density)
        rows = {
            "tokens 50%": SparsityConfig(density=density, block=block, tokens=HALF),
            "neurons": SparsityConfig(density=density, block=block, structured=units),
            "neurons, tokens 50%": SparsityConfig(density=density, block=block, structured=units, tokens=HALF),
        }
        print_ratios(density, rows, arguments)


def print_header(name: str) -> None:
    print(f"\n{'density':>7}  {name:20} {'MACs':>6} {'step ms':>9} {'ratio':>7} {'inference':>10} {'ratio':>7}")


def print_ratios(density: float, rows: dict[str, SparsityConfig], arguments: argparse.Namespace) -> None:
    """Times models beside the dense one, and prints a row for each. ``MACs``: what is multiplied, of the dense model's."""
    model = ModelConfig(name=arguments.model)
    twins = {name: Twin(sparsity, "cpu", model) for name, sparsity in (rows | {"dense": SparsityConfig()}).items()}
    images, labels = torch.randn(arguments.batch_size, 3, 224, 224), torch.arange(arguments.batch_size)
    steps = {name: lambda twin=twin: twin.train(images, labels) for name, twin in twins.items()}
    inferences = {name: lambda twin=twin: twin.infer(images) for name, twin in twins.items()}
    times = [alternate(tasks, arguments.rounds) for tasks in (steps, inferences)]
    for name in twins:
        cost = count_flops(twins[name].model, image_size=224)
        columns = (
            f"{statistics.median(seconds[name]) * 1e3:{width}.1f} {ratio(seconds[name], seconds['dense']):7.3f}"
            for width, seconds in zip((9, 10), times, strict=True)
        )
        print(f"{density:7}  {name:20} {cost.multiplied_macs / cost.dense_macs:6.3f} {' '.join(columns)}", flush=True)


def update_section(arguments: argparse.Namespace) -> None:
    """Prints the time that an update takes and that recording its gradients adds to a step, of single weights and of blocks."""
    print(f"\n{'density':>7}  {'update':10} {'prune and grow ms':>18} {'ratio':>7} {'recording ms':>13}")
    for density in arguments.densities:
        runs = {name_of(block): UpdatedTwin(density, block, arguments) for block in [SINGLE, *arguments.blocks]}
        for turn in range(WARMUP + arguments.rounds):
            for run in runs.values():
                run.update_once(measured=turn >= WARMUP)
        for name, run in runs.items():
            relative = ratio(run.updates, runs[name_of(SINGLE)].updates)
            recording = statistics.median(run.recordings) * 1e3
            print(f"{density:7}  {name:10} {statistics.median(run.updates) * 1e3:18.1f} {relative:7.3f} {recording:13.1f}")


class UpdatedTwin(Twin):
    """A model with a topology engine whose every second step ends in an update.

    Attributes:
        updates: seconds of each measured update.
        recordings: by how many seconds each measured step that records gradients is longer than the step before it.
    """

    def __init__(self, density: float, block: Block, arguments: argparse.Namespace) -> None:
        super().__init__(SparsityConfig(density=density, block=block), "cpu", ModelConfig(name=arguments.model))
        self.topology = attach(self.model, self.optimizer, total_steps=10_000, update_every=2)
        self.images, self.labels = torch.randn(1, 3, 224, 224), torch.zeros(1, dtype=torch.int64)
        self.updates: list[float] = []
        self.recordings: list[float] = []

    def update_once(self, *, measured: bool) -> None:
        plain = self._timed_step()
        self.topology.step()
        recorded = self._timed_step()
        start = time.perf_counter()
        update = self.topology.step()
        assert update is not None
        if measured:
            self.updates.append(time.perf_counter() - start)
            self.recordings.append(recorded - plain)

    def _timed_step(self) -> float:
        start = time.perf_counter()
        self.train(self.images, self.labels)
        return time.perf_counter() - start


def name_of(block: Block) -> str:
    return "{}x{}".format(*block)


def to_block(text: str) -> Block:
    rows, _, columns = text.partition("x")
    return int(rows), int(columns)


SECTIONS = {"step": step_section, "joined": joined_section, "update": update_section}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    blocks = [to_block(text) for text in ("16x16", "32x1", "32x8", "64x16", "128x4")]
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--blocks", nargs="+", type=to_block, default=blocks, metavar="ROWSxCOLUMNS")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5, 0.3, 0.1])
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{describe_machine()}; {arguments.model}, batch {arguments.batch_size}, {arguments.threads} threads")
    for section in arguments.sections:
        SECTIONS[section](arguments)


if __name__ == "__main__":
    main()
