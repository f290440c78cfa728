"""``launch/evaluate.py --run`` on one process and on two: the run's own numbers, and those by hand."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from svite_scale.data.loader import EvalData
from svite_scale.data.transforms import DeviceTransform
from svite_scale.evaluation.labels import Labels
from svite_scale.evaluation.picture import draw_confusion
from svite_scale.evaluation.results import Results, calibration_error, collect_results
from svite_scale.evaluation.subject import place
from svite_scale.runtime.world import World
from svite_scale.saved_run import load_model, read_run
from svite_scale.train.evaluate import score
from tests.command_line import ROOT, Answer, run_command, run_here
from tests.evaluation.by_hand import logits_of, numbers
from tests.ranks import free_port, run_on_ranks
from tests.runs import ENGINES, metrics_of, run
from tests.tiny import NUM_VAL, tiny_config

SCRIPT = ROOT / "launch" / "evaluate.py"
NUMBERS = ("accuracy", "top5", "loss", "damaged")
Saved = Callable[[str], Path]


def evaluate_here(capsys: pytest.CaptureFixture[str], *arguments: object) -> Answer:
    return run_here(capsys, *map(str, arguments), script=SCRIPT)


def found_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text())


def own_evaluation(run_dir: Path, prefix: str = "eval_") -> dict[str, float]:
    """The last evaluation of a run, as it says."""
    last = metrics_of(run_dir)[-1]
    return {name: last[prefix + name] for name in NUMBERS}


@pytest.mark.parametrize("ema", [False, True])
def test_evaluate_gives_the_runs_own_last_evaluation(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str], ema: bool
) -> None:
    """The last word is what the deepspeed launcher adds."""
    run_dir, out = saved("weights"), tmp_path / "out"
    answer = evaluate_here(capsys, "--run", run_dir, *(["--ema"] if ema else []), "--out", out, "--local_rank=0")
    assert answer.status == 0, answer.err
    found = found_in(out)
    assert json.loads(answer.out) == found
    assert {name: found[name] for name in NUMBERS} == pytest.approx(
        own_evaluation(run_dir, "eval_ema_" if ema else "eval_"), abs=1e-6
    )
    assert (found["samples"], found["step"], found["ema"]) == (NUM_VAL, 16, ema)
    assert (found["run"], found["checkpoint"]) == (str(run_dir), "step-00000016")
    manifest = run_dir / "checkpoints" / "step-00000016" / "manifest.json"
    assert found["checkpoint_digest"] == hashlib.sha256(manifest.read_bytes()).hexdigest()
    assert found["samples_per_second"] > 0


def test_two_ranks_evaluate_a_run_of_sharded_units_and_tokens(saved: Saved, tmp_path: Path) -> None:
    run_dir, out = saved("tokens"), tmp_path / "out"
    launcher = ("torchrun", "--nproc-per-node", "2", "--master-port", str(free_port()), "--")
    answer = run_command(*launcher, "launch/evaluate.py", "--run", str(run_dir), "--out", str(out))
    assert answer.status == 0, answer.err
    assert json.loads(answer.out) == found_in(out), "one rank prints"
    assert {name: found_in(out)[name] for name in NUMBERS} == pytest.approx(own_evaluation(run_dir), abs=1e-6)
    assert (found_in(out)["world_size"], found_in(out)["samples"]) == (2, NUM_VAL)


@pytest.mark.parametrize(("engine", "world_size", "parameters"), [("single", 1, torch.float32), ("fsdp2", 2, torch.bfloat16)])
def test_evaluate_computes_in_bf16_as_the_run_did(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], engine: str, world_size: int, parameters: torch.dtype
) -> None:
    """One process computes under autocast, FSDP2 with parameters in bf16. The order of sums in bf16 isn't fixed: so 1e-3."""
    run_dir, out = tmp_path / "run", tmp_path / "out"
    config = tiny_config(
        digits, run_dir, *ENGINES[engine], "train.precision=bf16", "train.epochs=1", "sparsity.tokens.keep=0.6"
    )
    run_on_ranks(world_size, run, config)
    answer = evaluate_here(capsys, "--run", run_dir, "--out", out)
    assert answer.status == 0, answer.err
    assert found_in(out)["loss"] == pytest.approx(own_evaluation(run_dir)["loss"], abs=1e-3)
    saved_run = read_run(run_dir)
    model = load_model(saved_run)
    logits = place(model, saved_run.config, torch.device("cpu"))(torch.zeros(1, 1, 8, 8))
    assert (logits.dtype, model.head.bias.dtype) == (torch.bfloat16, parameters)


def test_evaluation_with_other_options_leaves_the_runs_own_alone(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = shutil.copytree(saved("weights"), tmp_path / "run")
    assert evaluate_here(capsys, "--run", run_dir, "train.eval_batch_size=7").status == 0
    assert [path.name for path in (run_dir / "evaluation").iterdir()] == ["step-00000016-other"]


def test_folder_that_cannot_be_written_is_refused_before_the_evaluation(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    answer = evaluate_here(capsys, "--run", saved("weights"), "--out", tmp_path / "file" / "out")
    assert answer.status == 1
    assert f"can't write to {tmp_path / 'file' / 'out'} (" in answer.err
    assert "give --out a folder that can be written" in answer.err
    assert "samples" not in answer.out + answer.err


def test_all_numbers_are_those_by_hand(saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, out = saved("weights"), tmp_path / "out"
    evaluate_here(capsys, "--run", run_dir, "--out", out, "train.eval_batch_size=7")
    logits, labels = logits_of(load_model(read_run(run_dir)), run_dir.parent / "digits")
    found = found_in(out)
    expected = numbers(logits, [{label} for label in labels])
    assert 0.01 < expected["calibration_error"] < 0.99
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-5)

    guesses = [max(range(10), key=row.__getitem__) for row in logits]
    per_class = json.loads((out / "per_class.json").read_text())
    for label, entry in enumerate(per_class):
        own = [guess for guess, truth in zip(guesses, labels, strict=True) if truth == label]
        accuracy = sum(guess == label for guess in own) / len(own)
        assert entry == {
            "label": label,
            "name": None,
            "samples": len(own),
            "accuracy": pytest.approx(accuracy),
            "guesses": guesses.count(label),
        }
    with (out / "per_class.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["label"]), float(row["accuracy"])) for row in rows] == [
        (entry["label"], pytest.approx(entry["accuracy"])) for entry in per_class
    ]
    with Image.open(out / "confusion.png") as picture:
        assert min(picture.size) > 300


def collected(run_dir: Path, world_size: int) -> Results:
    """The results on this rank of so many. A collective."""
    run, world = read_run(run_dir), World.from_environment()
    config = run.config
    data, device = EvalData(config.data, image_shape=(1, 8, 8), batch_size=3, world=world), torch.device("cpu")
    assert world.size == world_size
    transform = DeviceTransform(config.data, 10, device, training=False)
    return collect_results(load_model(run), data, transform, Labels(10), device, is_main=False)


def test_results_are_the_same_on_any_number_of_ranks(saved: Saved) -> None:
    """37 samples in batches of 3: the last batch of three ranks is part padding."""
    run_dir = saved("weights")
    (alone,), *others = ([*run_on_ranks(size, collected, run_dir, size)] for size in (1, 3))
    assert len(alone.labels) == NUM_VAL
    for results in others[0]:
        for name in ("labels", "guesses", "in_top5"):
            np.testing.assert_array_equal(getattr(results, name), getattr(alone, name), err_msg=name)
        np.testing.assert_allclose(results.losses, alone.losses, atol=1e-6)


def test_score_adds_the_probabilities_of_all_accepted_labels() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0, -1.0, -2.0], [1.0, 3.0, 2.0, 0.0, -1.0, -2.0]])
    accepted = torch.tensor([[True, False, True, False, False, False], [False] * 5 + [True]])
    scores = score(logits, accepted)
    probabilities = torch.tensor([1.0, 3.0, 2.0, 0.0, -1.0, -2.0], dtype=torch.float64).softmax(0)
    expected = [-float(torch.log(probabilities[0] + probabilities[2])), -float(torch.log(probabilities[5]))]
    assert scores.loss.tolist() == pytest.approx(expected, abs=1e-6)
    assert scores.guess.tolist() == [1, 1]
    assert scores.top1.tolist() == [False, False]
    assert scores.top5.tolist() == [True, False]


def test_calibration_error_is_zero_only_if_confidence_is_accuracy() -> None:
    confidences = np.array([0.5, 0.5, 1.0, 1.0])
    assert calibration_error(confidences, np.array([True, False, True, True])) == 0.0
    assert calibration_error(confidences, np.array([True, True, True, True])) == pytest.approx(0.25)
    assert calibration_error(np.zeros(2), np.array([True, False])) == pytest.approx(0.5)


def test_numbers_of_a_diverged_model_are_null() -> None:
    nan = np.full(2, np.nan)
    summary = Results(
        np.zeros(2, int), np.zeros(2, int), np.ones(2, bool), nan, nan, num_labels=3, damaged=0, left_out=0
    ).summary()
    assert (summary["loss"], summary["calibration_error"], summary["accuracy"]) == (None, None, 1.0)


def test_confusion_counts_samples_by_label_and_guess() -> None:
    labels, guesses = np.array([0, 0, 2, 1, 0]), np.array([0, 1, 2, 2, 1])
    results = Results(labels, guesses, labels == guesses, np.zeros(5), np.ones(5), num_labels=4, damaged=0, left_out=0)
    assert results.confusion().tolist() == [[1, 2, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    absent = results.per_class(["a", "b", "c", "d"])[3]
    assert absent == {"label": 3, "name": "d", "samples": 0, "accuracy": None, "guesses": 0}


@pytest.mark.parametrize("num_labels", [2, 30, 1000])
def test_confusion_picture_is_a_png_for_few_and_for_many_labels(num_labels: int) -> None:
    counts = np.diag(np.arange(num_labels))
    assert draw_confusion(counts, [f"class {label}" for label in range(num_labels)]).startswith(b"\x89PNG")


MISTAKES = {
    "another model": (["model.depth=3"], 2, "config error: model.depth = '3': belongs to the trained weights, so an evalu"),
    "no such checkpoint": (["--checkpoint", "step-1"], 1, "error on rank 0: .* holds no checkpoint 'step-1'; give"),
    "no average": (["--ema"], 1, r"error on rank 0: .* has no moving average \(train.ema_decay is null\); leave out --ema"),
    "no data": (["data.val=nothing-*.tar"], 1, "error on rank 0: data.val = 'nothing-.*.tar': no shard matches"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistakes_end_with_one_line(saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    arguments, status, message = MISTAKES[kind]
    answer = evaluate_here(capsys, "--run", saved("single"), "--out", tmp_path / "out", *arguments)
    assert (answer.status, answer.out) == (status, "")
    lines = answer.err.strip().splitlines()
    assert len(lines) == 1, answer.err
    assert re.match(message, lines[0]), lines[0]
    assert not (tmp_path / "out").exists()


def test_a_command_in_the_runs_config_is_not_run(saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same command as an argument is the user's own, so it is: it fails for want of an index, not of trust."""
    run_dir, command = shutil.copytree(saved("single"), tmp_path / "run"), f"pipe:touch {tmp_path}/proof; cat val.tar"
    config = run_dir / "config.yaml"
    config.write_text(re.sub("( val: ).*", rf"\1'{command}'", config.read_text()))
    answer = evaluate_here(capsys, "--run", run_dir)
    assert answer.status == 1
    assert f"data.val = '{command}' is a command, and commands in a run directory are not run" in answer.err
    assert not (tmp_path / "proof").exists()
    evaluate_here(capsys, "--run", run_dir, f"data.val={command}", "data.fetch_attempts=1")
    assert (tmp_path / "proof").exists()
