"""Writes a run's numbers: ``metrics.jsonl``, ``topology.jsonl`` and ``summary.json`` in the run directory, and MLflow."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from svite_scale.errors import RunError
from svite_scale.runtime.durable import make_directory
from svite_scale.tracking.metric_lines import MetricLines
from svite_scale.tracking.mlflow_queue import MlflowQueue
from svite_scale.tracking.mlflow_run import RUN_ID_FILE, MlflowRun, Status, Store
from svite_scale.tracking.options import TrackingConfig
from svite_scale.tracking.tags import start_tags

METRICS, TOPOLOGY = "metrics.jsonl", "topology.jsonl"
Metrics = Mapping[str, float]


class Tracker:
    """Writes one run's metrics on the main rank; does nothing on the others. A context: leaving it ends the run in MLflow.

    ``metrics.jsonl`` holds one JSON object per logged step. ``topology.jsonl`` holds one for the start and one per topology
    update, if heads or neurons are sparse.

    Attributes:
        status: of the run in MLflow at the end; ``FAILED`` if an error leaves the context.
    """

    def __init__(
        self,
        options: TrackingConfig,
        run_dir: Path,
        resumed_step: int | None,
        *,
        config_text: str,
        parameters: Mapping[str, object],
        tags: Mapping[str, str],
        enabled: bool,
    ) -> None:
        """Makes the run directory and opens its files.

        Args:
            options: of tracking.
            run_dir: where the files go.
            resumed_step: lines after this step are removed from existing files; None for a new run, whose files replace them.
            config_text: the resolved config as YAML, which is written into ``config.yaml`` beside the metrics.
            parameters: the same by dotted names, for MLflow.
            tags: of this start, for MLflow, besides those that :func:`~svite_scale.tracking.tags.start_tags` finds.
            enabled: whether this is the main rank.

        Raises:
            RunError: the run directory can't be written; or this is the run's first start, and MLflow can't be used.
        """
        self.run_dir, self._enabled = run_dir, enabled
        self.status: Status = "FINISHED"
        self._metrics, self._topology = MetricLines(run_dir / METRICS), MetricLines(run_dir / TOPOLOGY)
        self._mlflow: MlflowQueue | None = None
        if not enabled:
            return
        with self._writing_run_dir():
            make_directory(run_dir)
            (run_dir / "config.yaml").write_text(config_text, encoding="utf-8")
            for lines in (self._metrics, self._topology):
                if resumed_step is None:
                    lines.path.unlink(missing_ok=True)
                else:
                    lines.cut(resumed_step)
            if options.mlflow:
                run = MlflowRun(Store(options, run_dir), run_dir, parameters, {**start_tags(), **tags})
                first_start = resumed_step is None and not (run_dir / RUN_ID_FILE).exists()
                self._mlflow = MlflowQueue(run, first_start=first_start)

    @property
    def ui_command(self) -> str | None:
        """How to see the run in a browser, if MLflow is on: :attr:`svite_scale.tracking.mlflow_run.Store.ui_command`."""
        return self._mlflow.ui_command if self._mlflow else None

    def log(self, step: int, metrics: Metrics) -> None:
        """Logs metrics after an optimizer step."""
        if self._enabled:
            self._metrics.append({"step": step, **metrics})
        if self._mlflow:
            self._mlflow.log(step, metrics)

    def rewind(self, step: int) -> None:
        """Removes what was logged after a step to which the run has rolled back. MLflow keeps it beside what is logged again.

        Raises:
            RunError: the run directory can't be written.
        """
        if self._enabled:
            with self._writing_run_dir():
                for lines in (self._metrics, self._topology):
                    lines.cut(step)

    def log_topology(self, step: int, unit_masks: Mapping[str, bytes]) -> None:
        """Logs which heads and neurons are active after an optimizer step; nothing if the model has no such layers.

        Args:
            step: 0 at the start.
            unit_masks: see :meth:`~svite_scale.sparsity.topology.engine.TopologyEngine.unit_masks`; written in hexadecimal.
        """
        if self._enabled and unit_masks:
            self._topology.append({"step": step, "masks": {name: mask.hex() for name, mask in unit_masks.items()}})

    def summarize(self, summary: Mapping[str, object]) -> None:
        """Writes ``summary.json``.

        Raises:
            RunError: the run directory can't be written.
        """
        if self._enabled:
            with self._writing_run_dir():
                (self.run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")

    @contextmanager
    def _writing_run_dir(self) -> Iterator[None]:
        """Turns an OSError into a RunError."""
        try:
            yield
        except OSError as error:
            problem = f"run_dir = {str(self.run_dir)!r} can't be written ({error}); free or mount the disk"
            raise RunError(problem) from error

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._enabled:
            self._metrics.close()
            self._topology.close()
        if self._mlflow:
            self._mlflow.end("FAILED" if error and self.status == "FINISHED" else self.status)
