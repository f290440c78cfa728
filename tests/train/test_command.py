"""Mistakes end with one line that names field, value and remedy; runs in this process start, end, resume and fail."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from svite_scale.config.load import read_config
from svite_scale.data.format.index import sidecar_path
from tests.command_line import run_here
from tests.runs import metrics_of
from tests.tiny import write_config_file

MISTAKES = {
    "unknown key": (["train.epoch=3"], "train.epoch = '3': is no known key; the nearest is train.epochs"),
    "no such section": (["trian.epochs=3"], "trian.epochs = '3': is no known key; the nearest is train.epochs"),
    "density": (["sparsity.density=1.5"], r"sparsity.density = 1.5: .*\b1(\.0)?\b"),
    "pattern": (
        ["sparsity.density=1.0", 'sparsity.densities={"block.*": 0.5, "*": 0.6}'],
        r"sparsity.densities = \{'block.\*': 0.5\}: decides no layer, since it matches none .*; use names such as blocks",
    ),
    "no pattern": (
        ["sparsity.density=1.0", 'sparsity.densities={"blocks.*": 0.5}'],
        r"sparsity.densities = .*: no pattern matches layer patch_embed.proj; add \"\*\": DENSITY at the end",
    ),
    "kept dense": (["sparsity.keep_dense=[heads]"], "sparsity.keep_dense = 'heads': matches no prunable layer; use names"),
    "no mask file": (
        ["sparsity.density=1.0", "sparsity.masks=none.safetensors"],
        "sparsity.masks = 'none.safetensors': is no file; check the path",
    ),
    "too few weights": (
        ["sparsity.density=0.0001"],
        "sparsity.density = 0.0001: leaves 3 active weights for 10 layers, of which each needs one; raise it",
    ),
    "two sources": (
        ['sparsity.densities={"*": 0.5}'],
        "sparsity.density = 0.6: isn't used where densities is given; set it to 1.0, or leave densities out",
    ),
    "type": (["train.epochs=many"], "train.epochs = 'many': is not a whole number; use a whole number of at least 1"),
    "heads": (["model.num_heads=3"], r"model.num_heads = 3: does not divide model.embed_dim \(32\); use a divisor of it"),
    "patches": (["model.patch_size=3"], r"model.image_size = 8: is not divisible by the patch size \(3\); use a multiple"),
    "model": (["model.name=deit_tinny_patch16_224"], "model.name = .*did you mean deit_tiny_patch16_224"),
    "another kind of model": (
        ["model.name=resnet18", "model.patch_size=null", "model.embed_dim=null", "model.depth=null", "model.num_heads=null"],
        r"model.name = 'resnet18': normalises by the batch \(bn1 is a BatchNorm2d\), .*; use another model, such as",
    ),
    "sizes of another kind of model": (
        ["model.name=convnext_atto"],
        "model.embed_dim = 32: isn't taken by convnext_atto; leave it out",
    ),
    "sizes that timm can't bring together": (
        ["model.name=vit_giant_patch14_dinov2", "model.embed_dim=64"],
        r"model.name = 'vit_giant_patch14_dinov2': can't be built with .*embed_dim=64.* \(AssertionError\); use another model",
    ),
    "an update that never starts": (
        ["sparsity.update_unit=epochs", "sparsity.update_start=1e308"],
        r"sparsity.update_start = 1e\+308: is above 1000000000000.0; use a number of at least 0.0 and up to",
    ),
    "batch": (
        ["train.accumulation_steps=3"],
        r"train.global_batch_size = 16: is not divisible by world size \(1\) x train.accumulation_steps \(3\); use a multiple",
    ),
    "labels": (
        ["model.num_classes=4"],
        r"model.num_classes = 4: is too few for labels 0 to 9, which is that of sample '\S+' of \S+/train-\d+\.tar; raise it",
    ),
    "odd pairs": (
        ["data.augment.mixup=0.8", "train.global_batch_size=9"],
        r"data.augment.mixup = 0.8: mixes samples in pairs, but a micro-batch has 9; make train.global_batch_size",
    ),
}


@pytest.fixture(autouse=True)
def leave_the_process_as_it_was() -> Iterator[None]:
    """A command of one rank joins a group of one and leaves it, and uses all cores."""
    yield
    assert not dist.is_initialized()
    torch.set_num_threads(1)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_in_the_config_is_one_line_and_status_2(
    config_path: Path, capsys: pytest.CaptureFixture[str], mistake: str
) -> None:
    overrides, message = MISTAKES[mistake]
    answer = run_here(capsys, "--config", str(config_path), *overrides)
    assert (answer.status, answer.out) == (2, "")
    (line,) = [line for line in answer.err.splitlines() if "step/s]" not in line]
    assert re.match(f"config error: {message}", line), line


@pytest.mark.parametrize("mistake", ["pattern", "no pattern", "kept dense", "no mask file", "too few weights", "two sources"])
def test_dry_run_finds_the_same_mistakes(config_path: Path, capsys: pytest.CaptureFixture[str], mistake: str) -> None:
    overrides, message = MISTAKES[mistake]
    answer = run_here(capsys, "--config", str(config_path), "--dry-run", *overrides)
    assert (answer.status, answer.out) == (2, "")
    assert re.fullmatch(f"config error: {message}.*\n", answer.err), answer.err


def test_masks_of_another_model_are_a_mistake_in_the_config(config_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config_path.parent / "masks.safetensors"
    save_file({"head.weight": torch.ones(10, 33)}, path)
    start = ["--config", str(config_path), "--dry-run", "sparsity.density=1.0", f"sparsity.masks={path}"]
    found = f"config error: sparsity.masks = '{path}': "
    assert run_here(capsys, *start).err == found + (
        "has no tensor patch_embed.proj.weight; add it, or list patch_embed.proj in keep_dense\n"
    )
    answer = run_here(capsys, *start, 'sparsity.keep_dense=["[!h]*"]')
    assert (answer.status, answer.err) == (
        2,
        found + "its tensor head.weight is of shape (10, 33); use the weight's, (10, 32)\n",
    )


TWO_RANKS = {
    "backend": (
        "parallel.backend=single",
        "parallel.backend = 'single': trains on one process, but 2 were started; use ddp, fsdp2 or deepspeed",
    ),
    "batch": (
        "train.global_batch_size=15",
        "train.global_batch_size = 15: is not divisible by world size (2) x train.accumulation_steps (1); use a multiple of 2",
    ),
    "density": ("sparsity.density=0", "sparsity.density = 0: is not above 0.0; use a number above 0.0 and up to 1.0"),
}


@pytest.mark.parametrize("mistake", TWO_RANKS)
def test_mistake_in_the_config_is_printed_by_the_main_rank_only(
    config_path: Path, capsys: pytest.CaptureFixture[str], mistake: str
) -> None:
    override, message = TWO_RANKS[mistake]
    for rank, expected in ((0, f"config error: {message}\n"), (1, "")):
        names = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "x"}
        answer = run_here(capsys, "--config", str(config_path), override, launcher=names)
        assert (answer.status, answer.out, answer.err) == (2, "", expected)


def test_incomplete_environment_of_a_launcher_is_a_mistake_in_the_config(
    config_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = run_here(capsys, "--config", str(config_path), launcher={"RANK": "0"})
    assert answer.status == 2
    assert answer.err.startswith("config error: WORLD_SIZE = None: ")


def test_config_that_is_no_file_is_a_mistake_in_the_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = run_here(capsys, "--config", str(tmp_path / "tiny.yaml"))
    assert answer.status == 2
    assert answer.err.startswith(f"config error: config = '{tmp_path}/tiny.yaml': is no file; ")
    assert len(answer.err.splitlines()) == 1


def test_missing_shards_are_an_error_of_the_run(config_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = run_here(capsys, "--config", str(config_path), "data.train=/nowhere/train-*.tar")
    assert answer.status == 1
    assert answer.err.startswith("error on rank 0: data.train = '/nowhere/train-*.tar'")
    assert not (config_path.parent / "run").exists()


def test_verify_checksums_finds_other_content_of_the_same_size(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = Path(shutil.copytree(digits, tmp_path / "shards"))
    start = ["--config", str(write_config_file(shards, tmp_path / "run", tmp_path / "tiny.yaml")), "train.max_steps=1"]
    assert run_here(capsys, *start, "data.verify_checksums=true").status == 0
    shutil.rmtree(tmp_path / "run")
    damaged = shards / "val-000001.tar"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    answer = run_here(capsys, *start, "data.verify_checksums=true")
    assert answer.status == 1
    assert answer.err.startswith(f"error on rank 0: {damaged} is damaged, or its index is stale: its checksum is ")
    assert run_here(capsys, *start).status == 0


def test_command_trains_then_refuses_the_run_directory_then_resumes(
    config_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = config_path.parent / "run"
    start = ["--config", str(config_path)]
    again = [*start, "--resume"]

    answer = run_here(capsys, *again)
    assert answer.status == 1
    assert answer.err == (
        f"error on rank 0: {run_dir}/checkpoints holds no checkpoint to resume from; restore one, or start a new run\n"
    )

    assert run_here(capsys, *start, "train.max_steps=5", "train.log_every=2").status == 0
    assert [line["step"] for line in metrics_of(run_dir)] == [2, 4, 5], "each second step, and the last"
    assert "eval_accuracy" in metrics_of(run_dir)[-1]
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 5

    answer = run_here(capsys, *start)
    assert answer.status == 2
    assert answer.err == (
        f"config error: run_dir = '{run_dir}': holds a run already; add --resume to continue it, or name another\n"
    )

    newest = f"{run_dir}/checkpoints/step-00000005"
    for override, field, then, now in (
        ("sparsity.density=0.3", "sparsity.density", "0.6", "0.3"),
        ("seed=6", "seed", "5", "6"),
        ("data.augment.recipe=affine", "data.augment.recipe", "'none'", "'affine'"),
        ("train.global_batch_size=8", "train.global_batch_size", "16", "8"),
        ("data.mean=[0.5]", "data.mean", "[0.3]", "[0.5]"),
    ):
        answer = run_here(capsys, *again, override)
        assert answer.status == 1
        assert answer.err == (
            f"error on rank 0: {newest} was saved with {field} = {then}, not {now}; restore it, or start a new run\n"
        )
    assert read_config(run_dir / "config.yaml").sparsity.density == 0.6, "a refused run leaves the files as they were"

    # What doesn't define the result may change.
    assert run_here(capsys, *again, "train.max_steps=7", "train.eval_batch_size=4", "parallel.backend=fsdp2").status == 0
    assert [line["step"] for line in metrics_of(run_dir)] == [2, 4, 5, 6, 7]
    assert read_config(run_dir / "config.yaml").train.max_steps == 7
    assert (run_dir / "checkpoints" / "step-00000007").is_dir()

    finished = metrics_of(run_dir)
    answer = run_here(capsys, *again, "train.max_steps=7")
    assert answer.status == 0, "a batch script may resume a run that is done"
    assert metrics_of(run_dir) == finished
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["steps"], summary["eval_loss"]) == (7, pytest.approx(finished[-1]["eval_loss"], rel=1e-5))

    tensors = run_dir / "checkpoints" / "step-00000007" / "__0_0.distcp"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    answer = run_here(capsys, *again, "train.max_steps=8")
    assert answer.status == 0
    skipped = [line for line in caplog.messages if "is skipped" in line]
    assert len(skipped) == 1
    assert skipped[0].startswith(f"checkpoint {tensors.parent} is skipped: {tensors.name} has ")
    assert [line["step"] for line in metrics_of(run_dir)] == [2, 4, 5, 6, 7, 8], "gone on after step 5"
    assert {path.name for path in tensors.parents[1].glob("step-*")} == {f"step-0000000{step}" for step in (5, 7, 8)}


def test_run_resumes_with_the_same_samples_only(
    config_path: Path, digits: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    start = ["--config", str(config_path)]
    assert run_here(capsys, *start, "train.max_steps=2").status == 0
    moved = tmp_path / "moved"
    shutil.copytree(digits, moved)
    again = [*start, "--resume", f"data.train={moved}/train-*.tar", f"data.val={moved}/val-*.tar"]
    assert run_here(capsys, *again, "train.max_steps=3").status == 0, "wherever they are"
    for first in (moved / "train-000000.tar", sidecar_path(moved / "train-000000.tar")):
        second = first.with_name(first.name.replace("0.tar", "1.tar"))
        contents = first.read_bytes(), second.read_bytes()
        second.write_bytes(contents[0])
        first.write_bytes(contents[1])
    answer = run_here(capsys, *again, "train.max_steps=4")
    assert answer.status == 1, "as many, in another order"
    (moved / "train-000002.tar").unlink()
    answer = run_here(capsys, *again, "train.max_steps=4")
    assert answer.status == 1
    found = f"error on rank 0: {config_path.parent}/run/checkpoints/step-00000003 was saved by a run on other training shards "
    assert answer.err.startswith(found + "({'samples': 64, ")
    assert "{'samples': 48, " in answer.err


def test_run_does_not_start_over_checkpoints(config_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = config_path.parent / "run"
    assert run_here(capsys, "--config", str(config_path), "train.max_steps=2").status == 0
    (run_dir / "metrics.jsonl").unlink()
    answer = run_here(capsys, "--config", str(config_path), "train.max_steps=2")
    assert answer.status == 2
    assert "holds a run already; add --resume" in answer.err
    (run_dir / "checkpoints").rename(run_dir / "elsewhere")
    (run_dir / "checkpoints").write_text("")
    answer = run_here(capsys, "--config", str(config_path), "--auto-resume")
    assert answer.status == 2
    assert answer.err.startswith(f"config error: run_dir = '{run_dir}': can't be read ([Errno 20] Not a directory")


def test_mistake_in_the_config_is_printed_by_the_first_rank_of_each_machine(capsys: pytest.CaptureFixture[str]) -> None:
    """A config may be missing, or GPUs too few, on one machine alone."""
    for local_rank in (0, 1):
        names = {"RANK": str(8 + local_rank), "WORLD_SIZE": "16", "LOCAL_RANK": str(local_rank), "MASTER_ADDR": "node-0"}
        answer = run_here(capsys, "--config", "nowhere.yaml", launcher=names)
        assert answer.status == 2
        assert answer.err.startswith("config error: config = 'nowhere.yaml': ") == (local_rank == 0)
        assert len(answer.err.splitlines()) == 1 - local_rank
