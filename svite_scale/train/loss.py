"""The training loss: cross entropy, and with a teacher distillation (DeiT, arXiv:2012.12877, section 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from svite_scale.config.schema import Config
from svite_scale.data.options import DataConfig
from svite_scale.models.options import DistillationConfig
from svite_scale.models.teacher import build_teacher, renormalisation


def soft_distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The second term of equation 2: T^2 KL(teacher / T || student / T), summed over classes and averaged over samples.

    DeiT's code averages over classes too, which makes this term smaller by their number.

    Args:
        student: logits, ``[B, classes]``.
        teacher: the same.
        temperature: T.
    """
    ours, theirs = (F.log_softmax(logits / temperature, dim=1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def hard_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """The second term of equation 3: cross entropy with the teacher's first guess, without label smoothing."""
    return F.cross_entropy(student, teacher.argmax(dim=1))


class Teacher:
    """What a teacher adds to the loss. Every rank holds the whole model, which no engine wraps and no checkpoint contains.

    Raises:
        ConfigError, CheckpointError: the teacher can't be built or loaded.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self._options: DistillationConfig = config.distillation
        self._data: DataConfig = config.data
        self._model = build_teacher(config.distillation, config.model).to(device)
        self._factor, self._shift = renormalisation(config.distillation, config.data, device)
        self._bf16 = config.train.precision == "bf16"

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Its answers to images as the student gets them, augmented and mixed: float32 ``[B, classes]``."""
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self._bf16):
            return self._model(images * self._factor + self._shift).float()

    def weigh(self, loss: Tensor, student: Tensor, images: Tensor) -> Tensor:
        """The whole loss, of the labels' and of what ``student``, the logits that learn from the teacher, lose to it."""
        options, teacher = self._options, self.logits(images)
        if options.kind == "hard":
            distilled = hard_distillation(student, teacher)
        else:
            distilled = soft_distillation(student, teacher, options.temperature)
        return (1 - options.alpha) * loss + options.alpha * distilled


class TrainingLoss:
    """The loss of a micro-batch.

    Args:
        config: of the run.
        label_smoothing: that targets don't have yet.
        device: where the model trains.

    Raises:
        ConfigError, CheckpointError: the teacher can't be built or loaded.
    """

    def __init__(self, config: Config, label_smoothing: float, device: torch.device) -> None:
        self._label_smoothing = label_smoothing
        self._teacher = None if config.distillation.teacher is None else Teacher(config, device)

    def __call__(self, outputs: Tensor, targets: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Loss, a scalar, and logits ``[B, classes]`` that metrics look at: as in evaluation, the mean of two heads.

        Args:
            outputs: the student's logits ``[B, classes]``; or of its class head and its distillation head ``[2, B, classes]``.
            targets: labels ``[B]``, or shares of classes ``[B, classes]``.
            images: the student's input.
        """
        heads = outputs.float().view(-1, *outputs.shape[-2:])
        loss = F.cross_entropy(heads[0], targets, label_smoothing=self._label_smoothing)
        if self._teacher is not None:
            # The head for the teacher's answers, or the only one.
            loss = self._teacher.weigh(loss, heads[-1], images)
        return loss, heads.mean(dim=0)
