"""Requests of the Hub's client in bounded time.

A job runs in a thread of its own while the caller watches it: whatever hangs (DNS, a handshake, a
server that stops sending), the caller goes on after `PATIENCE` seconds. The client's own limits
do not bound this: some of its calls have none, and others are tried again for minutes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import httpx2
from huggingface_hub import constants, logging, set_client_factory
from huggingface_hub.utils._http import default_client_factory

PATIENCE = 8.0  # seconds; an answer that is late by more counts as a fault
PROGRESS = 80_000  # bytes within PATIENCE that make a slow download and not a stall: 10 kB/s

Progress = Callable[[int, int], None]
"""Called with the bytes that have arrived and those that are to come in all."""
T = TypeVar("T")


class Stalled(Exception):
    """A request took too long. status: of the last answer, 0 before the first one."""

    def __init__(self, status: int = 0) -> None:
        super().__init__(status)
        self.status = status


class Watch:
    """What one fetch does in its thread, seen from outside."""

    def __init__(self) -> None:
        self.received = self.total = self.status = 0
        self.cancelled = self._waiting = False
        self._window, self._spent, self._since = 0, 0.0, 0.0
        self._shared: Callable[[], int] | None = None
        self._seen = 0

    def asked(self) -> None:
        if self.cancelled:
            raise Stalled
        if not self._waiting:
            self._waiting, self._since = True, time.monotonic()

    def arrived(self, size: int) -> None:
        if self.cancelled:
            raise Stalled
        self.received += size
        self._window += size
        if self._window >= PROGRESS:
            self.advanced()

    @contextmanager
    def transfer(self, shared: Callable[[], int]) -> Iterator[None]:
        """While one file arrives all time counts, also that for the lock of another process which
        fetches the same file; `shared` tells the bytes that have arrived there."""
        self.advanced()
        self._waiting, self._shared, self._seen = True, shared, shared()
        try:
            yield
        finally:
            self._waiting, self._shared = False, None
            self.advanced()

    def look(self) -> None:
        """Takes what another process has fetched for progress."""
        if shared := self._shared:
            now = shared()
            if not 0 <= now - self._seen < PROGRESS:
                self._seen = now
                self.advanced()

    def answered(self) -> None:
        """Only an answer ends the wait: pauses between retries count."""
        if self._waiting and not self._shared:
            self._waiting = False
            self._spent += time.monotonic() - self._since

    def advanced(self) -> None:
        self._window, self._spent, self._since = 0, 0.0, time.monotonic()

    def seconds(self) -> float:
        return self._spent + (time.monotonic() - self._since if self._waiting else 0.0)


_WATCH: ContextVar[Watch | None] = ContextVar("watch", default=None)


def watched(job: Callable[[Watch], T], progress: Progress | None = None) -> T:
    """The result of `job`, which talks to the Hub in a thread of its own.

    progress: called from this thread once the job has set its watch's `total`.

    Raises:
        Stalled: a request is open and less than 10 kB/s went through for `PATIENCE` seconds.
    """
    watch, future, told = Watch(), Future(), None

    def work() -> None:
        _WATCH.set(watch)
        try:
            future.set_result(job(watch))
        except BaseException as error:
            future.set_exception(error)

    # a daemon: a thread that hangs must not keep the program from ending
    threading.Thread(target=work, daemon=True).start()
    try:
        while not wait([future], 0.05).done:
            watch.look()
            if watch.seconds() > PATIENCE:
                raise Stalled(watch.status)
            if progress and watch.total and told != watch.received:
                told = watch.received
                progress(min(told, watch.total), watch.total)
        if progress and watch.total and not future.exception():
            progress(watch.total, watch.total)
        return future.result()
    finally:
        watch.cancelled = True


class _Counted(httpx2.SyncByteStream):
    """A body, of a request or a response, that tells the watch what goes through."""

    def __init__(self, stream: httpx2.SyncByteStream, watch: Watch, ok: bool) -> None:
        self.stream, self.watch, self.ok = stream, watch, ok

    def __iter__(self) -> Iterator[bytes]:
        try:
            for chunk in self.stream:
                self.watch.arrived(len(chunk))
                yield chunk
        except httpx2.ReadError as error:
            # a reset: the client resumes after this class of error and gives up after the other
            raise httpx2.RemoteProtocolError(str(error)) from error
        if self.ok:
            self.watch.answered()

    def close(self) -> None:
        self.stream.close()


def _limit(request: httpx2.Request) -> None:
    if watch := _WATCH.get():
        watch.asked()
        given = request.extensions.get("timeout", {})
        parts = ("connect", "read", "write", "pool")
        limits = {part: min(given.get(part) or PATIENCE, PATIENCE) for part in parts}
        request.extensions = {**request.extensions, "timeout": limits}
        request.stream = _Counted(request.stream, watch, ok=False)


def _count(response: httpx2.Response) -> None:
    if watch := _WATCH.get():
        watch.status = response.status_code
        # plain HTTP for files in Xet storage too: its own client has no bound on its time
        response.headers.pop("X-Xet-Hash", None)
        response.stream = _Counted(response.stream, watch, response.status_code < 400)


def _client() -> httpx2.Client:
    client = default_client_factory()
    client.event_hooks["request"].append(_limit)
    client.event_hooks["response"].append(_count)
    return client


set_client_factory(_client)
constants.DOWNLOAD_CHUNK_SIZE = 1 << 14  # by default nothing is written before 10 MB are there
logging.set_verbosity_error()  # its warnings have addresses and paths; the errors here say it all
