"""Class folders, in a folder or in a zip."""

from __future__ import annotations

import zipfile
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath

from tapt.core.errors import DataError
from tapt.data.images import LabelledImages, check_classes, labelled_files

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff"}
PARTS = {"train", "training", "test", "testing", "val", "valid", "validation"}
MAX_MEMBER_BYTES = 500_000_000


def from_folder(folder: Path, source: str) -> LabelledImages:
    """Images at `<class>/<image>` of a folder; `DataError` where there are none, or where they are
    in parts such as train and test."""

    def images(pattern: str) -> list[PurePosixPath]:
        return _images(p.relative_to(folder).as_posix() for p in folder.glob(pattern))

    files = images("*/*")
    if not files:
        _refuse_parts({file.parts[0] for file in images("*/*/*")}, source)
    return _labelled([folder / file for file in files], source)


def from_zip(path: Path, source: str) -> LabelledImages:
    """Images at `<class>/<image>` of a zip, or of one folder in it; `DataError` where there are
    none, they are in parts such as train and test, or one is there twice or far too large."""
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # a damaged directory raises whatever it stumbles over
        raise DataError(f"{source!r} is a damaged zip.") from error
    names = _images(archive.namelist())
    for one, other in pairwise(names):
        if one == other:
            raise DataError(f"{source!r} has {str(one)!r} twice.")
    _refuse_parts({str(name.parent.parent) for name in names}, source, allowed=1)
    if any(info.file_size > MAX_MEMBER_BYTES for info in archive.infolist()):
        raise DataError(f"{source!r} has a file of more than 500 MB.")
    root = zipfile.Path(archive)
    return _labelled([root / str(name) for name in names], source)


def _images(names: Iterable[str]) -> list[PurePosixPath]:
    """Paths of images in folders, sorted, without what macOS adds to a zip."""
    return sorted(
        file
        for file in map(PurePosixPath, names)
        if file.suffix.lower() in IMAGE_SUFFIXES
        and len(file.parts) >= 2
        and not file.name.startswith("._")
    )


def _refuse_parts(parts: Collection[str], source: str, allowed: int = 0) -> None:
    """allowed: as many parts are the whole set."""
    if len(parts) > allowed:
        listed = ", ".join(map(repr, sorted(parts)[:5]))
        raise DataError(
            f"{source!r} has its class folders in parts ({listed}): give one part as a data set "
            "of its own."
        )


def _labelled(files: Sequence[Path | zipfile.Path], source: str) -> LabelledImages:
    if not files:
        raise DataError(f"{source!r} has no class folders with images (<class>/<image>.jpg).")
    own = [Path(str(file)).parent.name for file in files]
    classes = sorted(set(own))
    _refuse_parts([name for name in classes if name.lower() in PARTS], source, allowed=1)
    check_classes(classes, source)
    index = {name: i for i, name in enumerate(classes)}
    labels = [index[name] for name in own]
    return labelled_files(classes, labels, files, f"in {source!r}", Path(source).stem)
