"""How long work on files tells what it is doing."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

_WINDOW_SECONDS = 5.0
_INTERVAL_SECONDS = 0.1


class Progress(Protocol):
    """What a caller passes to see progress. Called from the thread that does the work."""

    def status(self, text: str) -> None:
        """One sentence on what happens now: a source, a wait, a retry."""

    def transfer(self, label: str, done: int, total: int, speed: float) -> None:
        """``done`` of ``total`` bytes of ``label`` are here, at ``speed`` bytes per second."""


class Silent:
    """Progress that nobody sees."""

    def status(self, text: str) -> None:
        """Ignore."""

    def transfer(self, label: str, done: int, total: int, speed: float) -> None:
        """Ignore."""


class Meter:
    """Turns byte counts into Progress.transfer calls, at most ten a second, with the speed of the last five seconds."""

    def __init__(self, progress: Progress, label: str, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.progress, self.label, self.total = progress, label, total
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque()

    def update(self, done: int) -> None:
        """Tell that ``done`` bytes are here; fewer than before means that the work began anew."""
        now = self._clock()
        if self._seen and done < self._seen[-1][1]:
            self._seen.clear()
        if self._seen and now - self._seen[-1][0] < _INTERVAL_SECONDS and done < self.total:
            return
        self._seen.append((now, done))
        while now - self._seen[0][0] > _WINDOW_SECONDS and len(self._seen) > 2:
            self._seen.popleft()
        first_time, first_done = self._seen[0]
        speed = (done - first_done) / (now - first_time) if now > first_time else 0.0
        self.progress.transfer(self.label, done, self.total, speed)
