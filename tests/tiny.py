"""A run that takes a second: real 8 x 8 digits in shards, and a ViT of 2 blocks of width 32."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import yaml
from PIL import Image
from sklearn.datasets import load_digits

from svite_scale.config.load import read_config
from svite_scale.config.schema import Config
from svite_scale.data.make.shards import Sample, write_shards

NUM_TRAIN, NUM_VAL = 64, 37
"""Nothing divides the second."""


def write_digits(directory: Path) -> Path:
    """Writes ``train-*.tar`` and ``val-*.tar`` into the directory, and returns it."""
    digits = load_digits()
    samples = [
        Sample(f"digit-{number:03d}", png(image), "png", int(label))
        for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True))
    ]
    write_shards(samples[:NUM_TRAIN], directory, "train", 24)
    write_shards(samples[NUM_TRAIN : NUM_TRAIN + NUM_VAL], directory, "val", 16)
    return directory


def png(image: object) -> bytes:
    """An 8 x 8 array of 0 to 16 as a grey PNG."""
    content = BytesIO()
    Image.fromarray((image * 15.9).astype("uint8")).save(content, "png")  # type: ignore[operator]
    return content.getvalue()


def config_text(shards: Path, run_dir: Path) -> str:
    """YAML of 16 steps in 4 epochs, whose topology moves after steps 4, 8 and 12."""
    return yaml.safe_dump(
        {
            "run_dir": str(run_dir),
            "seed": 5,
            "model": {
                "name": "vit_tiny_patch16_224",
                "num_classes": 10,
                "image_size": 8,
                "in_channels": 1,
                "patch_size": 4,
                "embed_dim": 32,
                "depth": 2,
                "num_heads": 2,
            },
            "sparsity": {"density": 0.6, "update_every": 4},
            "data": {
                "train": f"{shards}/train-*.tar",
                "val": f"{shards}/val-*.tar",
                "workers": 0,
                "mean": [0.3],
                "std": [0.35],
                "eval_crop": 1.0,
            },
            "optimizer": {"lr": 2e-2, "warmup_epochs": 1},
            "train": {"epochs": 4, "global_batch_size": 16, "log_every": 1, "eval_batch_size": 10, "clip_grad_norm": 1.0},
            "tracking": {"mlflow": False},
        }
    )


def write_config_file(shards: Path, run_dir: Path, path: Path) -> Path:
    path.write_text(config_text(shards, run_dir))
    return path


def tiny_config(shards: Path, run_dir: Path, *overrides: str) -> Config:
    """The same as a Config; the file is written beside the run directory."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    path = write_config_file(shards, run_dir, run_dir.with_suffix(".yaml"))
    return read_config(path, overrides)
