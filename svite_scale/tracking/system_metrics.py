"""The load of the machine while a run trains on it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

SAMPLE_S = 10.0
"""Seconds between two measurements, unless ``MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL`` says otherwise."""

STOP_S = 5.0
"""Longest wait in seconds for the last measurement."""


class SystemMetrics:
    """Measures this machine every few seconds, in a thread of its own: processor, memory, disk, network, and each GPU where
    there is one. MLflow's own monitors measure, so its page shows the values under "System metrics".
    """

    def __init__(self, log: Callable[[Mapping[str, float]], None]) -> None:
        """Starts to measure, unless ``MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING`` is false.

        Args:
            log: called with each measurement, in the thread.
        """
        from mlflow import environment_variables as environment

        enabled = environment.MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
        self._log, self._ends = log, threading.Event()
        self._monitors = monitors()
        self._interval = environment.MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or SAMPLE_S
        self._thread = threading.Thread(target=self._work, name="system metrics", daemon=True)
        if enabled.get() or not enabled.is_set():
            self._thread.start()

    def stop(self) -> None:
        """Measures once more, and ends the thread. Leaves it alone if a driver doesn't answer."""
        self._ends.set()
        if self._thread.is_alive():
            self._thread.join(STOP_S)

    def _work(self) -> None:
        self._measure()  # the processor's load is measured from here on; its first value says nothing
        is_last = False
        while not is_last:
            is_last = self._ends.wait(self._interval)
            self._log(self._measure())

    def _measure(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            found |= {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        return found


def monitors() -> list[Any]:
    """Returns MLflow's monitors of what this machine has."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

    found = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    for kind in (GPUMonitor, ROCMMonitor):
        with suppress(Exception):  # without such a GPU, or without its driver's library
            found.append(kind())
    return found
