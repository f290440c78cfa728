"""The examples, as a reader runs them: their own launchers, two ranks, real digits."""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.command_line import run_command
from tests.ranks import free_port, run_on_ranks

FOLDER = Path(__file__).parents[2] / "examples"
LAUNCHERS = {
    "plain_fsdp2": "torchrun --nproc-per-node 2 --master-port {port}",
    "plain_deepspeed": "deepspeed --num_gpus 2 --master_port {port}",
    "with_accelerate": "accelerate launch --multi_gpu --num_processes 2 --main_process_port {port}",
}
ENGINES = {
    "plain_fsdp2": "FSDPVisionTransformer",
    "plain_deepspeed": "DeepSpeedEngine, ZeRO stage 3,",
    "with_accelerate": "DistributedDataParallel",
}
EPOCHS, NUM_TEST = 4, 297
UPDATES = [1, 1, 1, 0]
"""By epoch of 23 steps: after steps 20, 40 and 60, and none after four fifths of the 92."""

on_cpus = pytest.mark.skipif(torch.cuda.is_available(), reason="the deepspeed launcher can't hide GPUs from its ranks")
each_example = pytest.mark.parametrize(
    "example", [pytest.param(name, marks=on_cpus) if name == "plain_deepspeed" else name for name in LAUNCHERS]
)


@dataclass(frozen=True)
class Printed:
    """What an example printed.

    Attributes:
        engines: each line that names the engine: its name, the number of ranks, and the kind of device.
        epochs: each epoch's number, loss, topology updates, and weights dropped and regrown.
        accuracies: in percent, and the number of digits.
    """

    engines: list[tuple[str, ...]]
    epochs: list[tuple[float, ...]]
    accuracies: list[tuple[float, ...]]


@lru_cache
def printed(example: str) -> Printed:
    """Runs an example."""
    launcher = LAUNCHERS[example].format(port=free_port()).split()
    answer = run_command(*launcher, f"examples/{example}.py", "--epochs", str(EPOCHS))
    assert answer.status == 0, answer.err

    def found(pattern: str) -> list[tuple[str, ...]]:
        return re.findall(f"^{pattern}$", answer.out, flags=re.MULTILINE)

    number = r"(\d+(?:\.\d+)?)"
    epochs = found(f"epoch {number}: loss {number}, topology updates {number}, dropped {number}, regrown {number}")
    accuracies = found(f"test accuracy {number}% on {number} digits")
    return Printed(found(r"(.+) on (\d+) ranks, (\w+)"), numbers(epochs), numbers(accuracies))


def numbers(lines: list[tuple[str, ...]]) -> list[tuple[float, ...]]:
    return [tuple(map(float, line)) for line in lines]


@each_example
def test_an_example_trains_a_sparse_model_that_recognises_digits(example: str) -> None:
    run = printed(example)
    assert run.engines == [(ENGINES[example], "2", "cpu")], "one rank speaks, and names what it ran on"
    epochs, losses, updates, dropped, regrown = zip(*run.epochs, strict=True)
    assert list(epochs) == list(range(1, EPOCHS + 1))
    assert losses[-1] < 0.4 * losses[0]
    assert list(updates) == UPDATES
    assert dropped[0] > dropped[1] > dropped[2] > dropped[3] == 0, "fewer weights move from update to update"
    assert all(0 < few < all_of_them for few, all_of_them in zip(regrown[:3], dropped[:3], strict=True))
    ((accuracy, num_digits),) = run.accuracies
    assert accuracy > 80
    assert num_digits == NUM_TEST


@on_cpus
def test_fsdp2_and_zero_train_the_same() -> None:
    ours, theirs = printed("plain_fsdp2"), printed("plain_deepspeed")
    for epoch, other in zip(ours.epochs, theirs.epochs, strict=True):
        assert epoch[1] == pytest.approx(other[1], abs=0.02), "loss"
        assert epoch[2:4] == other[2:4], "updates, and weights dropped"
        assert epoch[4] == pytest.approx(other[4], rel=0.05), "weights regrown"


@pytest.mark.parametrize("example", LAUNCHERS)
def test_an_example_has_three_lines_of_ours(example: str) -> None:
    """And a comment over each."""
    source = (FOLDER / f"{example}.py").read_text()
    calls = [(node.lineno, ast.unparse(node.func)) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    ours = sorted((line, name) for line, name in calls if name.startswith(("svite_scale.", "topology.")))
    assert [name for _, name in ours] == ["svite_scale.sparsify", "svite_scale.attach", "topology.step"]
    for number, (line, _) in enumerate(ours, start=1):
        assert f"# svite_scale, {number} of 3: " in source.splitlines()[line - 2]
    assert source.count("svite_scale") == 7, "the import, the docstring, two names, three comments"
    assert source.count("topology") == 2


class GuessesZero(nn.Module):
    """Right about every digit 0; it stands in for a DeepSpeed engine, too."""

    device = torch.device("cpu")

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.one_hot(torch.zeros(len(images), dtype=torch.int64), 10)


def example_module(name: str) -> ModuleType:
    with patch.object(sys, "path", [str(FOLDER), *sys.path]):
        return import_module(name)


def accuracies(labels: list[int]) -> dict[str, float]:
    """By example, the accuracy that its own function finds on this rank."""
    from accelerate import Accelerator

    data = TensorDataset(torch.zeros(len(labels), 1, 8, 8), torch.tensor(labels))
    model, accelerator = GuessesZero(), Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(data, batch_size=2))
    arguments = {
        "plain_fsdp2": (model, data, model.device),
        "plain_deepspeed": (model, data),
        "with_accelerate": (model, loader, accelerator),
    }
    return {name: example_module(name).accuracy(*arguments[name]) for name in LAUNCHERS}


def test_an_accuracy_counts_each_digit_once_on_ranks_with_unequal_shares() -> None:
    """Two of seven; a share over filled-up batches would be one of eighths, over full ones one of sixths."""
    for on_rank in run_on_ranks(2, accuracies, [0, 1, 2, 3, 4, 5, 0]):
        assert on_rank == {name: pytest.approx(2 / 7) for name in LAUNCHERS}
