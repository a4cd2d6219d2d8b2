"""Files on disk: whole or not at all, and their checksums."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path


def write_file(path: Path, data: bytes) -> None:
    """Writes aside, then renames: a reader sees the old file or the whole new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


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
