"""Traces of some optimizer steps."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
import torch
from torch.profiler import record_function

from svite_scale.config.schema import Config
from svite_scale.errors import ConfigError
from svite_scale.runtime.world import World
from svite_scale.train.profile import StepProfiler, parse_steps
from svite_scale.train.trainer import Trainer
from tests.command_line import run_here
from tests.ranks import run_on_ranks
from tests.tiny import tiny_config


def profiled_run(config: Config, steps: range) -> str:
    """Trains; returns the profiler's note. A collective."""
    trainer = Trainer(config, World.from_environment(), torch.device("cpu"), resume=False, profile=steps)
    trainer.run()
    return trainer.profiler.note


def annotations(path: Path) -> list[str]:
    """Returns the names of the annotated parts of a trace."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return [event["name"] for event in events if event.get("cat") == "user_annotation"]


def test_profile_writes_a_trace_of_these_steps_on_each_rank(digits: Path, tmp_path: Path) -> None:
    run_dir, steps = tmp_path / "run", range(3, 5)
    config = tiny_config(digits, run_dir, "parallel.backend=fsdp2", "train.max_steps=5")
    notes = run_on_ranks(2, profiled_run, config, steps)
    name = f"steps-{steps[0]}-{steps[-1]}"
    paths = sorted((run_dir / "profile").iterdir())
    assert [path.name for path in paths] == [f"{name}.rank-0.json.gz", f"{name}.rank-1.json.gz"]
    for path in paths:
        names = annotations(path)
        assert sorted(name for name in names if name.startswith("ProfilerStep#")) == [f"ProfilerStep#{step}" for step in steps]
        assert sum(name.startswith("Optimizer.step#") for name in names) == len(steps)
    assert f"{run_dir}/profile, a file for each rank; open one at https://ui.perfetto.dev" in notes[0]


@pytest.mark.parametrize(("done", "steps"), [(0, range(1, 2)), (0, range(2, 4)), (7, range(8, 9)), (7, range(10, 12))])
def test_profile_traces_these_steps_and_names_them_by_their_numbers(tmp_path: Path, done: int, steps: range) -> None:
    with StepProfiler(steps, tmp_path, 0, done=done, last_step=12) as profiler:
        for step in range(done + 1, 13):
            with record_function(f"work of {step}"):
                torch.ones(2).sum()
            profiler.end_step()
    (path,) = tmp_path.iterdir()
    names = [name for name in annotations(path) if name.startswith(("work", "ProfilerStep"))]
    assert sorted(names) == sorted(name for step in steps for name in (f"work of {step}", f"ProfilerStep#{step}"))


@pytest.mark.slow
def test_command_traces_the_steps_that_it_names(config_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = config_path.parent / "run"
    answer = run_here(capsys, "--config", str(config_path), "--profile", "2-3", "train.max_steps=3")
    assert answer.status == 0, answer.err
    assert answer.err.count(f"a trace of steps 2-3 goes into {run_dir}/profile, a file for each rank; open one at") == 1
    assert [path.name for path in (run_dir / "profile").iterdir()] == ["steps-2-3.rank-0.json.gz"]


@pytest.mark.parametrize("steps", ["2-", "3-4"])
def test_command_refuses_to_trace_steps_that_are_none_and_leaves_no_file(
    config_path: Path, capsys: pytest.CaptureFixture[str], steps: str
) -> None:
    answer = run_here(capsys, "--config", str(config_path), "--profile", steps, "train.max_steps=3")
    assert (answer.status, answer.out) == (2, "")
    assert answer.err.startswith(f"config error: --profile = '{steps}': ")
    assert answer.err.count("\n") == 1
    assert not (config_path.parent / "run").exists()


def test_profile_refuses_steps_beyond_the_last_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape("--profile = '15-17': goes beyond the last step, 16")):
        StepProfiler(range(15, 18), tmp_path, 0, done=0, last_step=16)


def test_profile_says_that_there_is_no_trace_when_a_resumed_run_has_done_the_step(tmp_path: Path) -> None:
    with StepProfiler(range(3, 5), tmp_path, 0, done=3, last_step=16) as profiler:
        profiler.end_step()
    assert profiler.note == "no trace: step 3 of --profile 3-4 is done already"
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("error")
def test_profile_warns_of_a_trace_that_cannot_be_written_and_the_run_continues(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "profile").write_text("a file where the folder should be")
    with StepProfiler(range(2, 3), tmp_path / "profile", 0, done=0, last_step=3) as profiler:
        for _ in range(3):
            profiler.end_step()
    assert len(caplog.messages) == 1
    assert "steps-2-2.rank-0.json.gz can't be written" in caplog.messages[0]


@pytest.mark.parametrize(("text", "steps"), [("12", range(12, 13)), ("10-12", range(10, 13)), ("7-7", range(7, 8))])
def test_parse_steps_reads_a_step_or_a_range(text: str, steps: range) -> None:
    assert parse_steps(text) == steps


@pytest.mark.parametrize("text", ["", "0", "3-", "4-3", "1-2-3", "a", "-1", "1.5", "\u0663"])
def test_parse_steps_refuses_anything_else(text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"--profile = {text!r}: is neither a step nor a range of steps")):
        parse_steps(text)
