"""Calls of the Hub's client in bounded time, and one sentence for whatever goes wrong.

A job runs in a thread of its own while the caller watches it: whatever hangs (DNS, a handshake, a
server that stops sending), the caller goes on after `PATIENCE` seconds. The client's own limits
do not bound this: some of its calls have none, and others are tried again for minutes. What this
needs of the client is set while a job runs and put back after the last one.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import httpx2
from huggingface_hub import constants, get_session
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from tapt.core.errors import Cancelled, HubError

PATIENCE = 8.0  # seconds; an answer that is late by more counts as a fault
PROGRESS = 80_000  # bytes within PATIENCE that make a slow download and not a stall: 10 kB/s
STALLED = "the Hub does not answer, or sends less than 10 kB/s"
FOREIGN = "the answer is not the Hub's (a login page of this network may have taken its place)"
NO_ROOM = "there is no room on the disk for the download"
READ_ONLY = "the cache folder cannot be written (set HF_HOME to one that can)"
# answers that trying again will not change
REFUSALS: dict[type[Exception] | int, str] = {
    GatedRepoError: "{repo} is gated: accept its terms on its page of the Hub, then log in with "
    "`hf auth login` or set HF_TOKEN; the token's account must have been granted access.",
    RepositoryNotFoundError: "The Hub has no model repo {repo} that can be read; a private one "
    "needs your token.",
    RevisionNotFoundError: "{repo} has no revision {revision!r}.",
    RemoteEntryNotFoundError: "A file of {repo} is not there any more; try again.",
    401: "The Hub does not accept your token: renew it with `hf auth login`, or unset HF_TOKEN.",
    403: "Your token has no right to do this with {repo}.",
    412: "{repo} was changed by somebody else in this moment; try again.",
}
REASONS: dict[type[Exception] | int, str] = {
    OfflineModeIsEnabled: "offline mode is on (HF_HUB_OFFLINE)",
    FileMetadataError: FOREIGN,
    httpx2.ConnectError: "the Hub cannot be reached",
    httpx2.ConnectTimeout: "the Hub cannot be reached",
    httpx2.TimeoutException: STALLED,
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), NO_ROOM),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), READ_ONLY),
    httpx2.HTTPError: "the connection to the Hub broke off",
    OSError: "the connection to the Hub broke off",
}
T = TypeVar("T")


class Unavailable(HubError):
    """No fault of the request: the network, the Hub or the disk. `reason` fits after "and"."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason[0].upper()}{reason[1:]}.")
        self.reason = reason


def ask_hub(
    job: Callable[[], T],
    repo: str = "this",
    revision: str | None = None,
    arrived: Callable[[], int] = lambda: 0,
) -> T:
    """The result of `job`, which talks to the Hub in a thread of its own.

    repo, revision: for messages.
    arrived: asked from this thread for the bytes on the disk by now, whoever has fetched them.

    Raises `HubError` for refusals, and `Unavailable` for faults after which a cached copy may
    stand in, among them less than 10 kB/s for `PATIENCE` seconds.
    """
    call, future = _Call(), Future[T]()

    def work() -> None:
        _CALL.set(call)
        try:
            with _guest():
                result = job()
            future.set_result(result)
        except BaseException as error:
            future.set_exception(error)

    before = arrived()
    # a daemon: a thread that hangs must not keep the program from ending
    threading.Thread(target=work, daemon=True).start()
    try:
        while not wait([future], 0.05).done:
            _attach()  # the client makes itself anew after some faults
            if abs((now := arrived()) - before) >= PROGRESS:
                before = now
                call.advance()
            if time.monotonic() > call.deadline:  # after an error the client tries again and again
                raise Unavailable(_status(call.status) if call.status >= 400 else STALLED)
        return future.result()
    except (httpx2.HTTPError, OSError, ValueError, TypeError, RuntimeError) as error:
        raise _explained(error, repo, revision) from error
    finally:
        call.cancelled = True


def _explained(error: BaseException, repo: str, revision: str | None) -> HubError:
    """What the client has raised, in words."""
    if isinstance(error, (RuntimeError, LocalEntryNotFoundError)) and error.__cause__:
        error = error.__cause__  # wrapped by an upload, or by a look into the cache
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if "text/html" in error.response.headers.get("Content-Type", ""):
            return Unavailable(FOREIGN)  # a proxy or a captive portal, whatever its status
        known = (text for kind, text in REFUSALS.items() if _fits(error, kind, status))
        if 400 <= status < 500 and status not in (408, 429):
            text = next(known, f"The Hub refuses the request for {{repo}} (status {status}).")
            return HubError(text.format(repo=repo, revision=revision))
        return Unavailable(_status(status))
    number = getattr(error, "errno", None)
    reasons = (text for kind, text in REASONS.items() if _fits(error, kind, number))
    return Unavailable(next(reasons, FOREIGN))


def _fits(error: BaseException, kind: type[Exception] | int, number: int | None) -> bool:
    return kind == number if isinstance(kind, int) else isinstance(error, kind)


def _status(code: int) -> str:
    return f"the Hub answers with status {code}" + (" (too many requests)" if code == 429 else "")


class _Call:
    """What one job does in its thread, seen from outside."""

    def __init__(self) -> None:
        self.status = 0
        self.cancelled = False
        self.advance()

    def advance(self) -> None:
        self._moved, self.deadline = 0, time.monotonic() + PATIENCE

    def move(self, size: int) -> None:
        """Counts bytes of a request or an answer; ends a job that nobody waits for."""
        if self.cancelled:
            raise Cancelled("Nobody waits for this any more.")
        self._moved += size
        if self._moved >= PROGRESS:
            self.advance()


_CALL: ContextVar[_Call | None] = ContextVar("call", default=None)
_LOCK = threading.Lock()
_SAVED: list[tuple[int, int, bool]] = []  # the host's settings, once for each job that runs


@contextmanager
def _guest() -> Iterator[None]:
    logger = logging.getLogger("huggingface_hub")
    with _LOCK:
        own = constants.DOWNLOAD_CHUNK_SIZE, logger.level, are_progress_bars_disabled()
        _SAVED.append(_SAVED[-1] if _SAVED else own)
        constants.DOWNLOAD_CHUNK_SIZE = 1 << 14  # on the disk, nothing is seen before a whole one
        logger.setLevel(logging.ERROR)  # warnings have addresses and paths; our errors say it all
        disable_progress_bars()
    _attach()
    try:
        yield
    finally:
        with _LOCK:
            chunk, level, silent = _SAVED.pop()
            if not _SAVED:
                constants.DOWNLOAD_CHUNK_SIZE = chunk
                logger.setLevel(level)
                if not silent:
                    enable_progress_bars()
        _attach()


def _attach() -> None:
    """Hooks the client that all of the program shares, while a job of ours runs."""
    with _LOCK:
        hooks = get_session().event_hooks
        for kind, own in (("request", _limit), ("response", _count)):
            others = [hook for hook in hooks[kind] if hook is not own]
            hooks[kind] = [*others, own] if _SAVED else others


class _Counted(httpx2.SyncByteStream):
    """The body of a request or an answer; its bytes are counted as they go through."""

    def __init__(self, stream: httpx2.SyncByteStream, call: _Call) -> None:
        self.stream, self.call = stream, call

    def __iter__(self) -> Iterator[bytes]:
        try:
            for chunk in self.stream:
                self.call.move(len(chunk))
                yield chunk
        except httpx2.ReadError as error:
            # a reset: the client resumes after this class of error and gives up after the other
            raise httpx2.RemoteProtocolError(str(error)) from error

    def close(self) -> None:
        self.stream.close()


def _limit(request: httpx2.Request) -> None:
    if call := _CALL.get():
        call.move(0)
        given = request.extensions.get("timeout", {})
        parts = ("connect", "read", "write", "pool")
        limits = {part: min(given.get(part) or PATIENCE, PATIENCE) for part in parts}
        request.extensions = {**request.extensions, "timeout": limits}
        request.stream = _Counted(request.stream, call)  # type: ignore[arg-type]


def _count(response: httpx2.Response) -> None:
    if call := _CALL.get():
        call.status = response.status_code
        if call.status < 300:
            call.advance()
        # plain HTTP for files in Xet storage too: its own client has no bound on its time
        response.headers.pop("X-Xet-Hash", None)
        response.stream = _Counted(response.stream, call)  # type: ignore[arg-type]
