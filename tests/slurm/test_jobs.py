"""Runs as jobs of a real Slurm on two nodes: to the end, preempted, and after the loss of a node."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.runs import losses_of, metrics_of
from tests.slurm.cluster import Cluster
from tests.tiny import write_config_file

NUM_STEPS = 160
"""Enough to be in the midst of when a signal arrives: steps take some 20 ms."""

LONG = ("train.epochs=40", "train.eval_every_epochs=40", "sparsity.update_every=20", "optimizer.lr=2e-3", "data.workers=1")
"""So slow a rate that losses still differ from batch to batch at the end. Workers, because Slurm signals them too."""

FSDP2, ZERO3 = ("parallel.backend=fsdp2",), ("parallel.backend=deepspeed", "parallel.zero_stage=3")
JOB_S, STEP_S = 400, 300
"""Longest that a job, and its first steps, may take on a busy machine; DeepSpeed compiles an op before its first."""


@dataclass
class Job:
    """A submitted run."""

    cluster: Cluster
    number: int
    run_dir: Path

    def wait(self) -> None:
        """Until it has ended well."""
        self.cluster.wait_until(lambda: self.has_ended, "the job ends", JOB_S)
        assert self.state == "COMPLETED", self.words()

    def wait_for_restart(self) -> None:
        """Until it runs for the second time."""
        self.cluster.wait_until(lambda: self.restarts == 1 or self.has_ended, "the job is requeued", JOB_S)
        assert self.restarts == 1, self.words()

    @property
    def has_ended(self) -> bool:
        return self.state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")

    def wait_for_step(self, step: int) -> None:
        self.cluster.wait_until(lambda: self.last_step >= step, f"step {step} is done", STEP_S)

    @property
    def state(self) -> str:
        return self.cluster.job(self.number)["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.cluster.job(self.number)["Restarts"])

    @property
    def last_step(self) -> int:
        path = self.run_dir / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    @property
    def world_size(self) -> int:
        return json.loads((self.run_dir / "summary.json").read_text())["world_size"]

    def log(self, name: str) -> str:
        return (self.run_dir / "logs" / str(self.number) / name).read_text()

    def script_log(self) -> str:
        return (self.run_dir / "logs" / f"{self.number}.out").read_text()

    def words(self) -> str:
        """All that it has written."""
        logs = sorted((self.run_dir / "logs").rglob("*.*"))
        return f"job {self.number} is {self.state}\n" + "\n".join(f"{log.name}:\n{log.read_text()[-3000:]}" for log in logs)


def submit(
    cluster: Cluster, digits: Path, run_dir: Path, launcher: str, *arguments: str, nodes: str = "2", gpus: int = 1
) -> Job:
    config = write_config_file(digits, run_dir, run_dir.with_suffix(".yaml"))
    size = ("--nodes", nodes, "--gpus-per-node", str(gpus), "--cpus-per-gpu", "1")
    command = (sys.executable, "launch/submit.py", *size, "--launcher", launcher, "--config", str(config))
    answer = cluster.command(*command, *arguments, *LONG)
    return Job(cluster, int(answer.split()[1].rstrip(":")), run_dir)


@pytest.fixture(scope="module")
def uninterrupted(cluster: Cluster, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run on two nodes by torchrun under FSDP2 that nothing disturbs."""
    job = submit(cluster, digits, tmp_path_factory.mktemp("runs") / "straight", "torchrun", *FSDP2, gpus=2)
    job.wait()
    return job


def test_a_job_trains_on_two_nodes_and_logs_by_rank(uninterrupted: Job) -> None:
    assert (uninterrupted.restarts, uninterrupted.world_size) == (0, 4)
    assert [line["step"] for line in metrics_of(uninterrupted.run_dir)] == list(range(1, NUM_STEPS + 1))
    assert f"{uninterrupted.run_dir}: {NUM_STEPS} steps, test accuracy" in uninterrupted.log("rank-0.log")
    for rank in range(4):
        assert uninterrupted.log(f"rank-{rank}.status") == "0\n"
    assert "start 1: " in uninterrupted.script_log()
    assert "by torchrun on node1 node2, rendezvous at node1:" in uninterrupted.script_log()


@pytest.mark.parametrize(("launcher", "engine", "gpus"), [("torchrun", FSDP2, 2), ("deepspeed", ZERO3, 1)])
def test_a_preempted_job_is_requeued_and_loses_nothing(
    cluster: Cluster, digits: Path, tmp_path: Path, uninterrupted: Job, launcher: str, engine: tuple[str, ...], gpus: int
) -> None:
    """That no sample is lost or trained on twice shows in the losses."""
    job = submit(cluster, digits, tmp_path / "run", launcher, *engine, gpus=gpus)
    job.wait_for_step(5)
    cluster.command("scancel", "--batch", "--signal", "USR1", str(job.number))
    job.wait_for_restart()
    job.wait()
    assert (job.restarts, job.world_size) == (1, 2 * gpus)
    assert [line["step"] for line in metrics_of(job.run_dir)] == list(range(1, NUM_STEPS + 1))
    if engine == FSDP2:
        assert losses_of(job.run_dir) == losses_of(uninterrupted.run_dir)
    else:
        assert losses_of(job.run_dir) == pytest.approx(losses_of(uninterrupted.run_dir), abs=1e-3)

    words = job.script_log()
    assert (
        0
        <= words.index("start 1: ")
        < words.index("asked to stop, saves")
        < words.index("is requeued")
        < words.index("start 2: ")
    )
    log = job.log("rank-0.log")
    assert "stopped by a signal, saved after step" in log
    assert log.index("stopped by a signal") < log.index(f"{NUM_STEPS} steps, test accuracy")
    for rank in range(2 * gpus):
        assert job.log(f"rank-{rank}.status") == "0\n"


@pytest.mark.parametrize(("launcher", "engine"), [("srun", FSDP2), ("deepspeed", ZERO3)])
def test_a_job_resumes_on_the_other_node_when_it_lost_one(
    cluster: Cluster, digits: Path, tmp_path: Path, uninterrupted: Job, launcher: str, engine: tuple[str, ...]
) -> None:
    job = submit(cluster, digits, tmp_path / "run", launcher, *engine, "checkpoint.every_epochs=2", nodes="1-2")
    cluster.wait_until(lambda: any(job.run_dir.glob("checkpoints/step-????????")), "the run has saved", STEP_S)
    cluster.kill_node("node2")
    try:
        job.wait_for_restart()
        job.wait()
    finally:
        cluster.start_node("node2")
    assert job.world_size == 1
    assert [line["step"] for line in metrics_of(job.run_dir)] == list(range(1, NUM_STEPS + 1))
    assert losses_of(job.run_dir) == pytest.approx(losses_of(uninterrupted.run_dir), abs=1e-3)
    assert f"{launcher} on node1 node2" in job.script_log()
    assert f"{launcher} on node1, rendezvous" in job.script_log()
