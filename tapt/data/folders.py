"""Class folders, in a folder or in a zip."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath

from tapt.core.errors import DataError
from tapt.data.images import LabelledImages, check_classes, file_bytes, open_file

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff"}
PARTS = {"train", "training", "test", "testing", "val", "valid", "validation"}
MAX_MEMBER_BYTES = 500_000_000


def from_folder(folder: Path, source: str) -> LabelledImages:
    """Images at `<class>/<image>` of a folder.

    Raises:
        DataError: there are none, or they are in parts such as train and test.
    """
    files = _images(_below(folder, "*/*"))
    if not files:
        deeper = _images(_below(folder, "*/*/*"))
        parts = sorted({file.parts[0] for file in deeper})
        _refuse_parts(parts, source)

    def content(i: int) -> bytes:
        return file_bytes((folder / files[i]).read_bytes, f"{files[i]} in {source!r}")

    return _labelled(files, lambda i: (folder / files[i]).read_bytes(), content, source)


def from_zip(path: Path, source: str) -> LabelledImages:
    """Images at `<class>/<image>` of a zip, or of one folder in it.

    Raises:
        DataError: there are none, they are in parts such as train and test, or one is there
            twice.
    """
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # a damaged directory raises whatever it stumbles over
        raise DataError(f"{source!r} is a damaged zip.") from error
    members = {PurePosixPath(info.filename): info for info in archive.infolist()}
    names = _images([PurePosixPath(info.filename) for info in archive.infolist()])
    for one, other in pairwise(names):
        if one == other:
            raise DataError(f"{source!r} has {str(one)!r} twice.")
    _refuse_parts(sorted({str(name.parent.parent) for name in names}), source, single=True)

    def read(i: int) -> bytes:
        info = members[names[i]]
        if info.file_size > MAX_MEMBER_BYTES:
            raise ValueError
        return archive.read(info)

    def content(i: int) -> bytes:
        info = members[names[i]]
        return f"{info.CRC}:{info.file_size}".encode()

    return _labelled(names, read, content, source)


def _below(folder: Path, pattern: str) -> list[PurePosixPath]:
    return [PurePosixPath(path.relative_to(folder).as_posix()) for path in folder.glob(pattern)]


def _images(files: Sequence[PurePosixPath]) -> list[PurePosixPath]:
    """Paths of images in folders, sorted, without what macOS adds to a zip."""
    return sorted(
        file
        for file in files
        if file.suffix.lower() in IMAGE_SUFFIXES
        and len(file.parts) >= 2
        and not file.name.startswith("._")
    )


def _refuse_parts(parts: Sequence[str], source: str, *, single: bool = False) -> None:
    """single: one part alone is the whole set."""
    if len(parts) > single:
        listed = ", ".join(map(repr, parts[:5]))
        raise DataError(
            f"{source!r} has its class folders in parts ({listed}): give one part as a data set "
            "of its own."
        )


def _labelled(
    files: Sequence[PurePosixPath],
    read: Callable[[int], bytes],
    content: Callable[[int], bytes],
    source: str,
) -> LabelledImages:
    if not files:
        raise DataError(f"{source!r} has no class folders with images (<class>/<image>.jpg).")
    classes = sorted({file.parent.name for file in files})
    parts = [name for name in classes if name.lower() in PARTS]
    if len(parts) > 1:
        _refuse_parts(parts, source)
    check_classes(classes, source)
    index = {name: i for i, name in enumerate(classes)}
    return LabelledImages(
        tuple(classes),
        tuple(index[file.parent.name] for file in files),
        lambda i: open_file(lambda: read(i), f"{files[i]} in {source!r}"),
        content,
        Path(source).stem,
    )
