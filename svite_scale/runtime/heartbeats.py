"""Signs of life of the ranks, and what they tell of one that is gone or stuck."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from svite_scale.runtime.activity import Phase


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank says of itself every few moments.

    Attributes:
        sequence: grows with each beat.
        finished: whether the rank has left the run, so that none will follow.
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
        """Host, and number there."""
        return self.host, self.pid

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: bytes) -> Beat:
        return cls(**json.loads(text))

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (after step {self.step}, {self.phase})"


class Heartbeats:
    """The latest beat of each rank that one rank reads. Times are seconds of its own clock; no two clocks are compared."""

    def __init__(self) -> None:
        self.latest: dict[int, Beat] = {}
        self._beat_at: dict[int, float] = {}
        self._progress_at: dict[int, float] = {}

    def see(self, beat: Beat, now: float) -> None:
        """Takes a beat that may be the same as before."""
        before = self.latest.get(beat.rank)
        if before is None or before.sequence != beat.sequence:
            self._beat_at[beat.rank] = now
        if before is None or before.progress != beat.progress:
            self._progress_at[beat.rank] = now
        self.latest[beat.rank] = beat

    def restart(self, now: float) -> None:
        """Takes all ranks as just heard: after a time in which this rank couldn't listen itself."""
        self._beat_at = dict.fromkeys(self._beat_at, now)
        self._progress_at = dict.fromkeys(self._progress_at, now)

    def silent(self, now: float, limit: float) -> list[Beat]:
        """Last beats of the ranks that have been silent for longer than ``limit`` seconds: killed, stopped, or off the net."""
        return [beat for beat in self._present() if now - self._beat_at[beat.rank] > limit]

    def stuck(self, now: float, limit: float) -> list[Beat]:
        """Beats of the ranks that hold up the others: those with the least progress, if it is older than ``limit`` seconds."""
        present = self._present()
        behind = min((beat.progress for beat in present), default=0)
        ranks = [beat for beat in present if beat.progress == behind]
        return [beat for beat in ranks if now - self._progress_at[beat.rank] > limit]

    @property
    def timed(self) -> bool:
        """Whether all ranks are past their first step."""
        return all(beat.timed for beat in self._present())

    def _present(self) -> list[Beat]:
        return [beat for beat in self.latest.values() if not beat.finished]


SHOWN_RANKS = 8
"""So many are named, of several that are silent or stuck."""


def name_ranks(beats: Iterable[Beat]) -> str:
    """The ranks with what they were doing, in one line."""
    beats = sorted(beats, key=lambda beat: beat.rank)
    more = f" and {len(beats) - SHOWN_RANKS} more" if len(beats) > SHOWN_RANKS else ""
    return ", ".join(str(beat) for beat in beats[:SHOWN_RANKS]) + more
