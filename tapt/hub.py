"""Files from the Hugging Face Hub: one commit, sizes and checksums checked, in bounded time."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import httpx2
from huggingface_hub import (
    HfApi,
    constants,
    get_session,
    hf_hub_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import hf_raise_for_status, validate_repo_id
from tqdm import tqdm

from tapt.errors import HubError
from tapt.files import file_sha256, git_sha1, write_file
from tapt.watch import Progress, Stalled, Watch, watched

_ID = re.compile(r"([\w.-]+/[\w.-]+)((?:/[\w.-]+)*)(?:@([\w./-]+))?", re.ASCII)
_STALLED = "the Hub does not answer, or sends less than 10 kB/s"
_NO_BAR = partial(tqdm, disable=True)  # the watch tells the progress
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)

Token = str | bool | None
"""False for no token, None for the user's own from the usual places."""
T = TypeVar("T")


class HubId(NamedTuple):
    """`owner/repo[/subfolder][@revision]`, taken apart."""

    repo: str
    subfolder: str
    revision: str | None


@dataclass(frozen=True)
class Origin:
    """What was fetched, for people.

    size: of the files, in bytes.
    cached: nothing had to be downloaded.
    fault: why the local cache stands in for the Hub, None where it does not.
    """

    repo: str
    commit: str
    size: int
    cached: bool
    fault: str | None = None

    def __str__(self) -> str:
        cache = ", from the local cache" if self.cached else ""
        fault = f": {self.fault}" if self.fault else ""
        return f"{self.repo} at commit {self.commit[:7]} ({self.size / 1e6:.1f} MB{cache}{fault})"


@dataclass(frozen=True)
class Snapshot:
    """Checked files of one commit in one folder.

    checksums: per file name SHA-256 for large files and git's SHA-1 for others, where known.
    """

    folder: Path
    origin: Origin
    checksums: Mapping[str, str]

    def sha256(self, name: str) -> str:
        known = self.checksums.get(name, "")
        return known if len(known) == 64 else file_sha256(self.folder / name)


def parse_id(text: str) -> HubId | None:
    """Takes a Hub id apart; None for anything that is not one."""
    match = _ID.fullmatch(text)
    if match is None:
        return None
    repo, subfolder, revision = match.groups()
    parts = [*subfolder.split("/")[1:], *(revision or "main").split("/")]
    if any(part.strip(".") == "" for part in parts) or ".." in (revision or ""):
        return None
    try:
        validate_repo_id(repo)
    except HFValidationError:
        return None
    return HubId(repo, subfolder.lstrip("/"), revision)


def snapshot(
    where: HubId,
    files: Mapping[str, int],
    *,
    token: Token = False,
    progress: Progress | None = None,
    fault: str | None = None,
) -> Snapshot:
    """Fetches exactly `files` of a model repo, all of one commit.

    A commit that is wholly in the local cache is taken from there without a request; the cache
    also stands in where the Hub cannot be reached, with the commit that the revision had last.

    files: names in the subfolder, with the bytes that each may have at most.
    fault: what has just kept another fetch from the Hub, which is then not asked again: a second
        wait would be no shorter than the first.

    Raises:
        HubError: refused, missing, too large or damaged; or unreachable and not in the cache.
    """
    paths = {f"{where.subfolder}/{name}".lstrip("/"): most for name, most in files.items()}
    cached = _find_cached(where, paths)
    if cached and where.revision == cached.commit and _intact(cached):
        return _snapshot(where, cached, cached=True)
    try:
        if fault:
            raise Unavailable(fault)
        fetched, downloaded = ask_hub(
            lambda watch: _fetch(where, paths, token, watch), where, progress=progress
        )
    except Unavailable as error:
        if cached and _intact(cached):
            return _snapshot(where, cached, cached=True, fault=error.fault)
        raise HubError(f"{where.repo} is not in the local cache, and {error.fault}.") from error
    _remember(where, fetched.commit)
    return _snapshot(where, fetched, cached=not downloaded)


def list_models(tag: str) -> list[dict]:
    """Public models with a tag, the most downloaded first; `id` and `tags` are what to use.

    Raises:
        HubError: the Hub cannot be asked; the message says why.
    """

    def job(_: Watch) -> list[dict]:
        # HfApi.list_models would try again and again while nobody can be reached
        params = {"filter": tag, "sort": "downloads", "limit": 200}
        response = get_session().get(f"{constants.ENDPOINT}/api/models", params=params)
        hf_raise_for_status(response)
        return [{"id": model["id"], "tags": model.get("tags", [])} for model in response.json()]

    return ask_hub(job)


class Unavailable(HubError):
    """No fault of the request: the network, the Hub or the disk. `fault` fits after "and"."""

    def __init__(self, fault: str) -> None:
        super().__init__(f"{fault[0].upper()}{fault[1:]}.")
        self.fault = fault


def ask_hub(
    job: Callable[[Watch], T], where: HubId | None = None, *, progress: Progress | None = None
) -> T:
    """Runs `job`, which talks to the Hub, and turns what goes wrong into a sentence.

    Raises:
        Unavailable: faults after which a cached copy may stand in.
        HubError: refusals.
    """
    try:
        return watched(job, progress)
    except Stalled as error:
        late = error.status < 400  # otherwise the client has tried again and again
        raise Unavailable(_STALLED if late else _status(error.status)) from error
    except (httpx2.HTTPError, OSError, ValueError, TypeError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and error.__cause__:  # the client's, of an upload
            error = error.__cause__
        if refusal := _refusal(error, where):
            raise HubError(refusal) from error
        raise Unavailable(_fault(error)) from error


def _refusal(error: Exception, where: HubId | None) -> str | None:
    """The sentence for an answer of the Hub that trying again will not change."""
    repo = where.repo if where else "this"
    if _is_page(error):
        return None
    if isinstance(error, GatedRepoError):
        return (
            f"{repo} is gated: accept its terms on its page of the Hub, then log in with "
            "`hf auth login` or set HF_TOKEN; the token's account must have been granted access."
        )
    if isinstance(error, RepositoryNotFoundError):
        return f"The Hub has no model repo {repo} that can be read; a private one needs your token."
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no revision {where.revision!r}."
    if isinstance(error, RemoteEntryNotFoundError):
        return f"A file of {repo} is not there any more; try again."
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    if status == 401:
        return (
            "The Hub does not accept your token: renew it with `hf auth login`, or unset HF_TOKEN."
        )
    if status == 403:
        return f"Your token has no right to do this with {repo}."
    if status == 412:
        return f"{repo} was changed by somebody else in this moment; try again."
    if 400 <= status < 500 and status not in (408, 429):
        return f"The Hub refuses the request for {repo} (status {status})."
    return None


def _is_page(error: BaseException) -> bool:
    """Whether a proxy or a captive portal answered, whatever the status: the Hub sends no pages."""
    return isinstance(error, HfHubHTTPError) and "text/html" in error.response.headers.get(
        "Content-Type", ""
    )


def _status(code: int) -> str:
    many = " (too many requests)" if code == 429 else ""
    return f"the Hub answers with status {code}{many}"


def _fault(error: BaseException) -> str:
    """What stands between here and the Hub."""
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        return _fault(error.__cause__)
    if isinstance(error, OfflineModeIsEnabled):
        return "offline mode is on (HF_HUB_OFFLINE)"
    if isinstance(error, HfHubHTTPError) and not _is_page(error):
        return _status(error.response.status_code)
    if isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout)):
        return "the Hub cannot be reached"
    if isinstance(error, httpx2.TimeoutException):
        return _STALLED
    if isinstance(error, OSError) and error.errno in _FULL:
        return "there is no room on the disk for the download"
    if isinstance(error, OSError) and error.errno in _READ_ONLY:
        return "the cache folder cannot be written (set HF_HOME to one that can)"
    foreign = isinstance(error, FileMetadataError) or _is_page(error)
    if isinstance(error, (httpx2.HTTPError, OSError)) and not foreign:
        return "the connection to the Hub broke off"
    return "the answer is not the Hub's (a login page of this network may have taken its place)"


class _Cached(NamedTuple):
    commit: str
    files: dict[str, Path]
    checksums: dict[str, str]


def _find_cached(where: HubId, paths: Mapping[str, int]) -> _Cached | None:
    """The files in the local cache, at the commit that the revision had last."""
    try:
        commit = (
            HfApi()
            .resolve_revision(where.repo, revision=where.revision, local_files_only=True)
            .resolved
        )
        files = {path: try_to_load_from_cache(where.repo, path, revision=commit) for path in paths}
    except (RevisionResolutionError, OSError, ValueError):
        return None
    if not all(isinstance(file, str) for file in files.values()):
        return None
    local = {path: Path(file) for path, file in files.items()}
    # the cache names contents by their checksum; only on Windows there may be plain copies
    names = {path: file.resolve().name for path, file in local.items()}
    known = {path: name for path, name in names.items() if re.fullmatch(r"[0-9a-f]{40,64}", name)}
    return _Cached(commit, local, known)


def _intact(cached: _Cached) -> bool:
    """Whether the cached files are what their checksums say; others are removed."""
    bad = [
        file
        for path, file in cached.files.items()
        if not _matches(file, cached.checksums.get(path))
    ]
    for file in bad:
        _discard(file)
    return not bad


def _matches(file: Path, checksum: str | None) -> bool:
    if checksum is None:
        return True
    try:
        return (file_sha256(file) if len(checksum) == 64 else git_sha1(file)) == checksum
    except OSError:
        return False


def _discard(file: Path) -> None:
    with suppress(OSError):
        content = file.resolve()
        file.unlink()
        content.unlink(missing_ok=True)


def _fetch(
    where: HubId, paths: Mapping[str, int], token: Token, watch: Watch
) -> tuple[_Cached, bool]:
    """One question for commit, sizes and checksums, then every file of that commit."""
    info = HfApi().model_info(where.repo, revision=where.revision, files_metadata=True, token=token)
    listed = {file.rfilename: file for file in info.siblings or []}
    if not _COMMIT.fullmatch(info.sha or ""):
        raise ValueError("no commit")
    checksums, missing = {}, 0
    for path, most in paths.items():
        if path not in listed:
            raise HubError(f"{where.repo} has no {path} at {where.revision or 'main'}.")
        entry = listed[path]
        if entry.size is None or entry.blob_id is None:
            raise ValueError("no size or checksum")
        if entry.size > most:
            raise HubError(
                f"{path} of {where.repo} has {entry.size / 1e6:,.0f} MB; "
                f"at most {most / 1e6:,.0f} MB are read."
            )
        checksums[path] = entry.lfs.sha256 if entry.lfs else entry.blob_id
        if not isinstance(try_to_load_from_cache(where.repo, path, revision=info.sha), str):
            missing += entry.size
    watch.advanced()
    watch.received, watch.total = 0, missing
    files = {}
    for path, checksum in checksums.items():
        for _ in range(2):
            with watch.transfer(partial(_arriving, where.repo, checksum)):
                file = hf_hub_download(
                    where.repo, path, revision=info.sha, token=token, tqdm_class=_NO_BAR
                )
            files[path] = Path(file)
            if _matches(files[path], checksum):
                break
            _discard(files[path])
            missing = watch.total = missing + listed[path].size
        else:
            raise HubError(f"{path} of {where.repo} arrives damaged: its checksum is wrong.")
    return _Cached(info.sha, files, checksums), missing > 0


def _arriving(repo: str, checksum: str) -> int:
    """Bytes that any process has of a file which is not complete yet."""
    blobs = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"), "blobs")
    total = 0
    for file in blobs.glob(f"{checksum}.*"):
        with suppress(OSError):  # complete by now, and renamed
            total += file.stat().st_size
    return total


def _remember(where: HubId, commit: str) -> None:
    """Notes which commit a branch or tag had, only now that all of its files are there."""
    if where.revision == commit:
        return
    folder = repo_folder_name(repo_id=where.repo, repo_type="model")
    ref = Path(constants.HF_HUB_CACHE, folder, "refs", where.revision or "main")
    with suppress(OSError):  # a cache that cannot be written
        ref.parent.mkdir(parents=True, exist_ok=True)
        write_file(ref, commit.encode())


def _snapshot(where: HubId, found: _Cached, *, cached: bool, fault: str | None = None) -> Snapshot:
    size = sum(file.stat().st_size for file in found.files.values())
    first = next(iter(found.files.values()))
    checksums = {path.rpartition("/")[2]: value for path, value in found.checksums.items()}
    origin = Origin(where.repo, found.commit, size, cached, fault)
    return Snapshot(first.parent, origin, checksums)
