"""The training loss: cross entropy, and distillation if there is a teacher (DeiT, arXiv:2012.12877, section 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svite_scale.config.schema import Config
from svite_scale.data.options import DataConfig
from svite_scale.models.options import DistillationConfig
from svite_scale.models.teacher import build_teacher, renormalisation
from svite_scale.models.token_selector import selector_loss


def soft_distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Returns the second term of equation 2: T^2 KL(teacher / T || student / T), summed over classes, averaged over samples.

    DeiT's code averages over classes too, which divides this term by the number of classes.

    Args:
        student: logits ``[B, classes]``.
        teacher: logits ``[B, classes]``.
        temperature: T.
    """
    ours, theirs = (F.log_softmax(logits / temperature, dim=1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def hard_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns the second term of equation 3: cross entropy with the teacher's first guess, without label smoothing."""
    return F.cross_entropy(student, teacher.argmax(dim=1))


class Teacher:
    """The teacher's part of the loss. Every rank holds the whole teacher; no engine wraps it, and no checkpoint contains it.

    Raises:
        ConfigError: the teacher can't be built or loaded.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self._options: DistillationConfig = config.distillation
        self._data: DataConfig = config.data
        self._model = build_teacher(config.distillation, config.model).to(device)
        self._factor, self._shift = renormalisation(config.distillation, config.data, device)
        self._bf16 = config.train.precision == "bf16"

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Returns the teacher's logits, fp32 ``[B, classes]``, for images as the student gets them, augmented and mixed."""
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self._bf16):
            return self._model(images * self._factor + self._shift).float()

    def distil(self, loss: Tensor, student: Tensor, images: Tensor) -> Tensor:
        """Returns the mean of the labels' loss and the distillation loss of ``student`` (logits), weighted by ``alpha``."""
        options, teacher = self._options, self.logits(images)
        if options.kind == "hard":
            distilled = hard_distillation(student, teacher)
        else:
            distilled = soft_distillation(student, teacher, options.temperature)
        return (1 - options.alpha) * loss + options.alpha * distilled


class TrainingLoss:
    """Computes the loss of a micro-batch.

    Args:
        config: of the run.
        label_smoothing: smoothing that the targets don't have yet.
        device: where the model trains.

    Raises:
        ConfigError: the teacher can't be built or loaded.
    """

    def __init__(self, config: Config, label_smoothing: float, device: torch.device) -> None:
        self._label_smoothing = label_smoothing
        self._teacher = None if config.distillation.teacher is None else Teacher(config, device)

    def __call__(self, outputs: Tensor, targets: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the loss, a scalar, and the logits ``[B, classes]`` for the metrics.

        If the model has two heads, these logits are their mean, as in evaluation.

        Args:
            outputs: the student's logits ``[B, classes]``; ``[2, B, classes]`` of a class head and a distillation head.
            targets: labels ``[B]``, or fractions of classes ``[B, classes]``.
            images: the student's input.
        """
        heads = outputs.float().view(-1, *outputs.shape[-2:])
        loss = F.cross_entropy(heads[0], targets, label_smoothing=self._label_smoothing)
        if self._teacher is not None:
            # The distillation head, or the only head.
            loss = self._teacher.distil(loss, heads[-1], images)
        return loss, heads.mean(dim=0)

    def of_selectors(self, model: nn.Module, targets: Tensor) -> Tensor:
        """Returns the loss of the model's token selectors after a forward, from the labels alone; 0 without such selectors."""
        return selector_loss(model, targets, label_smoothing=self._label_smoothing)
