"""The progress bar of a run, on the main rank."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from tqdm import tqdm

SHOWN = {
    "loss": "loss",
    "accuracy": "accuracy",
    "eval_accuracy": "test accuracy",
    "samples_per_second": "samples/s",
    "density": "density",
}
"""Metrics beside the bar, and their names there."""

LOG_INTERVAL_S = 30.0
"""Seconds between two lines of progress when the output is a file."""


class Progress:
    """A bar with steps done, time left, and the latest metrics. Silent on all ranks but the main one."""

    def __init__(self, total_steps: int, first_step: int, enabled: bool) -> None:
        self.enabled = enabled
        interval = 0.1 if sys.stderr.isatty() else LOG_INTERVAL_S
        self.bar = tqdm(
            total=total_steps, initial=first_step, disable=not enabled, unit="step", mininterval=interval, dynamic_ncols=True
        )
        self.shown: dict[str, str] = {}

    def advance(self) -> None:
        """Counts one optimizer step."""
        self.bar.update()

    def rewind(self, step: int) -> None:
        """Goes back to an earlier step."""
        self.bar.n = step
        self.bar.refresh()

    def show(self, metrics: Mapping[str, float]) -> None:
        """Updates the metrics beside the bar."""
        self.shown.update({label: f"{metrics[name]:.4g}" for name, label in SHOWN.items() if name in metrics})
        self.bar.set_postfix(self.shown, refresh=False)

    def write(self, line: str) -> None:
        """Prints a line above the bar."""
        if self.enabled:
            tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        self.bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
