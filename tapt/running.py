"""Long work in a thread of its own, which reports how far it is."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from tapt.core.errors import Cancelled
from tapt.progress import Progress

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Phase:
    """name: what is running now, in words. done, total: how far it is."""

    name: str
    done: int
    total: int


def in_thread(
    phase: str, result: R, work: Callable[[Progress], T]
) -> Generator[tuple[Phase, R], None, T]:
    """Runs `work(report)` in a thread, yields its progress beside `result` and returns its value;
    closing stops it at its next report."""
    events: queue.SimpleQueue[Phase | None] = queue.SimpleQueue()
    stop, value = threading.Event(), Future[T]()

    def report(done: int, total: int) -> None:
        if stop.is_set():
            raise Cancelled("Stopped.")
        events.put(Phase(phase, done, total))

    def run() -> None:
        try:
            value.set_result(work(report))
        except BaseException as error:
            value.set_exception(error)
        events.put(None)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while at := events.get():
            yield at, result
        return value.result()
    finally:
        stop.set()
        thread.join()
