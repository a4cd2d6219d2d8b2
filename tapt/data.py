"""Labelled images from a folder or zip of class folders, or from torchvision."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from tapt.errors import DataError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff"}
TORCHVISION_SETS = ("CIFAR10", "CIFAR100")


@dataclass(frozen=True)
class LabelledImages:
    """Images that open on demand.

    classes: class names, in the order of the labels.
    labels: one index into `classes` per image.
    read: opens image `i`.
    """

    classes: tuple[str, ...]
    labels: tuple[int, ...]
    read: Callable[[int], Image.Image]

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        return ((self.read(i), label) for i, label in enumerate(self.labels))

    def subset(self, indices: list[int]) -> LabelledImages:
        """The images at `indices`, in that order."""
        read = self.read
        return LabelledImages(
            self.classes, tuple(self.labels[i] for i in indices), lambda i: read(indices[i])
        )

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


def load_data(source: str) -> LabelledImages:
    """Opens a data set.

    source: a folder of class folders, a zip of class folders, or `torchvision:NAME[:ROOT]`.

    Raises:
        DataError: the source is missing or has no class folders with images.
    """
    if source.startswith("torchvision:"):
        return _from_torchvision(source)
    path = Path(source).expanduser()
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
    files = sorted(f for f in files if f.suffix.lower() in IMAGE_SUFFIXES and len(f.parts) >= 2)
    if not files:
        raise DataError(f"{source!r} has no class folders with images (<class>/<image>.jpg).")
    classes = sorted({f.parent.name for f in files})
    index = {name: i for i, name in enumerate(classes)}

    def read(i: int) -> Image.Image:
        try:
            return Image.open(io.BytesIO(read_bytes(files[i]))).convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(f"{files[i]} in {source!r} is not a readable image.") from error

    return LabelledImages(tuple(classes), tuple(index[f.parent.name] for f in files), read)


def _from_torchvision(source: str) -> LabelledImages:
    from torchvision import datasets

    _, name, *root = source.split(":", 2)
    if name not in TORCHVISION_SETS:
        raise DataError(f"torchvision set {name!r} is not one of {', '.join(TORCHVISION_SETS)}.")
    try:
        data = getattr(datasets, name)(root[0] if root else "data", train=False)
    except RuntimeError as error:
        raise DataError(f"torchvision set {name} is not complete under its root.") from error
    return LabelledImages(
        tuple(data.classes), tuple(int(t) for t in data.targets), lambda i: data[i][0]
    )


def in_memory(data: LabelledImages, preprocess: Callable[[Image.Image], Tensor]) -> Tensor:
    """All images as one uint8 tensor, (N, 3, H, W)."""
    first = preprocess(data.read(0))
    out = torch.empty((len(data), *first.shape), dtype=torch.uint8, device="cpu")
    for i, (image, _) in enumerate(data):
        out[i] = preprocess(image)
    return out
