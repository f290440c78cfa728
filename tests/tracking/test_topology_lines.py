"""Runs of heads and neurons record which were active after each update, through a resume too; other runs record nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ranks import run_on_ranks
from tests.runs import ENGINES, State, json_lines, resumed_run, run
from tests.tiny import tiny_config
from tests.train.test_units import UNITS


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return json_lines(run_dir / "topology.jsonl")


def assert_end_of(state: State, line: dict[str, Any]) -> None:
    """The masks of a line are those of a state."""
    masks = {name.removesuffix(".mask"): mask for name, mask in state.tensors.items() if name.endswith(".mask")}
    found = {name.rpartition(".")[0]: bytes.fromhex(mask) for name, mask in line["masks"].items()}
    assert found == {name: mask.tobytes() for name, mask in masks.items()}


@pytest.mark.parametrize(("engine", "world_size"), [("fsdp2", 2), ("zero3", 2)])
def test_topology_lines_have_every_update_of_a_resumed_run(tmp_path: Path, digits: Path, engine: str, world_size: int) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    overrides = (*ENGINES[engine], *UNITS)
    ended = run_on_ranks(world_size, run, tiny_config(digits, straight, *overrides))
    lines = lines_of(straight)
    assert [line["step"] for line in lines] == [0, 4, 8, 12, 16]
    names = [f"blocks.{block}.{units}" for block in (0, 1) for units in ("attn.heads", "mlp.neurons")]
    for line in lines:
        assert list(line["masks"]) == names
        masks = [np.frombuffer(bytes.fromhex(mask), np.uint8) for mask in line["masks"].values()]
        assert [int(np.unpackbits(mask).sum()) for mask in masks] == [4, int(0.6 * 128)] * 2
    assert len({json.dumps(line["masks"]) for line in lines}) == 5, "something moved at each update"
    assert_end_of(ended[0], lines[-1])

    run_on_ranks(world_size, run, tiny_config(digits, stopped, *overrides, "train.max_steps=6"))
    assert lines_of(stopped) == lines[:2]
    with (stopped / "topology.jsonl").open("a") as file:
        # What a kill leaves of the updates after the last checkpoint.
        file.write('{"step": 8, "masks": {}}\n{"step": 12, "ma')
    run_on_ranks(world_size, resumed_run, tiny_config(digits, stopped, *overrides))
    assert lines_of(stopped) == lines


def test_a_run_of_single_weights_writes_no_topology_lines(tmp_path: Path, digits: Path) -> None:
    run_on_ranks(1, run, tiny_config(digits, tmp_path / "run", "train.max_steps=5"))
    assert (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / "topology.jsonl").exists()
