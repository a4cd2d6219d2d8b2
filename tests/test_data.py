"""Folders and zips of class folders."""

from __future__ import annotations

import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from tapt.data import in_memory, load_data
from tapt.errors import DataError
from tapt.images import to_uint8


def write_images(folder: Path, counts: dict[str, int]) -> Path:
    for index, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            color = (40 * index, 5 * i, 100)
            Image.new("RGB", (8, 8), color).save(folder / name / f"{i}.png")
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "set", {"dog": 3, "cat": 5, "frog": 2})


def test_folder_and_zip_hold_the_same(folder: Path, tmp_path: Path):
    archive = tmp_path / "set.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("__MACOSX/set/cat/._0.png", "not an image")
        for path in sorted(folder.rglob("*.*")):
            file.write(path, path.relative_to(folder))
    one, other = load_data(str(folder)), load_data(str(archive))
    assert one.classes == other.classes == ("cat", "dog", "frog")
    assert one.labels == other.labels
    assert torch.equal(in_memory(one, to_uint8), in_memory(other, to_uint8))


def test_balanced_subset(folder: Path):
    data = load_data(str(folder))
    subset = data.balanced(7, seed=1)
    assert sorted(Counter(subset.labels).values()) == [2, 2, 3]
    assert subset.labels == data.balanced(7, seed=1).labels
    first = [image.tobytes() for image, _ in data.balanced(3, seed=1)]
    second = [image.tobytes() for image, _ in data.balanced(3, seed=2)]
    assert first != second


def test_labels_follow_the_images(folder: Path):
    data = load_data(str(folder))
    red = {"dog": 0, "cat": 40, "frog": 80}
    for image, label in data.balanced(6):
        assert image.getpixel((0, 0))[0] == red[data.classes[label]]


@pytest.mark.parametrize("source", ["nowhere", "torchvision:Nothing"])
def test_missing_data(source: str):
    with pytest.raises(DataError, match=source.split(":")[-1]):
        load_data(source)


def test_empty_and_broken(tmp_path: Path, folder: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no class folders"):
        load_data(str(tmp_path / "empty"))
    (folder / "cat" / "0.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"cat/0\.png"):
        in_memory(load_data(str(folder)), to_uint8)
