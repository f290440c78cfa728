"""Evaluation on any number of ranks is a loop over the samples."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from webdataset import WebDataset

from svite_scale.config.schema import Config
from svite_scale.data.format.patterns import load_indexes
from svite_scale.data.loader import EvalData
from svite_scale.data.make.shards import Sample, write_shards
from svite_scale.data.options import DataConfig
from svite_scale.runtime.activity import Activity
from svite_scale.runtime.world import World
from svite_scale.sparsity.layers.packed import PackedLayer
from svite_scale.train.evaluate import evaluate
from svite_scale.train.trainer import Trainer
from tests.ranks import run_on_ranks
from tests.runs import ENGINES
from tests.tiny import NUM_VAL, tiny_config


def evaluated(config: Config, damaged: DataConfig) -> tuple[list[dict[str, float]], bool, dict[str, Tensor], int]:
    """Returns the metrics, twice and on damaged shards, whether the model trains after them, on one process the dense weights,
    and the number of phases that one evaluation enters.
    """
    trainer = Trainer(config, World.from_environment(), torch.device("cpu"), resume=False)
    world = trainer.world
    other = EvalData(damaged, image_shape=(1, 8, 8), batch_size=10, world=world)
    found = [evaluate(trainer.backend, data, trainer.eval_transform) for data in (trainer.eval_data, trainer.eval_data, other)]
    activity = Activity()
    assert evaluate(trainer.backend, trainer.eval_data, trainer.eval_transform, activity) == found[0]
    assert activity.phase == "evaluation"
    dense = dense_weights(trainer) if world.size == 1 else {}
    return found, trainer.backend.wrapped.training, dense, activity.progress


def dense_weights(trainer: Trainer) -> dict[str, Tensor]:
    """The model's state as that of its dense twin."""
    state = {name: value.clone() for name, value in trainer.backend.model.state_dict().items()}
    for name, module in trainer.backend.model.named_modules():
        if isinstance(module, PackedLayer):
            del state[f"{name}.values"], state[f"{name}.mask"]
            state[f"{name}.weight"] = module.dense_weight().clone()
    return state


def naive(shards: Path, weights: dict[str, Tensor]) -> dict[str, float]:
    """One sample at a time, through webdataset and a dense timm model, in double precision."""
    import timm

    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=10, img_size=8, in_chans=1, patch_size=4, embed_dim=32, depth=2, num_heads=2
    )
    model.load_state_dict(weights)
    model.double().eval()
    loss = first = five = count = 0.0
    tars = sorted(str(path) for path in shards.glob("val-*.tar"))
    for sample in DataLoader(WebDataset(tars, shardshuffle=False).decode("pil"), batch_size=None):
        image: Image.Image = sample["png"].convert("L")
        pixels = torch.tensor(np.asarray(image), dtype=torch.float64).view(1, 1, 8, 8)
        with torch.no_grad():
            (logits,) = model((pixels / 255 - 0.3) / 0.35).tolist()
        label = int(sample["cls"])
        loss += math.log(sum(math.exp(logit) for logit in logits)) - logits[label]
        above = sum(logit > logits[label] for logit in logits)
        first, five, count = first + (above < 1), five + (above < 5), count + 1
    assert count == NUM_VAL
    return {"eval_loss": loss / count, "eval_accuracy": first / count, "eval_top5": five / count}


def write_damaged(shards: Path, directory: Path) -> str:
    """The same evaluation samples with broken ones among them, the last one included, which padding repeats."""
    samples = []
    for number, index in enumerate(load_indexes(f"{shards}/val-*.tar")):
        content = index.path.read_bytes()
        for position in range(index.count):
            start = int(index.offsets[position])
            image = content[start : start + int(index.lengths[position])]
            samples.append(Sample(index.key(position), image, "png", int(index.labels[position])))
        samples.append(Sample(f"broken-{number}", b"junk", "png", 3))
    write_shards(samples, directory, "val", 16)
    return f"{directory}/val-*.tar"


def test_evaluate_counts_every_sample_once_on_any_number_of_ranks(tmp_path: Path, digits: Path) -> None:
    """37 samples in batches of 10 per rank: the last batches are part or all padding. Dropping paths is for training only.

    40 samples of which 3 can't be decoded give the same averages, and are counted.
    """
    runs = {1: "single", 2: "fsdp2", 3: "zero3", 4: "ddp"}
    configs = {
        size: tiny_config(digits, tmp_path / str(size), *ENGINES[engine], "model.drop_path=0.5", "train.global_batch_size=12")
        for size, engine in runs.items()
    }
    damaged = replace(configs[1].data, val=write_damaged(digits, tmp_path / "damaged"))
    results = {size: run_on_ranks(size, evaluated, config, damaged) for size, config in configs.items()}
    (alone, _, _), _, weights, _ = results[1][0]
    expected = naive(digits, weights)
    assert 0 < expected["eval_accuracy"] < expected["eval_top5"] < 1
    assert alone == pytest.approx({**expected, "eval_damaged": 0}, rel=1e-5)
    for size, ranks in results.items():
        for (first, second, third), training, _, progress in ranks:
            assert progress == 1 + math.ceil(NUM_VAL / (10 * size)), "each batch is progress, and so is the wait for the first"
            assert first == pytest.approx(alone, abs=1e-6), size
            assert second == first
            assert third == pytest.approx({**alone, "eval_damaged": 3}, abs=1e-6), size
            assert training
