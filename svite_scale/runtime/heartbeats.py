"""The ranks' signs of life, and which ranks are gone or stuck."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from svite_scale.runtime.activity import Phase


@dataclass(frozen=True, kw_only=True)
class Beat:
    """The sign of life that a rank writes once an interval.

    Attributes:
        sequence: grows with each beat.
        finished: True in the last beat, which a rank writes when it leaves the run.
        step, phase, progress, timed: as in :class:`~svite_scale.runtime.activity.Activity`.
    """

    rank: int
    host: str
    pid: int
    sequence: int
    step: int
    phase: Phase
    progress: int
    timed: bool
    finished: bool = False

    @property
    def process(self) -> tuple[str, int]:
        """Host and process id."""
        return self.host, self.pid

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: bytes) -> Beat:
        return cls(**json.loads(text))

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (after step {self.step}, {self.phase})"


class Heartbeats:
    """The latest beats that one rank has read. Times are seconds of that rank's clock; no two clocks are compared."""

    def __init__(self) -> None:
        self.latest: dict[int, Beat] = {}
        self._beat_at: dict[int, float] = {}
        self._progress_at: dict[int, float] = {}

    def record(self, beat: Beat, now: float) -> None:
        """Records a beat, which may be the same as before."""
        before = self.latest.get(beat.rank)
        if before is None or before.sequence != beat.sequence:
            self._beat_at[beat.rank] = now
        if before is None or before.progress != beat.progress:
            self._progress_at[beat.rank] = now
        self.latest[beat.rank] = beat

    def restart(self, now: float) -> None:
        """Counts all beats as new. For a rank that couldn't read any for a while."""
        self._beat_at = dict.fromkeys(self._beat_at, now)
        self._progress_at = dict.fromkeys(self._progress_at, now)

    def silent(self, now: float, limit: float) -> list[Beat]:
        """Returns the last beats of the ranks without a new one for more than ``limit`` seconds: killed, stopped or cut off."""
        return [beat for beat in self._present() if now - self._beat_at[beat.rank] > limit]

    def stuck(self, now: float, limit: float) -> list[Beat]:
        """Returns the beats of the ranks that hold up all others: those with the least progress, if none of them has made any
        for more than ``limit`` seconds. One rank that hangs and those that wait for it may be in the same phase.
        """
        present = self._present()
        behind = min((beat.progress for beat in present), default=0)
        ranks = [beat for beat in present if beat.progress == behind]
        return ranks if all(now - self._progress_at[beat.rank] > limit for beat in ranks) else []

    @property
    def timed(self) -> bool:
        """True if all ranks have done their first step."""
        return all(beat.timed for beat in self._present())

    def _present(self) -> list[Beat]:
        return [beat for beat in self.latest.values() if not beat.finished]


SHOWN_RANKS = 8
"""At most so many ranks are named."""


def name_ranks(beats: Iterable[Beat]) -> str:
    """Returns one line that names the ranks with their steps and phases."""
    beats = sorted(beats, key=lambda beat: beat.rank)
    more = f" and {len(beats) - SHOWN_RANKS} more" if len(beats) > SHOWN_RANKS else ""
    return ", ".join(str(beat) for beat in beats[:SHOWN_RANKS]) + more
