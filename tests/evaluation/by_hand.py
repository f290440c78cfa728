"""An evaluation by hand: one sample at a time, and every number by its definition in plain Python."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from webdataset import WebDataset

MEAN, STD = 0.3, 0.35
"""Of the tiny runs."""


def logits_of(model: nn.Module, shards: Path) -> tuple[list[list[float]], list[int]]:
    """The logits in double precision, and the labels, of the samples in ``val-*.tar``."""
    model.double().eval()
    tars = sorted(str(path) for path in shards.glob("val-*.tar"))
    logits, labels = [], []
    for sample in DataLoader(WebDataset(tars, shardshuffle=False).decode("pil"), batch_size=None):
        image: Image.Image = sample["png"].convert("L")
        pixels = torch.tensor(np.asarray(image), dtype=torch.float64).view(1, 1, 8, 8)
        with torch.no_grad():
            logits.append(model((pixels / 255 - MEAN) / STD)[0].tolist())
        labels.append(int(sample["cls"]))
    return logits, labels


def softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(logit) for logit in logits]
    return [power / sum(powers) for power in powers]


def numbers(logits: list[list[float]], accepted: list[set[int]]) -> dict[str, float]:
    """Accuracy, top 5, loss and calibration error of samples that each have a set of right answers."""
    correct, top5, losses, confidences = [], [], [], []
    for row, answers in zip(logits, accepted, strict=True):
        ranked = sorted(range(len(row)), key=lambda label: -row[label])
        correct.append(ranked[0] in answers)
        top5.append(bool(answers & set(ranked[:5])))
        losses.append(-math.log(sum(softmax(row)[label] for label in answers)))
        confidences.append(max(softmax(row)))
    error = 0.0
    for number in range(15):
        inside = [index for index, value in enumerate(confidences) if number / 15 < value <= (number + 1) / 15]
        if inside:
            gap = sum(correct[index] for index in inside) - sum(confidences[index] for index in inside)
            error += abs(gap) / len(logits)
    count = len(logits)
    return {
        "accuracy": sum(correct) / count,
        "top5": sum(top5) / count,
        "loss": sum(losses) / count,
        "calibration_error": error,
        "samples": count,
    }
