"""Data sets: labelled images from class folders, zips, split files and torchvision."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

from tapt.core.errors import DataError
from tapt.core.settings import shown
from tapt.data.benchmarks import benchmarks, from_split_file, from_torchvision, renamed
from tapt.data.folders import from_folder, from_zip
from tapt.data.images import LabelledImages, Pixels, digest

__all__ = ["LabelledImages", "Pixels", "benchmarks", "digest", "load_data"]


def load_data(source: str | os.PathLike[str], split: str = "test") -> LabelledImages:
    """Opens a data set.

    source: a folder or a zip of class folders; `NAME:FOLDER` for class folders of a benchmark set
        (`UCF101:frames`); `torchvision:NAME[:ROOT]`; or a split file `split_zhou_*.json`.
    split: `test` or `train`, where the set has both.

    Raises `DataError` where the source is missing or is not laid out as expected.
    """
    source = os.fspath(source)
    if source.startswith("torchvision:"):
        return from_torchvision(source, split)
    name, _, folder = source.partition(":")
    if folder and name in benchmarks():
        return renamed(load_data(folder, split), name)
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):
        return from_folder(path, source)
    if os.path.isfile(path):
        if path.suffix == ".json":
            return from_split_file(path, split)
        if zipfile.is_zipfile(path):
            return from_zip(path, source)
    raise DataError(f"No data at {shown(source)}: give a folder or a zip of class folders.")
