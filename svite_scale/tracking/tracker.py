"""Writes a run's numbers: ``metrics.jsonl``, ``topology.jsonl`` and ``summary.json`` in the run directory, and MLflow."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from svite_scale.errors import RunError
from svite_scale.runtime.durable import make_directory, replace_durably
from svite_scale.tracking.backlog import Backlog
from svite_scale.tracking.mlflow_run import MlflowRun, Status
from svite_scale.tracking.options import TrackingConfig

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
        enabled: bool,
    ) -> None:
        """Makes the run directory and opens its files.

        Args:
            options: of tracking.
            run_dir: where the files go.
            resumed_step: lines after this step are removed from existing files; None for a new run, whose files replace them.
            config_text: the resolved config as YAML, which is written into ``config.yaml`` beside the metrics.
            parameters: the same by dotted names, for MLflow.
            enabled: whether this is the main rank.

        Raises:
            RunError: the run directory can't be written; or this is the run's first start, and MLflow can't be used.
        """
        self.run_dir, self._enabled = run_dir, enabled
        self.status: Status = "FINISHED"
        self._metrics, self._topology = MetricLines(run_dir / METRICS), MetricLines(run_dir / TOPOLOGY)
        self._mlflow: MlflowRun | None = None
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
                self._mlflow = MlflowRun(options, parameters, run_dir, resumed=resumed_step is not None)

    @property
    def ui_command(self) -> str | None:
        """The command that shows the run in a browser; None without MLflow."""
        return f"mlflow ui --backend-store-uri {self._mlflow.uri}" if self._mlflow else None

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


class MetricLines:
    """One such file. The system gets each line at once, so a kill loses none.

    Attributes:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._backlog: Backlog[bytes] = Backlog(str(path), "lines", self._write)

    def append(self, line: Mapping[str, object]) -> None:
        """Adds a line, which waits if the disk doesn't take it."""
        self._backlog.add([json.dumps(line).encode() + b"\n"])

    def close(self) -> None:
        """Writes the lines that wait, or warns that they are lost."""
        self._backlog.close()

    def cut(self, last_step: int) -> None:
        """Removes the lines after a step, and a half-written last line: a run that resumes from that step writes them again.

        Raises:
            OSError: the file can't be written. Its content is unchanged.
        """
        self._backlog.waiting = [line for line in self._backlog.waiting if is_until(last_step, line)]
        if self.path.exists():
            lines = self.path.read_bytes().splitlines()
            replace_durably(self.path, "".join(f"{line.decode()}\n" for line in lines if is_until(last_step, line)))

    def _write(self) -> None:
        with self.path.open("ab", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            content = b"".join(self._backlog.waiting)
            try:
                while content:
                    content = content[file.write(content) :]
            except OSError:
                file.truncate(size)
                raise
        self._backlog.waiting = []


def is_until(last_step: int, line: bytes) -> bool:
    """Returns whether a line is complete, and of a step up to ``last_step``."""
    try:
        return bool(json.loads(line)["step"] <= last_step)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
