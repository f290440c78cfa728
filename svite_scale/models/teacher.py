"""A teacher: any timm model, with weights from a local file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from svite_scale.data.options import DataConfig
from svite_scale.errors import ConfigError
from svite_scale.models.dense import create
from svite_scale.models.options import DistillationConfig, ModelConfig
from svite_scale.models.weights import fit, open_weights
from svite_scale.options import in_section


def check_teacher(config: DistillationConfig, data: DataConfig) -> None:
    """Checks what can be checked before anything is built.

    Raises:
        ConfigError: timm doesn't know the teacher, or it was trained on images normalised in another way than the run's, and
            the config doesn't say in which; or there is no such file.
    """
    if config.teacher is None:
        return
    if not timm.is_model(config.teacher):
        raise ConfigError("distillation.teacher", config.teacher, "is no model that timm knows", "see timm.list_models()")
    known = timm.get_pretrained_cfg(config.teacher)
    if config.mean is None and known is not None and (tuple(known.mean), tuple(known.std)) != (data.mean, data.std):
        raise ConfigError(
            "distillation.mean",
            None,
            f"would be data.mean, {list(data.mean)}, but timm's {config.teacher} has mean {list(known.mean)} and std "
            f"{list(known.std)}",
            "set distillation.mean and distillation.std to those that the checkpoint was trained with",
        )
    if not Path(str(config.checkpoint)).is_file():
        raise ConfigError("distillation.checkpoint", config.checkpoint, "is no file", "name the teacher's weights")


def build_teacher(config: DistillationConfig, model: ModelConfig) -> nn.Module:
    """Builds the teacher on the CPU, in evaluation mode. Its input differs from the student's only in normalisation.

    Args:
        config: names a teacher and its file.
        model: the student's, whose classes, image size and channels are the teacher's too.

    Raises:
        ConfigError: timm can't build it so, or the file can't be read, or isn't of this model.
    """
    assert config.teacher is not None, "there is no teacher"
    assert config.checkpoint is not None, "a teacher has a file"
    options: dict[str, Any] = {"num_classes": model.num_classes, "in_chans": model.in_channels}
    known = timm.get_pretrained_cfg(config.teacher)
    if known is not None and known.fixed_input_size:
        options["img_size"] = model.image_size
    teacher = create("distillation.teacher", config.teacher, options, "use another teacher")
    with in_section("distillation"):
        fitted = fit(teacher, open_weights(config.checkpoint, "checkpoint"), exactly=True)
        fitted.log_changes()
        fitted.load(teacher)
    return teacher.eval().requires_grad_(False)


def enable_distillation_heads(model: nn.Module) -> None:
    """Makes a student with a distillation head (timm's ``deit_*_distilled``) return the logits of both heads in training mode.

    Its output is then ``[2, B, classes]``, of the class head and the distillation head; in evaluation mode it stays their mean.
    Other models stay as they are.
    """
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training(True)  # type: ignore[operator]
        # One tensor, as engines and the loop expect.
        model.register_forward_hook(lambda _, inputs, output: torch.stack(output) if isinstance(output, tuple) else output)


def renormalisation(config: DistillationConfig, data: DataConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns factor and shift, each ``[1, C, 1, 1]``, from the student's normalisation of images to the teacher's."""
    ours, theirs = (data.mean, data.std), (config.mean or data.mean, config.std or data.std)
    mean, std, teacher_mean, teacher_std = (torch.tensor(numbers, device=device) for numbers in (*ours, *theirs))
    return (std / teacher_std).view(1, -1, 1, 1), ((mean - teacher_mean) / teacher_std).view(1, -1, 1, 1)
