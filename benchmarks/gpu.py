"""Costs and savings of sparsity on one GPU: kernels, selection, training steps, topology updates, torch.compile, blocks.

    python benchmarks/gpu.py [--sections kernels selection steps update compile graph products blocks] [--rounds 15]

A training step is forward, backward and fused AdamW in bf16 autocast at 224 px. Packed and dense models run alternately in one
process, so that other load on the machine affects both alike. Times are medians; a ratio is the median of the ratios of
successive runs. *Peak* is the most memory that torch's allocator gave out during steps, with all of the model's training state.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the helpers beside this file

from benchmarks.machine import describe_machine
from benchmarks.topology import kernel_rows
from svite_scale import attach
from svite_scale.config.schema import SparsityConfig
from svite_scale.evaluation.timing import alternate, ratio
from svite_scale.models.dense import blocks
from svite_scale.models.options import ModelConfig
from svite_scale.models.sparse import build_sparse
from svite_scale.sparsity import bits, kernels
from svite_scale.sparsity.block_grid import BlockGrid
from svite_scale.sparsity.kernels import block_products
from svite_scale.sparsity.update import kth_smallest, prune_and_grow
from svite_scale.train.optimizer import build_optimizer
from svite_scale.train.options import OptimizerConfig

MIB = 2**20
STEPS = [
    ("deit_small_patch16_224", 64),
    ("deit_small_patch16_224", 256),
    ("deit_base_patch16_224", 64),
    ("deit_base_patch16_224", 128),
    ("deit_base_patch16_224", 256),
]
"""Models and batch sizes."""
GRAPHS = [("deit_small_patch16_224", 128), ("deit_base_patch16_224", 64)]
DENSITIES = (0.3, 0.1)
BLOCKS = [(16, 16), (32, 32), (64, 32), (64, 64), (128, 64), (128, 128)]
"""Rows and columns of blocks."""
STEP_BLOCKS = [(32, 32), (64, 64), (128, 128)]
BLOCK_DENSITIES = (0.5, 0.3, 0.1)
PRODUCTS = {"qkv": (2304, 768), "fc1": (3072, 768), "fc2": (768, 3072)}
"""Rows and columns of weights of DeiT-Base."""
DEIT_SMALL = {"packed": ("deit_small_patch16_224", 0.3), "dense": ("deit_small_patch16_224", 1.0)}
LAYERS = {"proj": 768 * 768, "qkv": 2304 * 768, "fc1, fc2": 3072 * 768}
"""Weights of the layers of DeiT-Base."""
OF_PACKING = ("_count_kernel", "_expand_kernel", "_compress_kernel", "scan")
"""Parts of the names of the GPU kernels that packed weights need in addition to a dense model's. Casts of values to bf16 aren't
among them, because their names are those of other casts."""


class Run:
    """A model with its optimizer on the GPU, one step at a time."""

    def __init__(
        self, name: str, density: float, batch_size: int, block: tuple[int, int] = (1, 1), compiled: bool = False
    ) -> None:
        """Builds the model, takes two steps, and measures the peak memory of the second in MiB."""
        gc.collect()
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated()
        model, _ = build_sparse(ModelConfig(name=name), SparsityConfig(density=density, block=block), seed=0)
        self.model = model.cuda().train()
        for part in blocks(self.model) if compiled else ():
            part.compile(fullgraph=True)
        self.optimizer = build_optimizer(self.model, OptimizerConfig())
        self.images = torch.randn(batch_size, 3, 224, 224, device="cuda")
        self.labels = torch.arange(batch_size, device="cuda")
        self.step()
        torch.cuda.reset_peak_memory_stats()
        self.step()
        self.peak = (torch.cuda.max_memory_allocated() - held) / MIB

    def loss(self) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):  # no parameter is used twice
            return F.cross_entropy(self.model(self.images).float(), self.labels)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()


class GraphedRun(Run):
    """A run whose forward and backward are one CUDA graph."""

    def __init__(self, name: str, density: float, batch_size: int) -> None:
        super().__init__(name, density, batch_size)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.loss().backward()
        torch.cuda.current_stream().wait_stream(stream)
        self.optimizer.zero_grad()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.graph_loss = self.loss()
            self.graph_loss.backward()

    def step_graphed(self) -> None:
        self.graph.replay()
        self.optimizer.step()


def step_section(rounds: int) -> None:
    """Prints time and peak memory of a step, packed beside dense, and the GPU's busy time in a packed step."""
    print(
        f"\n{'step':30} {'ms':>9} {'dense ms':>9} {'ratio':>6} {'MiB':>7} {'dense':>7} {'ratio':>6} "
        f"{'GPU ms':>7} {'packing':>7}"
    )
    for name, batch_size in STEPS:
        dense = Run(name, 1.0, batch_size)
        for density in DENSITIES:
            packed = Run(name, density, batch_size)
            seconds = alternate({"packed": packed.step, "dense": dense.step}, rounds, "cuda")
            times = [statistics.median(seconds[kind]) * 1e3 for kind in ("packed", "dense")]
            busy, packing = gpu_times(packed.step)
            print(
                f"{f'{name[:10]}, batch {batch_size}, density {density}':30} {times[0]:9.2f} {times[1]:9.2f} "
                f"{ratio(seconds['packed'], seconds['dense']):6.3f} {packed.peak:7.0f} {dense.peak:7.0f} "
                f"{packed.peak / dense.peak:6.3f} {busy:7.2f} {packing:7.2f}",
                flush=True,
            )
            del packed


def gpu_times(step: Callable[[], None]) -> tuple[float, float]:
    """Returns the milliseconds for which a step keeps the GPU busy, and the part of packed weights' own kernels in them."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    kernels = [(event.key, event.self_device_time_total / 1e3) for event in profiler.key_averages()]
    own = sum(time for key, time in kernels if any(part in key for part in OF_PACKING))
    return sum(time for _, time in kernels), own


def kernel_section(rounds: int) -> None:
    """Prints the times of expand and compress beside a copy of the dense weight. Bytes: what must be read and written."""
    print(f"\n{'kernel':16} {'positions':>11} {'dtype':9} {'path':7} {'ms':>8} {'GB/s':>7} {'of a copy':>10}")
    for numel in (2304 * 768, 2**28):
        for dtype in (torch.float32, torch.bfloat16):
            kernel_rows("cuda", numel, dtype, argparse.Namespace(density=0.3, rounds=rounds))


def selection_section(rounds: int) -> None:
    """Prints the time to find the k-th smallest of a layer's scores, beside torch's own ways, and that of a whole decision."""
    header = ("ours", "kthvalue", "topk", "sort", "prune_and_grow")
    print(f"\n{'selection, ms':15} {'scores':>9} {' '.join(f'{name:>9}' for name in header)}")
    for device, (name, numel) in product(("cuda", "cpu"), LAYERS.items()):
        score = torch.rand(numel, device=device)
        active = torch.rand(numel, device=device) < 0.3
        mask, available = bits.pack(active), int(active.sum())
        k = available // 2
        tasks: dict[str, Callable[[], object]] = {
            "ours": lambda: kth_smallest(kernels.compress(score, mask, available), k),  # noqa: B023
            "kthvalue": lambda: float(score[active].kthvalue(k).values),  # noqa: B023
            "topk": lambda: float(score[active].topk(k, largest=False, sorted=False).values.max()),  # noqa: B023
            "sort": lambda: float(score[active].sort().values[k - 1]),  # noqa: B023
            "prune_and_grow": lambda: prune_and_grow(active, score, score, k),  # noqa: B023
        }
        found = {way: task() for way, task in tasks.items() if way != "prune_and_grow"}
        assert len(set(found.values())) == 1, found
        seconds = alternate(tasks, rounds, device)
        times = " ".join(f"{statistics.median(each) * 1e3:9.3f}" for each in seconds.values())
        print(f"{f'{name}, {device}':15} {numel:9,} {times}", flush=True)


def update_section(rounds: int) -> None:
    """Prints the times of a prune-and-grow update of DeiT-Base, and of steps that record dense gradients or don't."""
    print(
        f"\n{'update of DeiT-Base':20} {'ms':>9} {'longest':>9} {'step ms':>9} {'recorded':>9} {'MiB above':>9} {'recorded':>9}"
    )
    for density in DENSITIES:
        run = Run("deit_base_patch16_224", density, 64)
        topology = attach(run.model, run.optimizer, total_steps=10_000, update_every=2)
        seconds: dict[str, list[float]] = {"step": [], "recorded step": [], "update": []}
        above, recorded = [0.0], [0.0]
        for turn in range(2 * (2 + rounds)):
            recording = topology.next_update == topology.steps + 1
            torch.cuda.reset_peak_memory_stats()
            seconds["recorded step" if recording else "step"].append(timed(run.step))
            recorded.append((torch.cuda.max_memory_allocated() / MIB - run.peak) * recording)
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            taken = timed(topology.step)
            if recording:
                seconds["update"].append(taken)
                above.append((torch.cuda.max_memory_allocated() - held) / MIB)
            if turn == 3:  # the first ones compile
                for each in seconds.values():
                    each.clear()
        step, with_recording, update = (statistics.median(each) * 1e3 for each in seconds.values())
        print(
            f"{f'density {density}':20} {update:9.1f} {max(seconds['update']) * 1e3:9.1f} {step:9.1f} {with_recording:9.1f} "
            f"{max(above):9.1f} {max(recorded):9.1f}",
            flush=True,
        )
        topology.detach()


def timed(task: Callable[[], object]) -> float:
    """Returns the seconds from an idle GPU to an idle GPU."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    task()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def compile_section(rounds: int) -> None:
    """Prints the time of a step of DeiT-Small whose blocks are compiled one by one, packed and dense, beside eager twins."""
    start = time.perf_counter()
    runs, compiled = (
        {kind: Run(*small, 128, compiled=compiles) for kind, small in DEIT_SMALL.items()} for compiles in (False, True)
    )
    tasks = {kind: run.step for kind, run in runs.items()}
    print_twins("compiled blocks", tasks, {kind: run.step for kind, run in compiled.items()}, rounds)
    print(f"compiling and timing took {time.perf_counter() - start:.0f} s")
    for kind in runs:
        print(f"loss, {kind}: compiled {compiled[kind].loss().item():.4f}, eager {runs[kind].loss().item():.4f}")


def graph_section(rounds: int) -> None:
    """Prints the time of a step that replays a CUDA graph, beside its eager twin, and the graph's loss after an update."""
    for name, batch_size in GRAPHS:
        densities = {"packed": 0.3, "dense": 1.0}
        runs = {kind: Run(name, density, batch_size) for kind, density in densities.items()}
        graphed = {kind: GraphedRun(name, density, batch_size) for kind, density in densities.items()}
        tasks = {kind: run.step for kind, run in runs.items()}
        twins = {kind: run.step_graphed for kind, run in graphed.items()}
        print_twins(f"graph, {name[:10]}, {batch_size}", tasks, twins, rounds)
        run = graphed["packed"]
        topology = attach(run.model, run.optimizer, total_steps=100, update_every=1)
        run.step()
        update = topology.step()
        topology.detach()
        assert update is not None, "each step has an update"
        run.graph.replay()
        print(f"loss after an update: graph {run.graph_loss.item():.6f}, eager {run.loss().item():.6f}")


def product_section(rounds: int) -> None:
    """Prints the times of the three products with blocks beside dense ones, in bf16, for a batch of 128, and their speed."""
    header = " ".join(f"{f'{kind}, ms':>8} {'/ dense':>8}" for kind in ("y", "dx", "dw"))
    print(f"\n{'products':28} {header} {'TFLOP/s':>8}")
    for (name, shape), block, density in product(PRODUCTS.items(), BLOCKS, BLOCK_DENSITIES):
        grid = BlockGrid(torch.Size(shape), block)
        tasks, flops = product_tasks(grid, round(density * grid.num_blocks))
        seconds = alternate({kind: ten_times(task) for kind, task in tasks.items()}, rounds, "cuda")
        times = {kind: statistics.median(seconds[kind]) / 10 for kind in ("y", "dx", "dw")}
        row = " ".join(
            f"{time * 1e3:8.3f} {ratio(seconds[kind], seconds[f'dense {kind}']):8.3f}" for kind, time in times.items()
        )
        print(f"{f'{name}, {block}, {density}':28} {row} {flops / sum(times.values()) / 1e12:8.0f}", flush=True)


def product_tasks(grid: BlockGrid, num_active: int) -> tuple[dict[str, Callable[[], object]], int]:
    """Returns the products of a weight of random blocks, and of a dense one, and the operations of the former."""
    tokens, (rows, columns), (height, width) = 128 * 197, grid.shape, grid.block
    order = torch.randperm(grid.num_blocks, generator=torch.Generator().manual_seed(0), device="cpu")
    mask = bits.pack(order < num_active).cuda()

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    x, grad, bias = draw(tokens, columns), draw(tokens, rows), draw(rows)
    dense, values = draw(rows, columns), draw(num_active, width, height)
    tasks: dict[str, Callable[[], object]] = {
        "y": lambda: block_products.product(x, values, mask, bias, grid.shape),
        "dx": lambda: block_products.transposed_product(grad, values, mask, grid.shape),
        "dw": lambda: block_products.active_gradient(grad, x, mask, values.shape),
        "dense y": lambda: F.linear(x, dense, bias),
        "dense dx": lambda: grad @ dense,
        "dense dw": lambda: grad.t() @ x,
    }
    return tasks, 3 * 2 * tokens * values.numel()


def ten_times(task: Callable[[], object]) -> Callable[[], None]:
    """Returns a task of ten in a row, in which the GPU needn't wait for the host."""

    def tasks() -> None:
        for _ in range(10):
            task()

    return tasks


def block_section(rounds: int) -> None:
    """Prints time and peak memory of a step of DeiT-Base in blocks, eager and compiled, beside a compiled dense twin."""
    print(
        f"\n{'step, batch 128':28} {'eager ms':>9} {'compiled':>9} {'dense ms':>9} {'ratio':>6} "
        f"{'MiB':>7} {'dense':>7} {'ratio':>6}"
    )
    name = "deit_base_patch16_224"
    dense = Run(name, 1.0, 128, compiled=True)
    for block, density in product(STEP_BLOCKS, BLOCK_DENSITIES):
        eager, compiled = (Run(name, density, 128, block, compiled) for compiled in (False, True))
        seconds = alternate({"eager": eager.step, "compiled": compiled.step, "dense": dense.step}, rounds, "cuda")
        times = " ".join(f"{statistics.median(each) * 1e3:9.2f}" for each in seconds.values())
        print(
            f"{f'{block}, density {density}':28} {times} {ratio(seconds['compiled'], seconds['dense']):6.3f} "
            f"{compiled.peak:7.0f} {dense.peak:7.0f} {compiled.peak / dense.peak:6.3f}",
            flush=True,
        )
        del eager, compiled


def print_twins(
    name: str, tasks: Mapping[str, Callable[[], None]], twins: Mapping[str, Callable[[], None]], rounds: int
) -> None:
    """Times packed and dense steps, and those of their twins, in turns."""
    seconds = alternate({**tasks, **{f"{kind} twin": task for kind, task in twins.items()}}, rounds, "cuda")
    times = {kind: statistics.median(each) * 1e3 for kind, each in seconds.items()}
    print(f"\n{name:24} {'ms':>8} {'eager ms':>9} {'ratio':>6}")
    for kind in tasks:
        gain = ratio(seconds[f"{kind} twin"], seconds[kind])
        print(f"{kind:24} {times[f'{kind} twin']:8.2f} {times[kind]:9.2f} {gain:6.3f}")
    relative = [ratio(seconds[f"packed{which}"], seconds[f"dense{which}"]) for which in ("", " twin")]
    print(f"{'packed / dense':24} {relative[1]:8.3f} {relative[0]:9.3f}")


SECTIONS = {
    "kernels": kernel_section,
    "selection": selection_section,
    "steps": step_section,
    "update": update_section,
    "compile": compile_section,
    "graph": graph_section,
    "products": product_section,
    "blocks": block_section,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=15, help="measured steps of each kind")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as torchrun has it
    print(describe_machine())
    for section in arguments.sections:
        SECTIONS[section](arguments.rounds)


if __name__ == "__main__":
    main()
