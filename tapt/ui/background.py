"""Runs a generator aside, so that the page's own generator never blocks.

Gradio can close a generator only between two of its items, and it holds a lock while it waits
for that; a long pass of a large model would stop the page for everybody.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any, TypeVar

T = TypeVar("T")
BEAT = 0.2


def with_heartbeat(steps: Generator[T, None, None], beat: float = BEAT) -> Iterator[T | None]:
    """The items of `steps`, from a thread of its own, and None whenever the next one takes longer
    than `beat` seconds.

    Closing returns at once; the thread closes `steps` at its next item.
    """
    events: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    stop = threading.Event()
    threading.Thread(target=_drain, args=(steps, events, stop), daemon=True).start()
    try:
        while True:
            try:
                kind, value = events.get(timeout=beat)
            except queue.Empty:
                yield None
                continue
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stop.set()


def _drain(steps: Generator, events: queue.SimpleQueue, stop: threading.Event) -> None:
    try:
        with closing(steps):
            for item in steps:
                if stop.is_set():
                    return
                events.put(("item", item))
        events.put(("end", None))
    except Exception as error:
        events.put(("error", error))
