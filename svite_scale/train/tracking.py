"""Where a run's numbers go: ``metrics.jsonl``, ``topology.jsonl`` and ``summary.json`` in the run directory, and MLflow."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Literal

from svite_scale.config import Config
from svite_scale.config_reader import leaf_hints, to_dict, write_config
from svite_scale.train.preemption import Preempted

METRICS, TOPOLOGY = "metrics.jsonl", "topology.jsonl"
Metrics = Mapping[str, float]
FIELDS = leaf_hints(Config).keys()


class Tracker:
    """Writes one run's metrics on the main rank; on the others it does nothing.

    ``metrics.jsonl`` holds one JSON object per logged step, appended and flushed at once, so that nothing logged is lost to a
    kill; ``topology.jsonl``, where heads or neurons are sparse, one for the start and one per topology update.
    """

    def __init__(self, config: Config, run_dir: Path, resumed_step: int | None, *, enabled: bool) -> None:
        """Makes the run directory and opens its files.

        Args:
            config: the resolved config, which is written beside the metrics.
            run_dir: where they go.
            resumed_step: lines after this step are cut from the files there; None for a new run, whose files replace them.
            enabled: whether this is the main rank.
        """
        self.run_dir = run_dir
        self._lines: IO[str] | None = None
        self._mlflow: MlflowRun | None = None
        if not enabled:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        write_config(config, run_dir / "config.yaml")
        if resumed_step is None:
            for path in (run_dir / METRICS, run_dir / TOPOLOGY):
                path.unlink(missing_ok=True)
        else:
            cut_lines(run_dir, resumed_step)
        self._lines = (run_dir / METRICS).open("a")
        if config.tracking.mlflow:
            self._mlflow = MlflowRun(config, run_dir)

    @property
    def ui_command(self) -> str | None:
        """What shows the run in a browser; None without MLflow."""
        return f"mlflow ui --backend-store-uri {self._mlflow.uri}" if self._mlflow else None

    def log(self, step: int, metrics: Metrics) -> None:
        """One line of metrics after an optimizer step."""
        if self._lines:
            self._lines.write(json.dumps({"step": step, **metrics}) + "\n")
            self._lines.flush()
        if self._mlflow:
            self._mlflow.log(step, metrics)

    def rewind(self, step: int) -> None:
        """Drops what was logged after a step to which the run has gone back. MLflow keeps it beside what is logged anew."""
        if self._lines:
            self._lines.close()
            cut_lines(self.run_dir, step)
            self._lines = (self.run_dir / METRICS).open("a")

    def log_topology(self, step: int, unit_masks: Mapping[str, bytes]) -> None:
        """One line of which heads and neurons are active after an optimizer step; none where the model has no such layers.

        Args:
            step: 0 at the start.
            unit_masks: see :meth:`~svite_scale.sparsity.topology.TopologyEngine.unit_masks`; written in hexadecimal.
        """
        if self._lines and unit_masks:
            line = {"step": step, "masks": {name: mask.hex() for name, mask in unit_masks.items()}}
            with (self.run_dir / TOPOLOGY).open("a") as lines:
                lines.write(json.dumps(line) + "\n")

    def summarize(self, summary: Mapping[str, object]) -> None:
        """Writes ``summary.json``."""
        if self._lines:
            (self.run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._lines:
            self._lines.close()
        if self._mlflow:
            self._mlflow.end("FINISHED" if kind is None else "KILLED" if kind is Preempted else "FAILED")


class MlflowRun:
    """The run in MLflow; by default in a SQLite file beside the run directories, which needs no server."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        """Goes on with the run that the run directory names, or makes one."""
        # A training job should speak to nobody it wasn't told to.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow  # takes seconds to import

        parent = run_dir.resolve().parent
        self.uri = config.tracking.uri or f"sqlite:///{parent / 'mlflow.db'}"
        self.client = mlflow.MlflowClient(self.uri)
        id_file = run_dir / "mlflow_run_id"
        if id_file.exists():
            self.run_id = id_file.read_text().strip()
            self.client.update_run(self.run_id, status="RUNNING")
        else:
            self.run_id = self._create(config, run_dir, parent)
            id_file.write_text(self.run_id + "\n")

    def _create(self, config: Config, run_dir: Path, parent: Path) -> str:
        name = config.tracking.experiment
        experiment = self.client.get_experiment_by_name(name)
        # Artifacts go beside the SQLite file; a server of the user's own has its own place for them.
        location = None if config.tracking.uri else (parent / "mlartifacts").as_uri()
        experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(name, location)
        run_id: str = self.client.create_run(experiment_id, run_name=run_dir.name).info.run_id
        for key, value in flatten_config(to_dict(config)).items():
            self.client.log_param(run_id, key, value)
        return run_id

    def log(self, step: int, metrics: Metrics) -> None:
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.run_id, [Metric(name, float(value), now, step) for name, value in metrics.items()])

    def end(self, status: Literal["FINISHED", "KILLED", "FAILED"]) -> None:
        self.client.set_terminated(self.run_id, status)


def flatten_config(nested: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """A config's fields by their dotted names; a field that is itself a mapping stays whole."""
    flat: dict[str, object] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in FIELDS:
            flat |= flatten_config(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def cut_lines(run_dir: Path, last_step: int) -> None:
    """Drops the lines after a step from a run's files: the run writes them anew."""
    for path in (run_dir / METRICS, run_dir / TOPOLOGY):
        if path.exists():
            lines = path.read_text().splitlines()
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= last_step]
            path.write_text("".join(line + "\n" for line in kept))
