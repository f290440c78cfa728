"""Distillation against the paper's equations in float64, and runs with a teacher on every kind of engine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from svite_scale.checkpoint.compatibility import check_same_run
from svite_scale.config.load import to_dict
from svite_scale.config.schema import Config
from svite_scale.config.validate import validate
from svite_scale.errors import CheckpointError, ConfigError
from svite_scale.models.dense import build_dense
from svite_scale.models.teacher import build_teacher, check_teacher, enable_distillation_heads
from svite_scale.train.loss import Teacher, TrainingLoss, hard_distillation, soft_distillation
from tests.command_line import run_here
from tests.ranks import run_on_ranks
from tests.runs import ENGINES, losses_of, resumed_run, run
from tests.tiny import tiny_config, write_config_file

TEACHER = "test_resnet"
NORMALISED = ("distillation.mean=[0.5]", "distillation.std=[0.25]")
Array = np.ndarray[Any, Any]


def softmax(logits: Array) -> Array:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def soft_by_hand(student: Array, teacher: Array, temperature: float) -> float:
    ours, theirs = softmax(student / temperature), softmax(teacher / temperature)
    return temperature**2 * float((theirs * np.log(theirs / ours)).sum(axis=1).mean())


def hard_by_hand(student: Array, teacher: Array) -> float:
    rows = np.arange(len(student))
    return -float(np.log(softmax(student)[rows, teacher.argmax(axis=1)]).mean())


def logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_soft_distillation_is_equation_2(temperature: float) -> None:
    student, teacher = logits(0).requires_grad_(), logits(1)
    loss = soft_distillation(student, teacher, temperature)
    loss.backward()
    values, theirs = student.detach().numpy(), teacher.numpy()
    assert loss.item() == pytest.approx(soft_by_hand(values, theirs, temperature), rel=1e-12)
    # d/dz T^2 KL = T (softmax(z/T) - softmax(t/T)), and 1 / B for the mean.
    expected = temperature * (softmax(values / temperature) - softmax(theirs / temperature)) / len(values)
    np.testing.assert_allclose(student.grad.numpy(), expected, rtol=1e-9, atol=1e-14)  # type: ignore[union-attr]


def test_hard_distillation_is_equation_3() -> None:
    student, teacher = logits(2).requires_grad_(), logits(3)
    loss = hard_distillation(student, teacher)
    loss.backward()
    values, theirs = student.detach().numpy(), teacher.numpy()
    assert loss.item() == pytest.approx(hard_by_hand(values, theirs), rel=1e-12)
    expected = (softmax(values) - np.eye(5)[theirs.argmax(axis=1)]) / len(values)
    np.testing.assert_allclose(student.grad.numpy(), expected, rtol=1e-9, atol=1e-14)  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a tiny teacher of grey digits, with statistics of batches that aren't trivial."""
    torch.manual_seed(9)
    teacher = timm.create_model(TEACHER, num_classes=10, in_chans=1).train()
    for _ in range(20):
        teacher(2 * torch.rand(16, 1, 8, 8))
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_file(teacher.state_dict(), path)
    return path


def with_teacher(digits: Path, run_dir: Path, checkpoint: Path, *overrides: str) -> Config:
    given = (f"distillation.teacher={TEACHER}", f"distillation.checkpoint={checkpoint}", *NORMALISED)
    return tiny_config(digits, run_dir, *given, *overrides)


@pytest.mark.parametrize(("kind", "alpha"), [("soft", 0.3), ("hard", 0.5), ("hard", 1.0)])
@pytest.mark.parametrize("heads", [1, 2])
def test_training_loss_mixes_labels_and_teacher_by_alpha(
    tmp_path: Path, digits: Path, checkpoint: Path, kind: str, alpha: float, heads: int
) -> None:
    config = with_teacher(digits, tmp_path / "run", checkpoint, f"distillation.kind={kind}", f"distillation.alpha={alpha}")
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(6, 1, 8, 8, generator=generator)
    outputs = torch.randn(heads, 6, 10, generator=generator)
    labels = torch.tensor([1, 2, 3, 4, 5, 9])
    teacher = timm.create_model(TEACHER, num_classes=10, in_chans=1, checkpoint_path=str(checkpoint)).eval()
    answers = teacher((pixels - 0.5) / 0.25).detach().double().numpy()
    assert len(set(answers.argmax(axis=1).tolist())) > 1

    loss, shown = TrainingLoss(config, 0.1, torch.device("cpu"))(
        outputs if heads == 2 else outputs[0], labels, (pixels - 0.3) / 0.35
    )
    first, last = (outputs[number].double().numpy() for number in (0, heads - 1))
    targets = 0.9 * np.eye(10)[labels.numpy()] + 0.1 / 10
    labels_part = -float((targets * np.log(softmax(first))).sum(axis=1).mean())
    teachers_part = soft_by_hand(last, answers, 3.0) if kind == "soft" else hard_by_hand(last, answers)
    assert loss.item() == pytest.approx((1 - alpha) * labels_part + alpha * teachers_part, rel=1e-5)
    torch.testing.assert_close(shown, outputs.mean(dim=0))


def test_teacher_in_bf16_returns_logits_in_fp32(tmp_path: Path, digits: Path, checkpoint: Path) -> None:
    images = torch.rand(4, 1, 8, 8)
    answers = {
        precision: Teacher(
            with_teacher(digits, tmp_path / precision, checkpoint, f"train.precision={precision}"), torch.device("cpu")
        ).logits(images)
        for precision in ("fp32", "bf16")
    }
    assert answers["bf16"].dtype == torch.float32
    assert 0 < (answers["bf16"] - answers["fp32"]).abs().max() < 0.1 * answers["fp32"].abs().max()
    assert not any(answer.requires_grad for answer in answers.values())


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_every_engine_distils_alike_and_resumes(tmp_path: Path, digits: Path, checkpoint: Path, kind: str) -> None:
    given = (f"distillation.kind={kind}", "model.name=deit_tiny_distilled_patch16_224")

    def config(name: str, engine: str, steps: int = 6) -> Config:
        return with_teacher(digits, tmp_path / name, checkpoint, *given, *ENGINES[engine], f"train.max_steps={steps}")

    alone = run_on_ranks(1, run, config("alone", "single"))
    plain = tiny_config(digits, tmp_path / "plain", given[1], "train.max_steps=6")
    run_on_ranks(1, run, plain)
    expected = losses_of(tmp_path / "alone")
    assert abs(expected[0] - losses_of(tmp_path / "plain")[0]) > 0.01
    assert np.abs(alone[0].tensors["head_dist.bias:exp_avg"]).max() > 0
    assert not [name for name in alone[0].tensors if "layer1" in name]
    for engine in ("fsdp2", "zero3"):
        run_on_ranks(2, run, config(engine, engine))
        assert losses_of(tmp_path / engine) == pytest.approx(expected, abs=1e-5)
    if kind == "soft":
        run_on_ranks(2, run, config("stopped", "fsdp2", 3))
        run_on_ranks(2, resumed_run, config("stopped", "zero3", 6))
        assert losses_of(tmp_path / "stopped") == pytest.approx(expected, abs=1e-5)


def test_plain_student_learns_from_the_teacher_with_its_only_head(tmp_path: Path, digits: Path, checkpoint: Path) -> None:
    """With all of the loss from the teacher, the labels don't matter."""
    config = with_teacher(digits, tmp_path / "run", checkpoint, "distillation.alpha=1.0", "distillation.kind=soft")
    run_on_ranks(1, run, config)
    losses = losses_of(tmp_path / "run")
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])


def test_student_returns_both_heads_in_training_and_their_mean_in_evaluation(tmp_path: Path, digits: Path) -> None:
    config = tiny_config(digits, tmp_path / "run", "model.name=deit_tiny_distilled_patch16_224")
    student, images = build_dense(config.model), torch.rand(3, 1, 8, 8)
    enable_distillation_heads(student)
    both = student.train()(images)
    assert both.shape == (2, 3, 10)
    torch.testing.assert_close(student.eval()(images), both.mean(dim=0))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("distillation.teacher=test_resnet",), "distillation.checkpoint = None: is missing beside teacher"),
        (("distillation.checkpoint=x.pth",), "distillation.teacher = None: is missing beside checkpoint"),
        (("distillation.mean=[0.5]",), r"distillation.std = None: is missing beside mean \(\(0.5,\)\)"),
        (
            ("distillation.mean=[0.5,0.5]", "distillation.std=[0.5]"),
            r"distillation.mean = \[0.5, 0.5\]: has 2 entries for 1 channels",
        ),
        (
            ("distillation.mean=[0.5]", "distillation.std=[0.0]"),
            r"distillation.std = \[0.0\]: is not above 0.0; use a list",
        ),
        (("distillation.temperature=2.0",), "distillation.temperature = 2.0: isn't used by kind=hard"),
    ],
)
def test_distillation_fields_that_do_not_fit_are_refused(
    tmp_path: Path, digits: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(tiny_config(digits, tmp_path / "run", *overrides), 1)


def test_unusable_teacher_ends_the_command(
    tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str], checkpoint: Path
) -> None:
    path = write_config_file(digits, tmp_path / "run", tmp_path / "c.yaml")

    def answer(*overrides: str) -> tuple[int, str]:
        answered = run_here(capsys, "--config", str(path), *overrides)
        return answered.status, answered.err

    unknown = answer("distillation.teacher=resnet_one", f"distillation.checkpoint={checkpoint}")
    assert unknown[0] == 2
    assert unknown[1].startswith("config error: distillation.teacher = 'resnet_one': is no model that timm knows; see timm")
    other = answer(f"distillation.teacher={TEACHER}", f"distillation.checkpoint={checkpoint}")
    assert other[0] == 2
    assert "distillation.mean = None: would be data.mean, [0.3], but timm's test_resnet has mean [0.5, 0.5, 0.5]" in other[1]
    missing = answer(f"distillation.teacher={TEACHER}", "distillation.checkpoint=none.pth", *NORMALISED)
    assert missing == (2, "config error: distillation.checkpoint = 'none.pth': is no file; name the teacher's weights\n")
    assert "is no file" in answer(f"distillation.teacher={TEACHER}", "distillation.checkpoint=x", *NORMALISED, "--dry-run")[1]


def test_dry_run_shows_the_cost_of_the_teacher(
    tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str], checkpoint: Path
) -> None:
    path = write_config_file(digits, tmp_path / "run", tmp_path / "c.yaml")
    given = (f"distillation.teacher={TEACHER}", f"distillation.checkpoint={checkpoint}", *NORMALISED)
    with_one, without = (run_here(capsys, "--config", str(path), "--dry-run", *overrides).out for overrides in (given, ()))
    (size,) = re.findall(rf"^teacher +{TEACHER}, whole on each rank: ([\d,]+) bytes more$", with_one, re.M)
    # Beside the tensors the file has a header of their names.
    assert 0 < checkpoint.stat().st_size - int(size.replace(",", "")) < 20_000
    assert "teacher" not in without


def test_checkpoint_of_another_model_is_refused_as_teacher(tmp_path: Path, digits: Path, checkpoint: Path) -> None:
    def error_of(path: Path, *overrides: str) -> str:
        config = with_teacher(digits, tmp_path / "run", path, *overrides)
        check_teacher(config.distillation, config.data)
        with pytest.raises(ConfigError) as caught:
            build_teacher(config.distillation, config.model)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"junk" * 10)
    text = tmp_path / "text.pth"
    text.write_text("junk")
    pickled = tmp_path / "pickled.pth"
    torch.save({"model": {}, "arguments": Path("x")}, pickled)
    for path in (junk, text, pickled):
        assert error_of(path).startswith(f"distillation.checkpoint = '{path}': can't be read as a state dict (")
    classes = error_of(checkpoint, "model.num_classes=11")
    assert "isn't of this test_resnet: of other shapes fc.weight [10, 96] instead of [11, 96], fc.bias [10] inst" in classes
    nested = tmp_path / "nested.pth"
    torch.save({"model": timm.create_model("test_vit", num_classes=10, in_chans=1).state_dict()}, nested)
    assert re.search(r"isn't of this test_resnet: it has no conv1\S+, .* more; the model has no cls_token, ", error_of(nested))


def test_teacher_loads_from_a_pth_file_and_a_nested_state_dict(tmp_path: Path, digits: Path) -> None:
    torch.manual_seed(3)
    vit = timm.create_model("deit_tiny_patch16_224", num_classes=10, in_chans=1, img_size=32).eval()
    torch.save({"model": vit.state_dict()}, tmp_path / "t.pth")
    names = ("distillation.teacher=deit_tiny_patch16_224.fb_in1k", f"distillation.checkpoint={tmp_path}/t.pth")
    config = tiny_config(digits, tmp_path / "run", *names, *NORMALISED, "model.image_size=32")
    images = torch.rand(2, 1, 32, 32)
    teacher = build_teacher(config.distillation, config.model)
    torch.testing.assert_close(teacher(images), vit(images))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_resumed_run_keeps_its_teacher(tmp_path: Path, digits: Path, checkpoint: Path) -> None:
    saved = to_dict(with_teacher(digits, tmp_path / "run", checkpoint))
    other = with_teacher(digits, tmp_path / "run", checkpoint, "distillation.alpha=0.4")
    with pytest.raises(CheckpointError, match=r"saved with distillation\.alpha = 0\.5, not 0\.4"):
        check_same_run(saved, other, tmp_path)
