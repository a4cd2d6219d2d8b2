"""What the Hub's client raises, in sentences for people."""

from __future__ import annotations

import errno

import httpx2
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

STALLED = "the Hub does not answer, or sends less than 10 kB/s"
_FOREIGN = "the answer is not the Hub's (a login page of this network may have taken its place)"
_REFUSALS: dict[type[Exception], str] = {
    GatedRepoError: "{repo} is gated: accept its terms on its page of the Hub, then log in with "
    "`hf auth login` or set HF_TOKEN; the token's account must have been granted access.",
    RepositoryNotFoundError: "The Hub has no model repo {repo} that can be read; a private one "
    "needs your token.",
    RevisionNotFoundError: "{repo} has no revision {revision!r}.",
    RemoteEntryNotFoundError: "A file of {repo} is not there any more; try again.",
}
_STATUSES = {
    401: "The Hub does not accept your token: renew it with `hf auth login`, or unset HF_TOKEN.",
    403: "Your token has no right to do this with {repo}.",
    412: "{repo} was changed by somebody else in this moment; try again.",
}
_REFUSED = "The Hub refuses the request for {repo} (status {status})."
_REASONS: dict[type[Exception], str] = {
    OfflineModeIsEnabled: "offline mode is on (HF_HUB_OFFLINE)",
    FileMetadataError: _FOREIGN,
    httpx2.ConnectError: "the Hub cannot be reached",
    httpx2.ConnectTimeout: "the Hub cannot be reached",
    httpx2.TimeoutException: STALLED,
}


def refusal(error: BaseException, repo: str, revision: str | None) -> str | None:
    """The sentence for an answer of the Hub that trying again will not change."""
    if _is_page(error):
        return None
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    found = [text for kind, text in _REFUSALS.items() if isinstance(error, kind)]
    if 400 <= status < 500 and status not in (408, 429):
        found.append(_STATUSES.get(status, _REFUSED))
    return found[0].format(repo=repo, revision=revision, status=status) if found else None


def _is_page(error: BaseException) -> bool:
    """Whether a proxy or a captive portal answered, whatever the status: the Hub sends no pages."""
    return isinstance(error, HfHubHTTPError) and "text/html" in error.response.headers.get(
        "Content-Type", ""
    )


def status_reason(code: int) -> str:
    many = " (too many requests)" if code == 429 else ""
    return f"the Hub answers with status {code}{many}"


def reason(error: BaseException) -> str:
    """What stands between here and the Hub."""
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        return reason(error.__cause__)
    if isinstance(error, HfHubHTTPError) and not isinstance(error, OfflineModeIsEnabled):
        return _FOREIGN if _is_page(error) else status_reason(error.response.status_code)
    for kind, text in _REASONS.items():
        if isinstance(error, kind):
            return text
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "there is no room on the disk for the download"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "the cache folder cannot be written (set HF_HOME to one that can)"
    broken = isinstance(error, (httpx2.HTTPError, OSError))
    return "the connection to the Hub broke off" if broken else _FOREIGN
