"""``launch/evaluate.py --throughput``: what is timed, and the numbers of its table. torch.compile is left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from svite_scale.evaluation import throughput
from svite_scale.evaluation.subject import subject_of_run
from svite_scale.sparsity.layers.base import SparseLayer
from tests.command_line import run_here
from tests.evaluation.test_evaluate_run import SCRIPT, evaluate_here

Saved = Callable[[str], Path]


def test_throughput_times_dense_sparse_and_sliced_models(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda forward, dynamic: compiled.append(forward) or forward)
    monkeypatch.setattr(throughput, "MOST", 5)
    answer = evaluate_here(capsys, "--run", saved("tokens"), "--throughput", 1, 3, "--out", tmp_path / "out")
    assert answer.status == 0, answer.err
    names = ["dense", "sparse", "sliced", "dense compiled", "sparse compiled", "sliced compiled"]
    assert len(compiled) == 6
    found = json.loads((tmp_path / "out" / "throughput.json").read_text())
    assert [entry["batch"] for entry in found["batches"]] == [1, 3]
    for entry in found["batches"]:
        assert (list(entry["models"]), entry["rounds"]) == (names, 5)
        assert (entry["models"]["dense"]["speedup"], entry["models"]["dense"]["speedup_quartiles"]) == (1, [1, 1])
        for own in entry["models"].values():
            low, high = own["speedup_quartiles"]
            assert 0 < low <= own["speedup"] <= high
    assert [line.split()[:2] for line in answer.out.splitlines()[1:3]] == [["1", "dense"], ["1", "sparse"]]


def test_dense_twin_has_all_tokens_and_the_sliced_model_none_of_our_layers(saved: Saved) -> None:
    subject = subject_of_run(saved("tokens"), None, [], ema=False)
    models = throughput.models_to_time(subject)
    assert list(models) == ["dense", "sparse", "sliced"]
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(models["sliced"](images), models["sparse"](images), atol=1e-5, rtol=0)
    assert not [module for name in ("dense", "sliced") for module in models[name].modules() if isinstance(module, SparseLayer)]
    assert len(models["dense"].blocks) == 2, "no selectors"


def test_compare_takes_ratios_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"dense": [1.0, 2.0, 4.0], "half": [0.5, 1.0, 4.0]}
    monkeypatch.setattr(throughput, "alternate", lambda tasks, rounds, device: times)
    found = throughput.compare({"dense": int, "half": int}, 8, torch.device("cpu"), seconds=0.0)
    assert found["rounds"] == throughput.FEWEST
    assert found["models"]["half"] == {"images_per_second": 8.0, "speedup": 2.0, "speedup_quartiles": [1.5, 2.0]}


MISTAKES = {
    "no images": (("0",), {}, "--throughput = [0]: has a batch size below 1; use at least 1"),
    "two ranks": (
        ("1",),
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"},
        "--throughput = [1]: times one process; start it by plain python",
    ),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_throughput_refuses_no_images_and_several_ranks(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    batches, launcher, message = MISTAKES[kind]
    arguments = ("--run", str(saved("weights")), "--out", str(tmp_path), "--throughput", *batches)
    answer = run_here(capsys, *arguments, launcher=launcher, script=SCRIPT)
    assert (answer.status, answer.out, answer.err) == (2, "", f"config error: {message}\n")
