"""Folders and zips of class folders."""

from __future__ import annotations

import re
import struct
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import counted
from PIL import Image

from tapt.core.errors import DataError
from tapt.core.images import to_uint8
from tapt.data import LabelledImages, Pixels, digest, load_data
from tapt.data.pictures import open_image


def write_images(folder: Path, counts: dict[str, int]) -> Path:
    for index, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            color = (40 * index, 5 * i, 100)
            Image.new("RGB", (8, 8), color).save(folder / name / f"{i}.png")
    (folder / "notes.txt").write_text("not an image")
    return folder


def zipped(folder: Path, archive: Path, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(archive, "w", compression) as file:
        file.writestr("__MACOSX/set/cat/._0.png", "not an image")
        for path in sorted(folder.rglob("*.*")):
            file.write(path, path.relative_to(folder))
    return archive


def all_pixels(data: LabelledImages) -> torch.Tensor:
    return Pixels(data, to_uint8).batch(range(len(data)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "set", {"dog": 3, "cat": 5, "frog": 2})


RED = {"dog": 0, "cat": 40, "frog": 80}


def test_folder_and_zip_hold_the_same(folder: Path, tmp_path: Path):
    archive = zipped(folder, tmp_path / "set.zip")
    with zipfile.ZipFile(tmp_path / "one.zip", "w") as file:  # with one folder around all
        for path in folder.rglob("*.png"):
            file.write(path, path.relative_to(tmp_path))
    data = load_data(folder)
    assert data.classes == ("cat", "dog", "frog")
    assert [image.getpixel((0, 0))[0] for image, _ in data] == [
        RED[data.classes[label]] for label in data.labels
    ]
    for other in (load_data(str(archive)), load_data(tmp_path / "one.zip")):
        assert (other.classes, other.labels) == (data.classes, data.labels)
        assert torch.equal(all_pixels(data), all_pixels(other))


def test_balanced_subset(folder: Path):
    data = load_data(str(folder))
    subset = data.balanced(7, seed=1)
    assert sorted(Counter(subset.labels).values()) == [2, 2, 3]
    assert all(image.getpixel((0, 0))[0] == RED[data.classes[label]] for image, label in subset)
    first, same, other = (data.balanced(3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(all_pixels(first), all_pixels(same))
    assert not torch.equal(all_pixels(first), all_pixels(other))


@pytest.mark.parametrize(
    "source", ["nowhere", "torchvision:Nothing", "\0", "x" * 5000, "~nobody/set"]
)
def test_missing_data(source: str):
    words = repr(source.split(":")[-1])[:50]
    with pytest.raises(DataError, match=re.escape(words)) as error:
        load_data(source)
    assert len(str(error.value)) < 400


def test_a_picture_that_cannot_be_read_is_named(folder: Path):
    data = load_data(folder)
    path = folder / "cat" / "0.png"
    path.write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"^cat/0\.png in .*: This file is not a readable picture"):
        all_pixels(data)
    path.unlink()
    with pytest.raises(DataError, match=r"^cat/0\.png in .* cannot be read: it is missing"):
        digest(data)


def test_a_picture_is_read_as_for_one_prediction(folder: Path):
    path = folder / "cat" / "0.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGBA", (8, 4), (0, 0, 0, 0)).save(path, exif=exif)
    image = load_data(folder).read(0)
    assert (image.size, image.tobytes()) == ((4, 8), open_image(path).tobytes())


@pytest.mark.parametrize(
    ("compression", "field", "value"),
    [
        (zipfile.ZIP_STORED, None, 0),  # a bad CRC
        (zipfile.ZIP_DEFLATED, None, 0),
        (zipfile.ZIP_LZMA, None, 0),
        (zipfile.ZIP_STORED, 6, 1),  # encrypted
        (zipfile.ZIP_STORED, 8, 98),  # an unknown method
    ],
)
def test_members_that_cannot_be_unpacked_are_named(compression, field, value, folder, tmp_path):
    archive = zipped(folder, tmp_path / "set.zip", compression)
    with zipfile.ZipFile(archive) as file:
        start = file.getinfo("cat/0.png").header_offset
    content = bytearray(archive.read_bytes())
    if field is None:
        content[start + 39 : start + 60] = b"\xff" * 21
    else:  # of the local header, and of the central one, where it stands 2 later
        central = content.index(b"cat/0.png", start + 60) - 46
        struct.pack_into("<H", content, start + field, value)
        struct.pack_into("<H", content, central + field + 2, value)
    archive.write_bytes(content)
    data = load_data(archive)
    with pytest.raises(DataError, match=r"cat/0\.png in .*set\.zip' cannot be read"):
        data.read(0)
    data.read(1)


def test_a_damaged_zip(folder: Path, tmp_path: Path):
    archive = zipped(folder, tmp_path / "set.zip")
    whole = archive.read_bytes()
    archive.write_bytes(whole.replace(b"PK\x01\x02", b"PK\x09\x09"))
    with pytest.raises(DataError, match="damaged zip"):
        load_data(archive)


def test_a_member_that_is_there_twice(folder: Path, tmp_path: Path):
    archive = zipped(folder, tmp_path / "set.zip")
    with zipfile.ZipFile(archive, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.write(folder / "cat" / "1.png", "cat/0.png")
    with pytest.raises(DataError, match=r"'cat/0\.png' twice"):
        load_data(archive)


def test_parts_are_not_merged(tmp_path: Path):
    for part in ("train", "test"):
        write_images(tmp_path / "set" / part, {"cat": 1, "dog": 1})
    archive = zipped(tmp_path / "set", tmp_path / "set.zip")
    for source in (tmp_path / "set", archive):
        with pytest.raises(DataError, match="in parts \\('test', 'train'\\)"):
            load_data(source)
    assert load_data(tmp_path / "set" / "test").classes == ("cat", "dog")
    for part in ("train", "test"):
        Image.new("RGB", (8, 8)).save(tmp_path / "set" / part / "0.png")
    with pytest.raises(DataError, match="in parts"):
        load_data(tmp_path / "set")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["cat", "Cat"], "'Cat' and 'cat' as two classes"),
        (["hot_dog", "hot dog"], "'hot dog' and 'hot_dog' as two classes"),
        (["cat"], "one class only, 'cat'"),
        ([f"c{i}" for i in range(1001)], "1,001 classes: at most 1,000"),
        ([], "no class folders"),
    ],
)
def test_class_lists_that_say_nothing(names: list[str], words: str, tmp_path: Path):
    archive = tmp_path / "set.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name in names:
            file.writestr(f"{name}/0.png", "")
    with pytest.raises(DataError, match=words):
        load_data(archive)


def test_the_digest_knows_names_labels_and_contents(folder: Path, tmp_path: Path):
    archive = zipped(folder, tmp_path / "set.zip")
    data = load_data(folder)
    others = [data.subset(range(5)), data.balanced(5), data.subset([1, 0, *range(2, 10)])]
    assert len({digest(data), *map(digest, others)}) == 4
    assert digest(load_data(folder)) == (before := digest(load_data(archive)))
    Image.new("RGB", (8, 8), "red").save(folder / "cat" / "0.png")
    changed = digest(load_data(folder))
    (folder / "cat").rename(folder / "car")
    assert len({before, changed, digest(load_data(folder))}) == 3


def test_pixels_are_kept_within_bounds(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tapt.data.images.MAX_HELD_BYTES", 3 * 8 * 8 * 2)
    data = load_data(folder)
    images, opened = counted(data)
    few = Pixels(images, to_uint8)
    expected = all_pixels(data)
    for _ in range(2):
        assert torch.equal(few.batch(range(len(data))), expected)
    assert Counter(opened) == {i: 1 if i < 2 else 2 for i in range(len(data))}
