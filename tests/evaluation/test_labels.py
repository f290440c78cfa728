"""Labels of other files than the shards: several per sample, and those that a model's classes stand for."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.data.real_labels import RealLabelsImagenet

from svite_scale.data.format.patterns import load_indexes
from svite_scale.errors import DataError
from svite_scale.evaluation.labels import NO_LABEL, Labels, labels_of_samples, read_label_map
from svite_scale.saved_run import load_model, read_run
from svite_scale.train.evaluate import score
from tests.evaluation.by_hand import logits_of, numbers
from tests.evaluation.test_evaluate_run import evaluate_here, found_in
from tests.tiny import NUM_VAL

OF_TIMM = Path(timm.__file__).parent / "data" / "_info"
"""timm's copies of ImageNet-ReaL's real.json and of ImageNet-R's classes."""

Saved = Callable[[str], Path]
Logits = tuple[Path, list[list[float]], list[int]]


@pytest.fixture(scope="module")
def by_hand(saved: Saved) -> Logits:
    """A run, and the logits and labels of its evaluation samples."""
    run_dir = saved("weights")
    return run_dir, *logits_of(load_model(read_run(run_dir)), run_dir.parent / "digits")


def test_several_labels_a_sample_give_the_numbers_by_hand(
    by_hand: Logits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the name of the image, in any order; every fifth sample has no label, and isn't counted."""
    run_dir, logits, labels = by_hand
    keys = [key for index in load_indexes(f"{run_dir.parent}/digits/val-*.tar") for key in index.keys]
    accepted = [[] if number % 5 == 0 else [label, (label + number) % 10] for number, label in enumerate(labels)]
    entries = [(f"{key}.png", own) for key, own in zip(keys, accepted, strict=True)]
    random.Random(0).shuffle(entries)
    (tmp_path / "labels.json").write_text(json.dumps(dict(entries)))
    answer = evaluate_here(capsys, "--run", run_dir, "--labels", tmp_path / "labels.json", "--out", tmp_path / "out")
    assert answer.status == 0, answer.err
    counted = [number for number, own in enumerate(accepted) if own]
    expected = numbers([logits[number] for number in counted], [set(accepted[number]) for number in counted])
    found = found_in(tmp_path / "out")
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert (found["samples"], found["left_out"]) == (len(counted), NUM_VAL - len(counted))
    assert found["labels"] == str(tmp_path / "labels.json")
    per_class = json.loads((tmp_path / "out" / "per_class.json").read_text())
    guesses = [max(range(10), key=logits[number].__getitem__) for number in counted]
    attributed = [
        guess if guess in accepted[number] else min(accepted[number]) for guess, number in zip(guesses, counted, strict=True)
    ]
    assert [entry["samples"] for entry in per_class] == np.bincount(attributed, minlength=10).tolist()


MAPS: dict[str, tuple[str, dict[int, list[int]]]] = {
    "two classes a label": (json.dumps([0, 1, 2, 3, 4, 0, 1, 2, 3, 4]), {label: [label, label + 5] for label in range(5)}),
    "a label without a class": (json.dumps([None, 1, None, None, 4, *5 * [None]]), {1: [1], 4: [4]}),
    "lines of classes": ("1\n0\n7\n", {0: [1], 1: [0], 2: [7]}),
}


@pytest.mark.parametrize("kind", MAPS)
def test_label_map_gives_the_numbers_by_hand(
    by_hand: Logits, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """A label has the highest logit of its classes. Samples of other labels aren't counted."""
    run_dir, logits, labels = by_hand
    text, classes = MAPS[kind]
    (tmp_path / "map").write_text(text)
    answer = evaluate_here(capsys, "--run", run_dir, "--label-map", tmp_path / "map", "--out", tmp_path / "out")
    assert answer.status == 0, answer.err
    known = sorted(classes)
    counted = [number for number, label in enumerate(labels) if label in classes]
    mapped = [[max(logits[number][each] for each in classes[label]) for label in known] for number in counted]
    expected = numbers(mapped, [{known.index(labels[number])} for number in counted])
    found = found_in(tmp_path / "out")
    assert 0 < expected["samples"] < NUM_VAL
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert found["left_out"] == NUM_VAL - len(counted)


def test_real_json_gives_what_timm_computes_with_it() -> None:
    """300 of the 50,000 images, in another order, named as launch/make_shards.py names them."""
    chosen = random.Random(1).sample(range(50_000), 300)
    names = [f"ILSVRC2012_val_{number + 1:08d}" for number in chosen]
    keys = [f"{position:08d}-{name}" for position, name in enumerate(names)]
    labels = Labels(1000, of_sample=labels_of_samples(OF_TIMM / "imagenet_real_labels.json", keys, 1000))
    logits = torch.randn(300, 1000, generator=torch.Generator().manual_seed(0))
    accepted = labels.accepted(torch.arange(300), torch.zeros(300))
    for row in range(0, 300, 2):  # so that every second image is right
        logits[row, accepted[row]] += 5.0
    scores, counted = score(logits, accepted), accepted.any(dim=1)
    assert 0 < counted.sum() < 300

    timms = RealLabelsImagenet([f"{name}.JPEG" for name in names] + 49_700 * ["unused"])
    timms.add_result(logits)
    found = {1: scores.top1[counted].double().mean() * 100, 5: scores.top5[counted].double().mean() * 100}
    assert {k: float(value) for k, value in found.items()} == pytest.approx(timms.get_accuracy())


def test_timms_file_of_imagenet_r_maps_its_200_classes() -> None:
    labels = read_label_map(OF_TIMM / "imagenet_r_indices.txt", 1000)
    synsets = (OF_TIMM / "imagenet_r_synsets.txt").read_text().split()
    all_synsets = (OF_TIMM / "imagenet_synsets.txt").read_text().split()
    assert {synset: labels[all_synsets.index(synset)].item() for synset in synsets} == {
        synset: label for label, synset in enumerate(synsets)
    }
    assert (labels == NO_LABEL).sum() == 800


BAD_LABELS: dict[str, tuple[Any, str]] = {
    "no entry": ({"a": [1]}, "has no entry for sample '00000001-b'; add one, or an empty list to leave the sample out"),
    "too large": (
        {"a": [1], "b": [10]},
        r"has \[10\] for sample '00000001-b', but labels are whole numbers from 0 to 9",
    ),
    "no label": ({"a": [1], "b": ["x"]}, r"has \['x'\] for sample"),
    "a list without numbers": ([[1], [2]], "is a list, which is matched by names as ILSVRC2012_val_00000001, but a sample is "),
    "a number": (3, "is neither a list nor a mapping"),
}


@pytest.mark.parametrize("kind", BAD_LABELS)
def test_file_of_labels_is_refused_if_it_has_not_labels_for_every_sample(tmp_path: Path, kind: str) -> None:
    content, message = BAD_LABELS[kind]
    (tmp_path / "labels.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"labels.json {message}"):
        labels_of_samples(tmp_path / "labels.json", ["00000000-a", "00000001-b"], 10)


BAD_MAPS = {
    "too short": ("[0, 1]", "has 2 entries for 3 classes; give one per class of the model"),
    "no labels": ("[null, null, null]", "isn't a list of labels"),
    "text": ('[0, "1", 2]', "isn't a list of labels"),
    "a class twice": ("1\n1\n", "is neither a JSON list nor lines of a class of the model each, 0 to 2"),
    "a class too many": ("0\n3\n", "is neither a JSON list nor lines of a class of the model each, 0 to 2"),
    "empty": ("", "is neither a JSON list"),
    "deep": ("[" * 10**5, "is neither a JSON list"),
}


@pytest.mark.parametrize("kind", BAD_MAPS)
def test_label_map_is_refused_if_it_does_not_fit_the_classes(tmp_path: Path, kind: str) -> None:
    text, message = BAD_MAPS[kind]
    (tmp_path / "map").write_text(text)
    with pytest.raises(DataError, match=f"map {message}"):
        read_label_map(tmp_path / "map", 3)
    with pytest.raises(DataError, match="no file can't be read"):
        read_label_map(tmp_path / "no file", 3)
