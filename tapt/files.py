"""Files on disk: whole or not at all, and their checksums."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tapt.core.errors import InputError

_REASONS = {
    errno.ENAMETOOLONG: "the name is too long",
    errno.EACCES: "there is no permission",
    errno.EROFS: "there is no permission",
    errno.ENOTDIR: "a part of its path is a file",
    errno.ENOENT: "its folder does not exist",
    errno.ENOSPC: "there is no room on the disk",
}


def write_file(path: Path, data: bytes) -> None:
    """Writes aside, then renames: a reader sees the old file or the whole new one. `InputError`
    where something other than a file has this name; `OSError` where it cannot be written."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path.name!r} cannot be written: it is not a regular file.")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".write-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file with one in each line, none without the file; lines that were cut
    short are passed over."""
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with suppress(ValueError):
            if isinstance(value := json.loads(line), dict):
                yield value


def check_output(path: str | os.PathLike, *, folder: bool = False) -> Path:
    """The path, where a file or a folder, whose parents need not be there, can be written;
    otherwise `InputError` says why. Asked before any work begins."""
    what = "folder" if folder else "file"
    try:
        target = Path(path).expanduser()
        reason = _obstacle(target.absolute(), folder) if os.fspath(path) else "the name is empty"
    except OSError as error:
        reason = describe(error)
    except (RuntimeError, ValueError):  # ~nobody, or a NUL
        reason = "the name is not a path"
    if reason:
        raise InputError(f"The {what} {os.fspath(path)!r} cannot be written: {reason}.")
    return target


def _obstacle(target: Path, folder: bool) -> str | None:
    place = target
    while not (status := _status(place)):
        place = place.parent
    if place == target and not (stat.S_ISDIR if folder else stat.S_ISREG)(status.st_mode):
        if stat.S_ISDIR(status.st_mode):
            return "it is a folder"
        return f"it is not a regular {'folder' if folder else 'file'}"
    if place not in (target, target.parent) and not folder:
        return _REASONS[errno.ENOENT]
    writable = place if stat.S_ISDIR(status.st_mode) else place.parent
    allowed = os.access(writable, os.W_OK | os.X_OK)
    return None if allowed else _REASONS[errno.EACCES]


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def describe(error: OSError) -> str:
    """Why a file cannot be written, in words without a path."""
    return _REASONS.get(error.errno or 0, (error.strerror or "an error of the disk").lower())


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    return _hexdigest(path, hashlib.sha256())


def git_sha1(path: Path) -> str:
    """Git's id of a file's content, as hexadecimal digits."""
    start = b"blob %d\0" % path.stat().st_size
    return _hexdigest(path, hashlib.sha1(start, usedforsecurity=False))


def _hexdigest(path: Path, digest: hashlib._Hash) -> str:
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
