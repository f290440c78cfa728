"""The averages and times of a line of metrics, over all ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from svite_scale.cost.flops import LayerCost, ModelCost
from svite_scale.data.loader import Batch
from svite_scale.engines.backend import StepResult
from svite_scale.train import metrics
from svite_scale.train.metrics import MetricsAverage, flops_per_second, peak_memory
from tests.ranks import run_on_ranks
from tests.runs import metrics_of


def averages(micro_batches: list[list[tuple[float, list[int]]]]) -> list[dict[str, float]]:
    """Returns the averages and counts of two steps each, twice. A micro-batch is (loss, labels); class 1 is always guessed."""
    average = MetricsAverage(torch.device("cpu"))
    found = []
    for first in (0, 2):
        for step in micro_batches[dist.get_rank()][first : first + 2]:
            loss, labels = step
            # Samples of class 2 count as damaged.
            batch = Batch(torch.empty(0), torch.tensor(labels), torch.ones(4, dtype=torch.bool), torch.tensor(labels) == 2)
            average.add(torch.tensor(loss), torch.tensor(0.0), torch.tensor([[0.0, 1.0, 0.5]] * len(labels)), batch)
            average.end_step(StepResult(torch.tensor(loss * 10) if first else None, applied=True))
        found.append({**average.reduce(global_batch_size=8), "samples": average.samples, "damaged": average.damaged})
        average.restart()
    return found


def test_metrics_average_weighs_all_samples_of_all_ranks_alike() -> None:
    ours = [(1.0, [1, 1, 0, 2]), (2.0, [0, 0, 0, 1]), (3.0, [1, 1, 1, 1]), (4.0, [2, 2, 2, 2])]
    theirs = [(3.0, [0, 0, 1, 1]), (6.0, [0, 0, 0, 0]), (1.0, [1, 0, 1, 0]), (0.0, [1, 1, 2, 1])]
    for first, second in run_on_ranks(2, averages, [ours, theirs]):
        assert (first["loss"], first["accuracy"]) == ((1 + 2 + 3 + 6) / 4, 5 / 16)
        assert (second["loss"], second["accuracy"]) == ((3 + 4 + 1 + 0) / 4, 9 / 16)
        assert (first["samples"], first["damaged"]) == (16, 1)
        assert (second["samples"], second["damaged"]) == (16, 5)
        assert "grad_norm" not in first
    assert second["grad_norm"] == 0.0


def test_metrics_average_leaves_skipped_steps_out() -> None:
    for skipped, nothing in run_on_ranks(2, averages_with_skipped_steps):
        assert (skipped["loss"], skipped["accuracy"], skipped["grad_norm"]) == (2.0, 1.0, 7.0)
        assert nothing.keys() == {"samples_per_second", "step_seconds", "data_wait", "peak_memory_bytes"}


def averages_with_skipped_steps() -> list[dict[str, float]]:
    """One of an applied step between two skipped ones, and one of a skipped step."""
    average = MetricsAverage(torch.device("cpu"))
    batch = Batch(torch.empty(0), torch.tensor([1]), torch.ones(1, dtype=torch.bool), torch.zeros(1, dtype=torch.bool))
    found = []
    for losses in ((torch.nan, 2.0, torch.inf), (torch.nan,)):
        for loss in losses:
            average.add(torch.tensor(loss), torch.tensor(0.0), torch.tensor([[0.0, loss]]), batch)
            average.end_step(StepResult(torch.tensor(7.0 if loss == 2 else torch.nan), applied=loss == 2))
        found.append(average.reduce(global_batch_size=2))
        average.restart()
    return found


class Clock:
    """Gives these times, one a call."""

    def __init__(self, *times: float) -> None:
        self._times = iter(times)

    def perf_counter(self) -> float:
        return next(self._times)


def times_of_two_steps() -> dict[str, float]:
    """Two steps in 8 seconds, of which rank 0 waits 1 + 2 for data, and rank 1 waits 0 + 4. Rank 1 holds more memory."""
    rank = dist.get_rank()
    waits = ((2, 3, 5, 7), (4, 4, 6, 10))[rank]
    clock, memory = Clock(0, 1, *waits, 9), 10**12 + rank
    with patch.object(metrics, "time", clock), patch.object(metrics, "peak_memory", lambda device: memory):
        average = MetricsAverage(torch.device("cpu"))
        average.restart()
        for _ in range(2):
            with average.waiting_for_data():
                pass
            average.end_step(StepResult(None, applied=True))
        return average.reduce(global_batch_size=12)


def test_metrics_average_gives_the_longest_wait_and_the_largest_memory_of_all_ranks() -> None:
    for found in run_on_ranks(2, times_of_two_steps):
        assert found == {"samples_per_second": 3.0, "step_seconds": 4.0, "data_wait": 0.5, "peak_memory_bytes": 10**12 + 1}


def test_peak_memory_is_the_largest_resident_size_of_the_process_on_the_cpu() -> None:
    text = Path("/proc/self/status").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("VmHWM:"))
    assert peak_memory(torch.device("cpu")) == pytest.approx(1024 * int(line.split()[1]), rel=0.05)


def test_flops_per_second_counts_six_operations_for_each_multiply_accumulate_of_a_sample() -> None:
    layers = (LayerCost("a", 100, 30, 30), LayerCost("b", 50, 10, 50))
    cost = ModelCost(layers, params_dense=1, params_active=1, device_type="cpu")
    assert flops_per_second(cost, 10.0) == {"flops_per_second": 4800.0, "dense_flops_per_second": 9000.0}


def test_a_run_writes_how_fast_it_is_and_what_it_holds(saved: Callable[[str], Path]) -> None:
    for line in metrics_of(saved("single")):
        assert line["samples_per_second"] == pytest.approx(12 / line["step_seconds"])
        assert 0 < line["data_wait"] < 1
        assert line["peak_memory_bytes"] > 10**7
        # 4 patches and a class token; 2 blocks of width 32, with neurons of 4 times as many; 10 classes.
        block = 5 * 32 * (96 + 32 + 2 * 128) + 2 * 5 * 5 * 32
        dense_macs = 4 * 16 * 32 + 2 * block + 10 * 32
        assert line["dense_flops_per_second"] == pytest.approx(6 * dense_macs * line["samples_per_second"])
        assert 0.3 < line["flops_per_second"] / line["dense_flops_per_second"] < 0.9
    for line in metrics_of(saved("blocks")):
        # Half of the blocks are active; the head and attention's products are whole.
        multiplied = (dense_macs + 10 * 32 + 2 * 2 * 5 * 5 * 32) / 2
        assert line["flops_per_second"] == pytest.approx(6 * multiplied * line["samples_per_second"])
