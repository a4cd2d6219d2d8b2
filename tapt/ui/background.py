"""Runs requests aside, one after the other, so that the page's own generators never block.

Gradio can close a generator only between two of its items, and it holds a lock while it waits
for that; a long pass of a large model would stop the page for everybody.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from copy import deepcopy
from functools import partial
from typing import Any, TypeVar

from tapt.comparison import Comparison
from tapt.core.errors import InputError
from tapt.evaluation.sweep import Sweep, sweep_steps
from tapt.model import Model
from tapt.running import Phase, in_thread
from tapt.ui import on_gpu
from tapt.ui.inputs import Request, in_words, read_request, refusal
from tapt.ui.service import Service

T = TypeVar("T")
Steps = Generator[tuple[Phase, Any], None, None]
BEAT = 0.2
MAX_WAITING = 24
# of gradio's own, for events that run; each waits for its turn here, since a download must not
# keep the others waiting. Raw values: the handlers say what is wrong with each one.
QUEUE: dict[str, Any] = {"concurrency_limit": 16, "concurrency_id": "runs"}


class Runs:
    """Runs requests, one at a time and in the order in which they came.

    uploads: the folder that pictures of requests may be read from.
    """

    def __init__(self, service: Service, uploads: str) -> None:
        self.service, self.uploads = service, uploads
        self._line: list[object] = []
        self._on_gpu = on_gpu(self._steps, self._duration)

    def request(self, values: Mapping[str, object]) -> Request:
        """A checked request; raises `InputError`."""
        return read_request(values, self.uploads)

    def compare(self, request: Request) -> Iterator[tuple[Phase | None, Comparison | None]]:
        """Progress beside what is there by then, which may be read while the run goes on; no
        progress where the next step takes its time. Raises gradio's errors alone.

        The phases before the first step: `download` with bytes, and `waiting` with how many runs
        come first.
        """
        for progress, result in self._run(request, sweeps=False):
            if result is not None and result.finished:
                self.service.remember(request, result)
            yield progress, result

    def sweep(self, request: Request) -> Iterator[tuple[Phase | None, Sweep | None]]:
        """The same for a sweep over the request's epsilons."""
        if request.attack is None:
            raise refusal("Choose an attack first: a sweep shows what more of it does.")
        yield from self._run(request, sweeps=True)

    def load(self, backbone: str, pack: str) -> Generator[tuple[Phase, None], None, Model]:
        """Loads a model beside all that runs, and returns it."""

        def load(report: Callable[[int, int], None]) -> Model:
            return self.service.model(backbone, pack, report)

        return (yield from in_thread("download", None, load))

    def _run(self, request: Request, sweeps: bool) -> Iterator[tuple[Phase | None, Any]]:
        def work() -> Steps:
            yield from self.load(request.fields.backbone, request.fields.pack)  # not in a fork
            if len(self._line) >= MAX_WAITING:
                raise InputError("The queue is full: too many runs are waiting. Try again later.")
            place = object()
            self._line.append(place)
            try:
                while ahead := self._line.index(place):
                    yield Phase("waiting", ahead, 0), None
                    time.sleep(BEAT / 4)
                with closing(self._on_gpu(request, sweeps)) as steps:
                    yield from steps
            finally:
                self._line.remove(place)

        result = None
        with in_words():
            for step in with_heartbeat(work()):
                progress, result = step or (None, result)
                yield progress, result

    def _steps(self, request: Request, sweeps: bool) -> Steps:
        attack, asked = request.attack, request.fields
        with in_words():  # another process can only hand on gradio's own errors
            compute: Any = Model.compare_steps
            if sweeps:
                compute = partial(sweep_steps, epsilons=request.epsilons)
            steps = compute(
                self.service.model(asked.backbone, asked.pack),
                request.picture,
                request.classes,
                attack=attack,
                attacked=asked.attacked_model,
                label=request.label,
                target=request.target,
                defenses=asked.defenses,
                settings=asked.settings,
                seed=asked.seed,
            )
            with closing(steps):
                for progress, result in steps:
                    yield progress, deepcopy(result)  # to be read while the run goes on

    def _duration(self, request: Request, sweeps: bool) -> int:
        """Seconds of a GPU to ask for."""
        attacks = len(request.epsilons) if sweeps else 1
        return min(300, 15 + int(2 * (self.service.estimate(request, attacks) or 45)))


def with_heartbeat(steps: Generator[T, None, object], beat: float = BEAT) -> Iterator[T | None]:
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


def _drain(
    steps: Generator, events: queue.SimpleQueue[tuple[str, Any]], stop: threading.Event
) -> None:
    try:
        with closing(steps):
            for item in steps:
                if stop.is_set():
                    return
                events.put(("item", item))
        events.put(("end", None))
    except Exception as error:
        events.put(("error", error))
