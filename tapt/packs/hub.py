"""Files from the Hugging Face Hub: one commit, sizes and checksums checked, in bounded time."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, constants, get_session, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RevisionResolutionError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import hf_raise_for_status, validate_repo_id

from tapt.core.errors import HubError
from tapt.files import file_sha256, git_sha1, write_file
from tapt.packs.client import Unavailable, ask_hub
from tapt.progress import Progress, quiet

_ID = re.compile(r"([\w.-]+/[\w.-]+)((?:/[\w.-]+)*)(?:@([\w./-]+))?", re.ASCII)

Token = str | bool | None
"""False for no token, None for the user's own from the usual places."""


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
    unreachable: why the local cache stands in for the Hub, None where it does not.
    """

    repo: str
    commit: str
    size: int
    cached: bool
    unreachable: str | None = None

    def __str__(self) -> str:
        cache = ", from the local cache" if self.cached else ""
        reason = f": {self.unreachable}" if self.unreachable else ""
        return f"{self.repo} at commit {self.commit[:7]} ({self.size / 1e6:.1f} MB{cache}{reason})"


@dataclass(frozen=True)
class Snapshot:
    """Checked files of one commit in one folder.

    checksums: by file name, SHA-256 for large files and git's SHA-1 for others; "" if unknown.
    """

    folder: Path
    origin: Origin
    checksums: Mapping[str, str]

    def sha256(self, name: str) -> str:
        """SHA-256 of one of the files, as hexadecimal digits."""
        known = self.checksums[name]
        return known if len(known) == 64 else file_sha256(self.folder / name)

    def is_intact(self) -> bool:
        """Whether all files are what their checksums say; others are removed."""
        return all([_is_valid(self.folder / name, sum) for name, sum in self.checksums.items()])


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
    unreachable: str | None = None,
) -> Snapshot:
    """Fetches exactly `files` of a model repo, all of one commit.

    A commit that is wholly in the local cache is taken from there without a request; the cache
    also stands in where the Hub cannot be reached, with the commit that the revision had last.

    files: names in the subfolder, with the bytes that each may have at most.
    progress: called with the bytes that have arrived and those to come in all.
    unreachable: what has just kept another fetch from the Hub, which is then not asked again: a
        second wait would be no shorter than the first.

    Raises `HubError`: refused, missing, too large or damaged; or unreachable and not in the cache.
    """
    limits = {f"{where.subfolder}/{name}".lstrip("/"): most for name, most in files.items()}
    cached = _find_cached(where, limits)
    if cached and where.revision == cached.origin.commit and cached.is_intact():
        return cached
    try:
        if unreachable:
            raise Unavailable(unreachable)
        fetched = _fetch(where, limits, token, progress or quiet)
    except Unavailable as error:
        if cached and cached.is_intact():
            return replace(cached, origin=replace(cached.origin, unreachable=error.reason))
        raise HubError(f"{where.repo} is not in the local cache, and {error.reason}.") from error
    if where.revision != fetched.origin.commit:  # which commit a branch or tag had last
        ref = _cache_folder(where.repo) / "refs" / (where.revision or "main")
        with suppress(OSError):  # a cache that cannot be written
            ref.parent.mkdir(parents=True, exist_ok=True)
            write_file(ref, fetched.origin.commit.encode())
    return fetched


def list_models(tag: str) -> list[dict[str, Any]]:
    """Public models with a tag, the most downloaded first, each with its `id` and `tags`;
    `HubError` where the Hub cannot be asked."""

    def job() -> list[dict[str, Any]]:
        # HfApi.list_models would try again and again while nobody can be reached
        params: dict[str, str | int] = {"filter": tag, "sort": "downloads", "limit": 200}
        response = get_session().get(f"{constants.ENDPOINT}/api/models", params=params)
        hf_raise_for_status(response)
        return [{"id": model["id"], "tags": model.get("tags", [])} for model in response.json()]

    return ask_hub(job)


def _find_cached(where: HubId, paths: Collection[str]) -> Snapshot | None:
    """The files in the local cache, at the commit that the revision had last."""
    repo = where.repo
    try:
        known = HfApi().resolve_revision(repo, revision=where.revision, local_files_only=True)
        entries = [try_to_load_from_cache(repo, p, revision=known.resolved) for p in paths]
    except (RevisionResolutionError, OSError, ValueError):
        return None
    files = [Path(entry) for entry in entries if isinstance(entry, str)]
    if len(files) < len(paths):
        return None
    # the cache names contents by their checksum; only on Windows there may be plain copies
    names = {file.name: file.resolve().name for file in files}
    checksums = {k: v if re.fullmatch(r"[0-9a-f]{40,64}", v) else "" for k, v in names.items()}
    size = sum(file.stat().st_size for file in files)
    return Snapshot(files[0].parent, Origin(repo, known.resolved, size, cached=True), checksums)


def _is_valid(file: Path, checksum: str) -> bool:
    """Whether a file is what its checksum says, where that is known; otherwise it is removed."""
    with suppress(OSError):
        own = file_sha256(file) if len(checksum) == 64 else git_sha1(file)
        if checksum in ("", own):
            return True
    with suppress(OSError):
        content = file.resolve()
        file.unlink()
        content.unlink(missing_ok=True)
    return False


def _fetch(where: HubId, limits: Mapping[str, int], token: Token, progress: Progress) -> Snapshot:
    """One question for commit, sizes and checksums, then every file of that commit."""
    repo = where.repo
    ask = partial(ask_hub, repo=repo, revision=where.revision)
    commit, listed = ask(lambda: _list_files(where, token))
    for path, most in limits.items():
        if path not in listed:
            raise HubError(f"{repo} has no {path} at {where.revision or 'main'}.")
        if (size := listed[path][0]) > most:
            raise HubError(
                f"{path} of {repo} has {size / 1e6:,.0f} MB; at most {most / 1e6:,.0f} MB are read."
            )
    total, checksums = sum(listed[p][0] for p in limits), {p: listed[p][1] for p in limits}
    entries = [try_to_load_from_cache(repo, path, revision=commit) for path in limits]
    cached = all(isinstance(entry, str) for entry in entries)

    def arrived() -> int:
        received = sum(_arrived(repo, checksum) for checksum in checksums.values())
        if not cached:
            progress(min(received, total - 1), total)  # checked once all is there
        return received

    for path, checksum in checksums.items():
        job = partial(hf_hub_download, repo, path, revision=commit, token=token)
        for _ in range(2):
            file = Path(ask(job, arrived=arrived))
            if _is_valid(file, checksum):
                break
            cached = False
        else:
            raise HubError(f"{path} of {repo} arrives damaged: its checksum is wrong.")
    if not cached:
        progress(total, total)
    names = {path.rpartition("/")[2]: checksum for path, checksum in checksums.items()}
    return Snapshot(file.parent, Origin(repo, commit, total, cached), names)


def _list_files(where: HubId, token: Token) -> tuple[str, dict[str, tuple[int, str]]]:
    """The commit, and size and checksum of its files."""
    info = HfApi().model_info(where.repo, revision=where.revision, files_metadata=True, token=token)
    listed = {}
    for file in info.siblings or []:
        checksum = file.lfs.sha256 if file.lfs else file.blob_id
        if file.size is None or checksum is None:
            raise ValueError("no size or checksum")
        listed[file.rfilename] = file.size, checksum
    if not re.fullmatch(r"[0-9a-f]{40}", info.sha or ""):
        raise ValueError("no commit")
    return str(info.sha), listed


def _arrived(repo: str, checksum: str) -> int:
    """Bytes of a file that are in the cache by now, whichever process has fetched them."""
    total = 0
    for file in (_cache_folder(repo) / "blobs").glob(f"{checksum}*"):
        with suppress(OSError):  # complete by now, and renamed
            total += file.stat().st_size
    return total


def _cache_folder(repo: str) -> Path:
    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"))
