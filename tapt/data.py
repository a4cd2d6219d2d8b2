"""Labelled images from a folder or zip of class folders, or from a benchmark set."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from tapt.errors import DataError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff"}


@dataclass(frozen=True)
class LabelledImages:
    """Images that open on demand.

    classes: class names, in the order of the labels.
    labels: one index into `classes` per image.
    read: opens image `i`.
    name: of the set.
    template: class sentence for vanilla CLIP and V, where the set has one of its own.
    """

    classes: tuple[str, ...]
    labels: tuple[int, ...]
    read: Callable[[int], Image.Image]
    name: str = ""
    template: str | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        return ((self.read(i), label) for i, label in enumerate(self.labels))

    def subset(self, indices: list[int]) -> LabelledImages:
        """The images at `indices`, in that order."""
        read = self.read
        labels = tuple(self.labels[i] for i in indices)
        return replace(self, labels=labels, read=lambda i: read(indices[i]))

    def balanced(self, limit: int, seed: int = 0) -> LabelledImages:
        """A seeded subset of `limit` images whose class counts differ by one at most (as far as
        the classes have images)."""
        indices = balanced_indices(self.labels, len(self.classes), limit, seed)
        return self.subset(indices)


def balanced_indices(labels: tuple[int, ...], classes: int, limit: int, seed: int) -> list[int]:
    """Indices of a seeded, class-balanced subset, sorted."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator).tolist()
    queues: list[list[int]] = [[] for _ in range(classes)]
    for i in order:
        queues[labels[i]].append(i)
    # the k-th image of every class comes before the (k+1)-th of any
    ranked = [(rank, i) for queue in queues for rank, i in enumerate(queue)]
    position = {i: p for p, i in enumerate(order)}
    ranked.sort(key=lambda item: (item[0], position[item[1]]))
    return sorted(i for _, i in ranked[:limit])


def load_data(source: str, split: str = "test") -> LabelledImages:
    """Opens a data set.

    source: a folder or a zip of class folders; `NAME:FOLDER` for class folders of a benchmark set
        (`UCF101:frames`); `torchvision:NAME[:ROOT]`; or a split file `split_zhou_*.json`.
    split: `test` or `train`, where the set has both.

    Raises:
        DataError: the source is missing or is not laid out as expected.
    """
    from tapt import datasets  # builds on this module

    if source.startswith("torchvision:"):
        return datasets.from_torchvision(source, split)
    name, _, folder = source.partition(":")
    if folder and name in datasets.benchmarks():
        return datasets.renamed(load_data(folder), name)
    path = Path(source).expanduser()
    if path.suffix == ".json" and path.is_file():
        return datasets.from_split_file(path, split)
    if path.is_dir():
        files = [p.relative_to(path) for p in path.glob("*/*")]
        return _from_class_folders(files, lambda f: (path / f).read_bytes(), source)
    if zipfile.is_zipfile(path):
        archive = zipfile.ZipFile(path)
        return _from_class_folders(
            [PurePosixPath(n) for n in archive.namelist()], lambda f: archive.read(str(f)), source
        )
    raise DataError(f"No data at {source!r}: give a folder or a zip of class folders.")


def _from_class_folders(files, read_bytes: Callable, source: str) -> LabelledImages:
    files = sorted(
        f
        for f in files
        if f.suffix.lower() in IMAGE_SUFFIXES
        and len(f.parts) >= 2
        and not f.name.startswith("._")  # what macOS adds to a zip
    )
    if not files:
        raise DataError(f"{source!r} has no class folders with images (<class>/<image>.jpg).")
    classes = sorted({f.parent.name for f in files})
    index = {name: i for i, name in enumerate(classes)}

    return LabelledImages(
        tuple(classes),
        tuple(index[f.parent.name] for f in files),
        lambda i: open_rgb(lambda: read_bytes(files[i]), f"{files[i]} in {source!r}"),
        Path(source).stem,
    )


def open_rgb(read_bytes: Callable[[], bytes], name: str) -> Image.Image:
    """Decodes an image file.

    Raises:
        DataError: `name` cannot be read or is not an image.
    """
    try:
        return Image.open(io.BytesIO(read_bytes())).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{name} is not a readable image.") from error


def in_memory(data: LabelledImages, preprocess: Callable[[Image.Image], Tensor]) -> Tensor:
    """All images as one uint8 tensor, (N, 3, H, W)."""
    first = preprocess(data.read(0))
    out = torch.empty((len(data), *first.shape), dtype=torch.uint8, device="cpu")
    for i, (image, _) in enumerate(data):
        out[i] = preprocess(image)
    return out
