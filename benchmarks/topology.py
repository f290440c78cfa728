"""Time that sparsity costs and saves: the kernels of packed weights, a training step, the optimizer's step, an update.

    python benchmarks/topology.py [--sections kernels step optimizer update] [--threads 2] [--density 0.3]

What is compared runs alternately in one process, so that other load on the machine affects both alike. Times are medians; a
ratio is the median of the ratios of successive runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the helpers beside this file

from benchmarks.machine import describe_machine
from svite_scale import attach
from svite_scale.config.schema import SparsityConfig
from svite_scale.evaluation.timing import WARMUP, alternate, ratio
from svite_scale.models.options import ModelConfig
from svite_scale.models.sparse import build_sparse
from svite_scale.sparsity import bits, kernels
from svite_scale.sparsity.kernels import torch_kernels
from svite_scale.train.optimizer import build_optimizer
from svite_scale.train.options import OptimizerConfig

MODEL = ModelConfig(name="deit_small_patch16_224")
NUMELS = {"cpu": (2304 * 768,), "cuda": (2304 * 768, 2**28)}
"""By device, the number of positions of each weight that kernels are timed on. The first is the qkv weight of DeiT-Base.
On a GPU it takes less time than the launches, so there is also one so large that launches don't count."""


def kernel_section(arguments: argparse.Namespace) -> None:
    """Prints the times of expand and compress beside a copy of the dense weight. Bytes: what must be read and written."""
    print(f"\n{'kernel':16} {'positions':>11} {'dtype':9} {'path':7} {'ms':>8} {'GB/s':>7} {'of a copy':>10}")
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        for numel, dtype in product(NUMELS[device], (torch.float32, torch.bfloat16)):
            kernel_rows(device, numel, dtype, arguments)


def kernel_rows(device: str, numel: int, dtype: torch.dtype, arguments: argparse.Namespace) -> None:
    """Prints a row per kernel and path."""
    generator = torch.Generator().manual_seed(0)
    active = (torch.rand(numel, generator=generator) < arguments.density).to(device)
    mask, dense = bits.pack(active), torch.randn(numel, generator=generator).to(device, dtype)
    values, target, shape = dense[active], torch.empty_like(dense), torch.Size((numel,))
    k = values.numel()
    tasks: dict[str, Callable[[], Tensor]] = {
        "copy": lambda: target.copy_(dense),
        "expand torch": lambda: torch_kernels.expand(values, mask, shape),
        "expand fast": lambda: kernels.expand(values, mask, shape),
        "compress torch": lambda: torch_kernels.compress(dense, mask, k),
        "compress fast": lambda: kernels.compress(dense, mask, k),
    }
    seconds = alternate(tasks, rounds=arguments.rounds * 5, device=device)
    packed_bytes = (numel + k) * dense.element_size() + mask.numel()
    speed: dict[str, list[float]] = {}
    for name, times in seconds.items():
        moved = 2 * numel * dense.element_size() if name == "copy" else packed_bytes
        speed[name] = [moved / each / 1e9 for each in times]
        task, _, path = name.partition(" ")
        relative = ratio(speed[name], speed["copy"])
        print(
            f"{f'{task}, {device}':16} {numel:11,} {str(dtype)[6:]:9} {path:7} {statistics.median(times) * 1e3:8.3f} "
            f"{statistics.median(speed[name]):7.1f} {relative:10.2f}"
        )


class Run:
    """A model with its optimizer, one step at a time."""

    def __init__(self, density: float, model: ModelConfig = MODEL) -> None:
        self.model: nn.Module = build_sparse(model, SparsityConfig(density=density), seed=0)[0].train()
        self.optimizer = build_optimizer(self.model, OptimizerConfig())

    def step(self, images: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(images), labels).backward()
        self.optimizer.step()


def step_section(arguments: argparse.Namespace) -> None:
    """Prints the time of forward, backward and AdamW of a packed model beside its dense twin."""
    print(f"\n{'step':24} {'packed ms':>10} {'dense ms':>9} {'ratio':>7}")
    packed, dense = Run(arguments.density), Run(1.0)
    for batch_size in arguments.batch_sizes:
        images, labels = torch.randn(batch_size, 3, 224, 224), torch.arange(batch_size)
        tasks = {"packed": lambda: packed.step(images, labels), "dense": lambda: dense.step(images, labels)}  # noqa: B023
        print_pair(f"{MODEL.name[:10]}, batch {batch_size}", alternate(tasks, arguments.rounds))


def optimizer_section(arguments: argparse.Namespace) -> None:
    """Prints the time of AdamW on the values of a packed model beside AdamW on the weights of its dense twin."""
    print(f"\n{'optimizer':24} {'packed ms':>10} {'dense ms':>9} {'ratio':>7}")
    runs = {"packed": Run(arguments.density), "dense": Run(1.0)}
    for run in runs.values():
        run.step(torch.randn(1, 3, 224, 224), torch.zeros(1, dtype=torch.int64))
    print_pair("AdamW", alternate({name: run.optimizer.step for name, run in runs.items()}, arguments.rounds * 5))


def update_section(arguments: argparse.Namespace) -> None:
    """Prints the time of a prune-and-grow update of DeiT-Base, and the time that recording gradients adds to a step."""
    run = Run(arguments.density, ModelConfig(name="deit_base_patch16_224"))
    topology = attach(run.model, run.optimizer, total_steps=10_000, update_every=2)
    seconds: dict[str, list[float]] = {"step": [], "recorded step": [], "update": []}
    images, labels = torch.randn(1, 3, 224, 224), torch.zeros(1, dtype=torch.int64)
    for turn in range(2 * (WARMUP + arguments.rounds)):
        start = time.perf_counter()
        run.step(images, labels)
        stepped = time.perf_counter()
        update = topology.step()
        if turn >= 2 * WARMUP:
            seconds["recorded step" if update else "step"].append(stepped - start)
            if update:
                seconds["update"].append(time.perf_counter() - stepped)
    print(f"\n{'update of DeiT-Base':24} {'median s':>10} {'longest s':>10}")
    print(f"{'prune and grow':24} {statistics.median(seconds['update']):10.3f} {max(seconds['update']):10.3f}")
    recorded = statistics.median(a - b for a, b in zip(seconds["recorded step"], seconds["step"], strict=True))
    print(f"{'recording gradients':24} {recorded:10.3f}")


def print_pair(name: str, seconds: Mapping[str, list[float]]) -> None:
    packed, dense = (statistics.median(seconds[kind]) * 1e3 for kind in ("packed", "dense"))
    print(f"{name:24} {packed:10.2f} {dense:9.2f} {ratio(seconds['packed'], seconds['dense']):7.3f}", flush=True)


SECTIONS = {"kernels": kernel_section, "step": step_section, "optimizer": optimizer_section, "update": update_section}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--density", type=float, default=0.3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 4])
    parser.add_argument("--rounds", type=int, default=15, help="measured steps of each kind; of what is short, 5 times as many")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{describe_machine()}; {arguments.threads} threads, density {arguments.density}")
    for section in arguments.sections:
        SECTIONS[section](arguments)


if __name__ == "__main__":
    main()
