"""``launch/submit.py`` without Slurm: what it writes, and what it refuses. ``tests/slurm`` has the jobs."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command_line import Answer, run_here

ROOT = Path(__file__).parents[2]
CONFIG = "configs/deit_base_s70.yaml"
Submit = Callable[..., Answer]
SIZE = ("--nodes", "4", "--gpus-per-node", "8")


@pytest.fixture
def submit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Submit:
    """Runs the command in this process, from the root of the repository."""
    monkeypatch.chdir(ROOT)

    def run(*arguments: str, path: str = os.environ["PATH"]) -> Answer:
        monkeypatch.setenv("PATH", path)
        return run_here(capsys, "--config", CONFIG, *arguments, script=ROOT / "launch" / "submit.py")

    return run


def directives(script: str) -> dict[str, str]:
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH --")]
    return dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines)


def sbatch_that(folder: Path, does: str) -> str:
    """A path in which a program named sbatch comes first."""
    program = folder / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{does}\n")
    program.chmod(0o755)
    return f"{program.parent}{os.pathsep}{os.environ['PATH']}"


def test_a_dry_run_prints_the_filled_in_script(submit: Submit) -> None:
    given = (
        "--launcher",
        "deepspeed",
        "--time",
        "2:00:00",
        "--warn-before",
        "60",
        "--partition",
        "long",
        "--cpus-per-gpu",
        "4",
    )
    overrides = ("run_dir=runs/a b", "data.train=/a b/{000..001}.tar", "sparsity.density=0.4")
    done = submit(*SIZE, *given, "--sbatch", "comment=two words", "--dry-run", *overrides)
    assert (done.status, done.err) == (0, "")
    subprocess.run(["bash", "-n"], input=done.out, text=True, check=True)

    template = (ROOT / "launch" / "slurm" / "train.sbatch").read_text()
    logs = ROOT / "runs" / "a b" / "logs"
    asked = {
        "job-name": '"a b"',
        "chdir": str(ROOT),
        "nodes": "4",
        "gpus-per-node": "8",
        "cpus-per-task": "32",
        "time": "2:00:00",
        "signal": "B:USR1@60",
        "partition": "long",
        "output": f'"{logs}/%j.out"',
        "comment": '"two words"',
    }
    assert directives(done.out) == directives(template) | asked

    (line,) = [line for line in done.out.splitlines() if line.startswith("set -- ")]
    words = shlex.split(line)[2:]
    assert words == ["--launcher", "deepspeed", "--logs", str(logs), str(ROOT / CONFIG), *overrides]
    assert done.out.replace(line, "").endswith(template.partition("set -euo pipefail")[2])
    assert not (ROOT / "runs" / "a b").exists()


def test_options_that_are_not_given_stay_as_in_the_template(submit: Submit) -> None:
    script = directives(submit(*SIZE, "--dry-run").out)
    assert (script["time"], script["signal"], script["open-mode"]) == ("24:00:00", "B:USR1@300", "append")
    assert "requeue" in script
    assert "partition" not in script


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--nodes", "0", "--gpus-per-node", "8"), "--nodes = '0': is no number of nodes"),
        (("--nodes", "4-2", "--gpus-per-node", "8"), "--nodes = '4-2'"),
        (("--nodes", "many", "--gpus-per-node", "8"), "--nodes = 'many'"),
        (("--nodes", "2", "--gpus-per-node", "0"), "--gpus-per-node = 0"),
        ((*SIZE, "--cpus-per-gpu", "0"), "--cpus-per-gpu = 0"),
        ((*SIZE, "--sbatch=exclusive"), "--sbatch = 'exclusive'"),
        ((*SIZE, "--sbatch=--account=a"), "--sbatch = '--account=a'"),
        ((*SIZE, "sparsity.densty=0.3"), "sparsity.densty"),
        (
            (*SIZE, "distillation.teacher=deit_nano", "distillation.checkpoint=a"),
            "distillation.teacher = 'deit_nano': is no model that timm knows",
        ),
        ((*SIZE, "model.name=vit_none"), "model.name = 'vit_none'"),
        ((*SIZE, "parallel.backend=single"), "parallel.backend = 'single'"),
    ],
)
def test_submit_refuses_a_wrong_argument_in_one_line(
    submit: Submit, tmp_path: Path, arguments: tuple[str, ...], named: str
) -> None:
    path = sbatch_that(tmp_path, f"touch {tmp_path}/submitted")
    done = submit(*arguments, path=path)
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith(f"config error: {named}"), done.err
    assert len(done.err.splitlines()) == 1
    assert not (tmp_path / "submitted").exists()


def test_submit_refuses_when_a_number_of_nodes_does_not_divide_the_batch(submit: Submit) -> None:
    done = submit("--nodes", "1-4", "--gpus-per-node", "8", "--dry-run", "train.global_batch_size=512")
    assert done.status == 2
    assert done.err == (
        "config error: train.global_batch_size = 512: is not divisible by world size (24) x train.accumulation_steps (1), "
        "on 3 of --nodes 1-4; use a multiple of 24\n"
    )
    assert submit("--nodes", "1-4", "--gpus-per-node", "8", "--dry-run", "train.global_batch_size=768").status == 0


def test_submit_writes_the_script_into_the_run_directory_and_submits_it(submit: Submit, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    path = sbatch_that(tmp_path, f'printf "%s\\n" "$@" >{tmp_path}/called; echo "17;cluster"')
    done = submit(*SIZE, f"run_dir={run_dir}", path=path)
    assert done.status == 0, done.err
    script = run_dir / "train.sbatch"
    assert (tmp_path / "called").read_text().splitlines() == ["--parsable", str(script)]
    assert script.read_text() == submit(*SIZE, f"run_dir={run_dir}", "--dry-run").out
    assert done.out.splitlines() == [
        f"job 17: squeue --job 17; tail --follow {run_dir}/logs/17/rank-0.log",
        f"again: sbatch {script}",
    ]
    assert (run_dir / "logs").is_dir()


@pytest.mark.parametrize(
    ("sbatch", "said"),
    [
        ("echo 'sbatch: error: invalid partition specified: longer' >&2; exit 1", "invalid partition specified: longer"),
        (None, "sbatch isn't there; submit from a machine of the cluster, or add --dry-run"),
    ],
)
def test_submit_shows_what_sbatch_says_when_it_fails(submit: Submit, tmp_path: Path, sbatch: str | None, said: str) -> None:
    path = str(tmp_path) if sbatch is None else sbatch_that(tmp_path, sbatch)
    done = submit(*SIZE, f"run_dir={tmp_path / 'run'}", path=path)
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith("error: ")
    assert said in done.err
    assert len(done.err.splitlines()) == 1


def test_submit_names_the_run_directory_when_it_cannot_be_written(submit: Submit, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = submit(*SIZE, f"run_dir={tmp_path}/file/run")
    assert done.status == 1
    assert done.err.startswith(f"error: can't write {tmp_path}/file/run/train.sbatch: ")


def test_a_job_that_resumes_needs_no_file_of_weights(submit: Submit, saved: Callable[[str], Path], tmp_path: Path) -> None:
    gone = ("--dry-run", *SIZE, "model.weights=gone.pth")
    assert submit(*gone, f"run_dir={saved('weights')}").status == 0
    new = submit(*gone, f"run_dir={tmp_path}/new")
    assert (new.status, new.err[:54]) == (2, "config error: model.weights = 'gone.pth': is no file; ")
