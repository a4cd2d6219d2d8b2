"""Long work in a thread of its own, which reports how far it is."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from tapt.core.errors import Cancelled
from tapt.progress import Progress as Report

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Progress:
    """phase: what is running now, in words. done, total: of this phase."""

    phase: str
    done: int
    total: int


def in_thread(
    phase: str, result: R, work: Callable[[Report], T]
) -> Generator[tuple[Progress, R], None, T]:
    """Runs `work(report)` in a thread, yields its progress beside `result` and returns its value;
    closing stops it at its next report."""
    events: queue.SimpleQueue[Progress | None] = queue.SimpleQueue()
    stop, value = threading.Event(), Future[T]()

    def report(done: int, total: int) -> None:
        if stop.is_set():
            raise Cancelled("Stopped.")
        events.put(Progress(phase, done, total))

    def run() -> None:
        try:
            value.set_result(work(report))
        except BaseException as error:
            value.set_exception(error)
        events.put(None)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while progress := events.get():
            yield progress, result
        return value.result()
    finally:
        stop.set()
        thread.join()
