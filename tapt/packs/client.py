"""Calls of the Hub's client in bounded time.

A job runs in a thread of its own while the caller watches it: whatever hangs (DNS, a handshake, a
server that stops sending), the caller goes on after `PATIENCE` seconds. The client's own limits
do not bound this: some of its calls have none, and others are tried again for minutes. What this
needs of the client is set while a job runs and put back after the last one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import httpx2
from huggingface_hub import constants, get_session

PATIENCE = 8.0  # seconds; an answer that is late by more counts as a fault
PROGRESS = 80_000  # bytes within PATIENCE that make a slow download and not a stall: 10 kB/s

T = TypeVar("T")


class Stalled(Exception):
    """A request took too long. status: of the last answer, 0 before the first one."""

    def __init__(self, status: int = 0) -> None:
        super().__init__(status)
        self.status = status


class _Call:
    """What one job does in its thread, seen from outside."""

    def __init__(self) -> None:
        self.received = self.status = 0
        self.cancelled = False
        self.advance()

    def advance(self) -> None:
        self._window, self._since = 0, time.monotonic()

    def move(self, size: int) -> None:
        """Counts bytes of a request or an answer; ends a job that nobody waits for."""
        if self.cancelled:
            raise Stalled
        self.received += size
        self._window += size
        if self._window >= PROGRESS:
            self.advance()

    @property
    def late(self) -> bool:
        return time.monotonic() - self._since > PATIENCE


_CALL: ContextVar[_Call | None] = ContextVar("call", default=None)
_LOCK = threading.Lock()
_SAVED: list[tuple[int, int]] = []  # the host's settings, once for each job that runs


def bounded(
    job: Callable[[], T],
    *,
    on_bytes: Callable[[int], None] = lambda received: None,
    elsewhere: Callable[[], int] = lambda: 0,
) -> T:
    """The result of `job`, which talks to the Hub in a thread of its own.

    on_bytes: called from this thread with the bytes that have gone through.
    elsewhere: bytes that another process has for us by now; their growth is progress, too.

    Raises `Stalled`: less than 10 kB/s for `PATIENCE` seconds, and nothing was answered.
    """
    call, future = _Call(), Future[T]()

    def work() -> None:
        _CALL.set(call)
        try:
            with _guest():
                result = job()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    before, reported = elsewhere(), 0
    # a daemon: a thread that hangs must not keep the program from ending
    threading.Thread(target=work, daemon=True).start()
    try:
        while not wait([future], 0.05).done:
            _attach()  # the client makes itself anew after some faults
            if abs((now := elsewhere()) - before) >= PROGRESS:
                before = now
                call.advance()
            if call.late:
                raise Stalled(call.status)
            if reported != call.received:
                reported = call.received
                on_bytes(reported)
        return future.result()
    finally:
        call.cancelled = True


@contextmanager
def _guest() -> Iterator[None]:
    logger = logging.getLogger("huggingface_hub")
    with _LOCK:
        _SAVED.append(_SAVED[-1] if _SAVED else (constants.DOWNLOAD_CHUNK_SIZE, logger.level))
        constants.DOWNLOAD_CHUNK_SIZE = 1 << 14  # others see nothing before 10 MB are there
        logger.setLevel(logging.ERROR)  # warnings have addresses and paths; our errors say it all
    _attach()
    try:
        yield
    finally:
        with _LOCK:
            before = _SAVED.pop()
            if not _SAVED:
                constants.DOWNLOAD_CHUNK_SIZE = before[0]
                logger.setLevel(before[1])
        _attach()


def _attach() -> None:
    """Hooks the client that all of the program shares, while a job of ours runs."""
    with _LOCK:
        client = get_session()
        hooks: dict[str, list[Any]] = client.event_hooks
        wanted = {"request": _limit, "response": _count}
        if _SAVED and _limit in hooks["request"]:
            return
        own = {kind: [hook for hook in hooks[kind] if hook is not wanted[kind]] for kind in wanted}
        if _SAVED:
            own = {kind: [*own[kind], wanted[kind]] for kind in wanted}
        client.event_hooks = own


class _Counted(httpx2.SyncByteStream):
    """The body of a request or an answer; its bytes are counted as they go through."""

    def __init__(self, stream: httpx2.SyncByteStream, call: _Call, answered: bool) -> None:
        self.stream, self.call, self.answered = stream, call, answered

    def __iter__(self) -> Iterator[bytes]:
        try:
            for chunk in self.stream:
                self.call.move(len(chunk))
                yield chunk
        except httpx2.ReadError as error:
            # a reset: the client resumes after this class of error and gives up after the other
            raise httpx2.RemoteProtocolError(str(error)) from error
        if self.answered:
            self.call.advance()

    def close(self) -> None:
        self.stream.close()


def _limit(request: httpx2.Request) -> None:
    if call := _CALL.get():
        call.move(0)
        given = request.extensions.get("timeout", {})
        parts = ("connect", "read", "write", "pool")
        limits = {part: min(given.get(part) or PATIENCE, PATIENCE) for part in parts}
        request.extensions = {**request.extensions, "timeout": limits}
        request.stream = _Counted(request.stream, call, False)  # type: ignore[arg-type]


def _count(response: httpx2.Response) -> None:
    if call := _CALL.get():
        call.status = response.status_code
        # plain HTTP for files in Xet storage too: its own client has no bound on its time
        response.headers.pop("X-Xet-Hash", None)
        ok = response.status_code < 400
        response.stream = _Counted(response.stream, call, ok)  # type: ignore[arg-type]
