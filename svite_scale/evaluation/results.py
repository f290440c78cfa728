"""The results of an evaluation sample by sample, and the numbers that they give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from svite_scale.data.loader import EvalData
from svite_scale.data.transforms import DeviceTransform
from svite_scale.errors import DataError
from svite_scale.evaluation.labels import Labels
from svite_scale.tracking.progress import track
from svite_scale.train.evaluate import Forward, evaluated_batches, score

BINS = 15
"""Bins of equal width of the calibration error."""

Column = IntEnum("Column", ["seen", "damaged", "labelled", "label", "guess", "in_top5", "loss", "confidence"], start=0)


@dataclass(frozen=True)
class Results:
    """The results of N samples: all evaluation samples that can be decoded and have a label, in their order.

    Attributes:
        labels: int64 ``[N]``; of several accepted labels, the guess if it is one of them, else the lowest.
        guesses: int64 ``[N]``, the label of the highest logit.
        in_top5: bool ``[N]``, whether an accepted label is among the first five guesses.
        losses: float64 ``[N]``, -log of the probability that the model gives to the accepted labels: the cross entropy of one.
        confidences: float64 ``[N]``, the probability that the model gives to its guess.
        num_labels: L; labels and guesses are below it.
        damaged: number of samples that can't be decoded.
        left_out: number of samples without an accepted label.
    """

    labels: npt.NDArray[np.int64]
    guesses: npt.NDArray[np.int64]
    in_top5: npt.NDArray[np.bool_]
    losses: npt.NDArray[np.float64]
    confidences: npt.NDArray[np.float64]
    num_labels: int
    damaged: int
    left_out: int

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """bool ``[N]``, True where the guess is the label."""
        return self.labels == self.guesses

    def summary(self) -> dict[str, float | None]:
        """Returns the numbers of all samples together; None for a number that isn't finite, as after training has diverged."""
        numbers = {
            "accuracy": float(self.correct.mean()),
            "top5": float(self.in_top5.mean()),
            "loss": float(self.losses.mean()),
            "calibration_error": calibration_error(self.confidences, self.correct),
            "samples": len(self.labels),
            "damaged": self.damaged,
            "left_out": self.left_out,
        }
        return {name: value if math.isfinite(value) else None for name, value in numbers.items()}

    def per_class(self, names: Sequence[str] | None) -> list[dict[str, Any]]:
        """Returns for each label its name (None if ``names`` is), its number of samples, their accuracy (None without samples),
        and how often it is the guess.
        """
        samples, correct, guesses = (
            np.bincount(numbers, minlength=self.num_labels).tolist()
            for numbers in (self.labels, self.labels[self.correct], self.guesses)
        )
        return [
            {
                "label": label,
                "name": None if names is None else names[label],
                "samples": samples[label],
                "accuracy": correct[label] / samples[label] if samples[label] else None,
                "guesses": guesses[label],
            }
            for label in range(self.num_labels)
        ]

    def confusion(self) -> npt.NDArray[np.int64]:
        """Returns the number of samples by label and guess, int64 ``[L, L]``."""
        pairs = self.labels * self.num_labels + self.guesses
        return np.bincount(pairs, minlength=self.num_labels**2).reshape(self.num_labels, self.num_labels)


def calibration_error(confidences: npt.NDArray[np.float64], correct: npt.NDArray[np.bool_]) -> float:
    """Returns the expected calibration error (arXiv:1706.04599), 0 to 1; NaN if a confidence is NaN.

    It is the distance between mean confidence and accuracy within a bin, averaged over bins weighted by their samples. The
    :data:`BINS` bins have equal width; the confidence on a border belongs to the lower bin.

    Args:
        confidences: ``[N]``, in [0, 1].
        correct: ``[N]``.
    """
    if np.isnan(confidences).any():
        return math.nan
    bins = np.ceil(confidences * BINS).clip(1, BINS).astype(np.int64) - 1
    gaps = np.bincount(bins, weights=confidences - correct, minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidences))


def collect_results(
    forward: Forward, data: EvalData, transform: DeviceTransform, labels: Labels, device: torch.device, *, is_main: bool
) -> Results:
    """Evaluates a model on every sample exactly once. A collective: all ranks call it, and all get the results of all samples.

    Args:
        forward: of the model in evaluation mode, of which every rank has a whole copy.
        data: this rank's evaluation samples.
        transform: prepares them on the device.
        labels: of the samples.
        device: of the model.
        is_main: whether this rank shows the progress.

    Raises:
        DataError: the samples can't be read, or too many of them can't be decoded, or none has a label.
    """
    table = torch.zeros(data.num_samples, len(Column), dtype=torch.float64)
    batches = evaluated_batches(forward, data, transform)
    batches = track(batches, "evaluate", len(data.samples), "batches", enabled=is_main)
    for samples, (logits, batch) in zip(torch.from_numpy(data.samples), batches, strict=True):
        rows = rows_of(labels.map_logits(logits), labels.accepted(samples, batch.labels))
        table[samples[batch.valid]] = rows[batch.valid]
        table[samples[batch.damaged], Column.damaged] = 1
    table = table.to(device)
    dist.all_reduce(table)
    columns = table.cpu().numpy().T
    assert (columns[Column.seen] + columns[Column.damaged] == 1).all(), "every sample is evaluated exactly once"
    damaged = int(columns[Column.damaged].sum())
    data.damage.check(damaged, data.num_samples)
    labelled = columns[Column.labelled] == 1
    if not labelled.any():
        raise DataError("no sample has a label that a class of the model stands for; correct --labels or --label-map")
    return Results(
        labels=columns[Column.label, labelled].astype(np.int64),
        guesses=columns[Column.guess, labelled].astype(np.int64),
        in_top5=columns[Column.in_top5, labelled].astype(np.bool_),
        losses=columns[Column.loss, labelled],
        confidences=columns[Column.confidence, labelled],
        num_labels=labels.num_labels,
        damaged=damaged,
        left_out=data.num_samples - damaged - int(labelled.sum()),
    )


def rows_of(logits: Tensor, accepted: Tensor) -> Tensor:
    """Returns the rows of a batch in the table of results, float64 ``[B, columns]`` on the CPU.

    Args:
        logits: fp32 ``[B, L]``.
        accepted: bool ``[B, L]``, the accepted labels of each sample.
    """
    accepted = accepted.to(logits.device)
    scores = score(logits, accepted)
    columns = {
        Column.seen: torch.ones_like(scores.guess),
        Column.damaged: torch.zeros_like(scores.guess),
        Column.labelled: accepted.any(dim=1),
        Column.label: torch.where(scores.top1, scores.guess, accepted.byte().argmax(dim=1)),
        Column.guess: scores.guess,
        Column.in_top5: scores.top5,
        Column.loss: scores.loss,
        Column.confidence: logits.softmax(dim=1).gather(1, scores.guess.unsqueeze(1))[:, 0],
    }
    return torch.stack([columns[column].double().cpu() for column in Column], dim=1)
