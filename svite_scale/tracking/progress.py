"""Progress of long work, for people: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

LINE_INTERVAL_S = 30.0
"""Seconds between two lines of progress where stderr is no terminal."""


class Progress:
    """A count of finished work on stderr, with the time left. A context: leaving it ends the bar or prints a last line.

    On a terminal it is a bar. Elsewhere, as in a file, it is a plain line every :data:`LINE_INTERVAL_S` seconds, and one at the
    end.
    """

    def __init__(self, name: str, total: int, units: str, *, done: int = 0, enabled: bool = True) -> None:
        """Begins to count.

        Args:
            name: of the work, ``"train"`` say.
            total: how many units the work has.
            units: what is counted, in the plural, ``"steps"`` say.
            done: how many units are finished already.
            enabled: False shows nothing, for all ranks but the main one.
        """
        self._name, self._total, self._units, self._enabled = name, total, units, enabled
        self._done, self._counted, self._closed = done, 0, False
        self._values: dict[str, str] = {}
        self._started = self._line_time = time.monotonic()
        self._bar: tqdm[None] | None = None
        if enabled and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, desc=name, unit=f" {units}", dynamic_ncols=True)

    def advance(self, count: int = 1) -> None:
        """Counts finished units."""
        self._done += count
        self._counted += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._enabled and self._done < self._total and time.monotonic() - self._line_time >= LINE_INTERVAL_S:
            self._line_time = time.monotonic()
            self.write(self._line())

    def rewind(self, done: int) -> None:
        """Returns to an earlier number of finished units."""
        self._done = done
        if self._bar is not None:
            self._bar.n = done
            self._bar.refresh()

    def show(self, values: Mapping[str, float]) -> None:
        """Sets numbers beside the count, by label, and keeps those of other labels. They appear with the next update."""
        self._values |= {label: f"{label} {value:.4g}" for label, value in values.items()}
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(self._values.values()), refresh=False)

    def write(self, text: str) -> None:
        """Prints lines of text to stderr, above the bar."""
        if self._bar is not None and not self._closed:
            tqdm.write(text, file=sys.stderr)
        elif self._enabled:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the bar, or prints the last line. A second call does nothing."""
        if self._bar is not None:
            self._bar.close()
        elif not self._closed:
            self.write(self._line())
        self._closed = True

    def _line(self) -> str:
        """Returns the present state as one line."""
        seconds = time.monotonic() - self._started
        rate = self._counted / seconds if seconds else 0.0
        parts = [f"{self._done:,} of {self._total:,} {self._units} ({self._done / max(self._total, 1):.0%})"]
        if self._done >= self._total:
            parts.append(f"{in_hours(seconds)} in all")
        elif rate:
            parts.append(f"{in_hours((self._total - self._done) / rate)} left")
        if rate:
            parts.append(f"{rate:.4g} {self._units}/s")
        return f"{self._name}: {', '.join([*parts, *self._values.values()])}"

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def track(items: Iterable[Item], name: str, total: int, units: str, *, enabled: bool = True) -> Iterator[Item]:
    """Yields the items, and shows as :class:`Progress` how many of them are done."""
    with Progress(name, total, units, enabled=enabled) as progress:
        for item in items:
            yield item
            progress.advance()


def in_hours(seconds: float) -> str:
    """Returns a time as ``minutes:seconds``, or ``hours:minutes:seconds`` from one hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
