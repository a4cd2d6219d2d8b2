"""How far long work has come, and how long its phases took."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

Progress = Callable[[int, int], None]
"""Called with (done, total); may raise to stop."""


def quiet(done: int, total: int) -> None:
    """Reports no progress."""


def counted(on_progress: Progress, total: int) -> Callable[[int], None]:
    """A function that adds to what is done, and reports it."""
    done = 0

    def advance(by: int) -> None:
        nonlocal done
        done += by
        on_progress(done, total)

    advance(0)
    return advance


class Clock:
    """Seconds by phase, between the laps; waits for a GPU so that its work is counted where it
    was asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict[str, float]()
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """What was done since the last lap was of this phase."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before, self._last = self._last, time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + self._last - before
