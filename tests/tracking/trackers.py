"""A tracker of a config's run."""

from __future__ import annotations

from pathlib import Path

from svite_scale.config.load import flatten_config, to_dict, to_yaml
from svite_scale.config.schema import Config
from svite_scale.tracking.tracker import Tracker


def tracker_of(config: Config, run_dir: Path, resumed_step: int | None, *, enabled: bool = True) -> Tracker:
    parameters = flatten_config(to_dict(config))
    texts = {"config_text": to_yaml(config), "parameters": parameters, "tags": {"engine": "ddp", "world_size": "2"}}
    return Tracker(config.tracking, run_dir, resumed_step, **texts, enabled=enabled)
