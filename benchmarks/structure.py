"""Time saved by absent heads, neurons and tokens, beside the multiply-accumulates saved, in training and inference.

    python benchmarks/structure.py [--threads 2] [--batch-size 16] [--rounds 15] [--device cpu]

DeiT-Small at 224 px. The sparse model of a row and its dense twin run alternately in one process, so that other load on the
machine affects both alike. Times are medians; the time saved is 1 minus the median of the ratios of successive runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the helpers beside this file

from benchmarks.machine import describe_machine
from svite_scale.config.schema import Config, SparsityConfig
from svite_scale.evaluation.timing import alternate, ratio
from svite_scale.models.options import ModelConfig, StructuredConfig, TokensConfig
from svite_scale.models.sparse import build_sparse
from svite_scale.models.token_selector import selector_loss, token_selectors
from svite_scale.train.optimizer import build_optimizer
from svite_scale.train.options import OptimizerConfig
from tests.cost.costs import count

MODEL = ModelConfig(name="deit_small_patch16_224")
UNITS = StructuredConfig(heads=0.6, neurons=0.6)
ROWS = {
    "heads and neurons 40%": SparsityConfig(structured=UNITS),
    "tokens 70%": SparsityConfig(tokens=TokensConfig(keep=0.7)),
    "tokens 50%": SparsityConfig(tokens=TokensConfig(keep=0.5)),
    "both, tokens 70%": SparsityConfig(structured=UNITS, tokens=TokensConfig(keep=0.7)),
    "both, tokens 50%": SparsityConfig(structured=UNITS, tokens=TokensConfig(keep=0.5)),
}


class Twin:
    """A model with its optimizer: one of those that are compared."""

    def __init__(self, sparsity: SparsityConfig, device: str, model: ModelConfig = MODEL) -> None:
        self.model = build_sparse(model, sparsity, seed=0)[0].to(device)
        self.optimizer = build_optimizer(self.model, OptimizerConfig())
        self.device = device
        for selector in token_selectors(self.model):
            selector.anneal(0.5)  # as few tokens as in most of training

    def train(self, images: Tensor, labels: Tensor) -> None:
        self.model.train()
        self.optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device == "cuda"):
            loss = F.cross_entropy(self.model(images).float(), labels)
        (loss + selector_loss(self.model, labels)).backward()
        self.optimizer.step()

    def infer(self, images: Tensor) -> None:
        self.model.eval()
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=self.device == "cuda"):
            self.model(images)


def row(name: str, sparsity: SparsityConfig, dense: Twin, arguments: argparse.Namespace) -> None:
    """Times one row, and prints it."""
    twin = Twin(sparsity, arguments.device)
    images = torch.randn(arguments.batch_size, 3, 224, 224, device=arguments.device)
    labels = torch.arange(arguments.batch_size, device=arguments.device)
    saving = count(Config(run_dir="unused", model=MODEL, sparsity=sparsity)).saving
    for what, sparse_task, dense_task in (
        ("training step", lambda: twin.train(images, labels), lambda: dense.train(images, labels)),
        ("inference", lambda: twin.infer(images), lambda: dense.infer(images)),
    ):
        seconds = alternate({"sparse": sparse_task, "dense": dense_task}, arguments.rounds, arguments.device)
        saved = 1 - ratio(seconds["sparse"], seconds["dense"])
        times = " ".join(f"{statistics.median(seconds[kind]) * 1e3:9.1f}" for kind in ("sparse", "dense"))
        print(f"{name:24} {what:14} {times} {saved:10.3f} {saving:10.3f} {saved / saving:8.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{describe_machine()}; {arguments.threads} threads, batch {arguments.batch_size}, on {arguments.device}")
    print(f"\n{'':24} {'':14} {'sparse ms':>9} {'dense ms':>9} {'time saved':>10} {'MACs saved':>10} {'of them':>8}")
    dense = Twin(SparsityConfig(), arguments.device)
    for name in arguments.rows:
        row(name, ROWS[name], dense, arguments)


if __name__ == "__main__":
    main()
