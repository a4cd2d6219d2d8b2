"""Labelled images that open on demand, their digest, and their pixels within bounded memory."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from tapt.core.errors import DataError, InputError
from tapt.data.names import MAX_CLASSES
from tapt.data.pictures import open_image

MAX_HELD_BYTES = 2_000_000_000
"""Preprocessed pixels that a process keeps; what is beyond is decoded anew each time."""


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images that open on demand.

    classes: class names, in the order of the labels.
    labels: one index into `classes` per image.
    read: opens image `i` as RGB.
    content: bytes that change when image `i` does, at the cost of reading it at most.
    name: of the set.
    template: class sentence for vanilla CLIP and V, where the set has one of its own.
    """

    classes: tuple[str, ...]
    labels: tuple[int, ...]
    read: Callable[[int], Image.Image]
    content: Callable[[int], bytes]
    name: str = ""
    template: str | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        return ((self.read(i), label) for i, label in enumerate(self.labels))

    def subset(self, indices: Sequence[int]) -> LabelledImages:
        """The images at `indices`, in that order."""
        read, content = self.read, self.content
        return replace(
            self,
            labels=tuple(self.labels[i] for i in indices),
            read=lambda i: read(indices[i]),
            content=lambda i: content(indices[i]),
        )

    def balanced(self, limit: int, seed: int = 0) -> LabelledImages:
        """A seeded subset of `limit` images whose class counts differ by one at most (as far as
        the classes have images)."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self), generator=generator, device="cpu").tolist()
        earlier, ranks = Counter[int](), {}
        for i in order:
            ranks[i] = earlier[self.labels[i]]
            earlier[self.labels[i]] += 1
        # the k-th image of every class comes before the (k+1)-th of any
        return self.subset(sorted(sorted(order, key=ranks.__getitem__)[:limit]))


def digest(data: LabelledImages) -> str:
    """SHA-256 over class names, labels and contents, as hexadecimal digits; `DataError` where an
    image cannot be read."""
    total = hashlib.sha256(json.dumps([data.classes, data.labels]).encode())
    for i in range(len(data)):
        total.update(hashlib.sha256(data.content(i)).digest())
    return total.hexdigest()


def check_classes(classes: Sequence[str], source: str) -> None:
    """Refuses one class, more than `MAX_CLASSES`, and two names for the same thing."""
    count = len(classes)
    if count < 2:
        raise DataError(f"{source!r} has one class only, {classes[0]!r}: at least 2 are needed.")
    if count > MAX_CLASSES:
        raise DataError(f"{source!r} has {count:,} classes: at most {MAX_CLASSES:,} are allowed.")
    known: dict[str, str] = {}
    for name in classes:
        plain = unicodedata.normalize("NFKC", name).casefold()
        other = known.setdefault(re.sub(r"[\s_-]+", " ", plain).strip(), name)
        if other is not name:
            raise DataError(f"{source!r} has {other!r} and {name!r} as two classes: merge them.")


def labelled_files(
    classes: Sequence[str],
    labels: Sequence[int],
    files: Sequence[Path | zipfile.Path],
    source: str,
    name: str,
    template: str | None = None,
) -> LabelledImages:
    """Images that lie in files, of a folder or of a zip. One that cannot be read or is no image is
    named in a `DataError`, as `<folder>/<file> <source>`."""

    def words(i: int) -> str:
        return f"{'/'.join(Path(str(files[i])).parts[-2:])} {source}"

    def read_bytes(i: int) -> bytes:
        try:
            return files[i].read_bytes()
        except Exception as error:  # zips raise whatever their decoders stumble over
            raise DataError(
                f"{words(i)} cannot be read: it is missing, damaged, encrypted or packed in an "
                "unknown way."
            ) from error

    def read(i: int) -> Image.Image:
        try:
            return open_image(read_bytes(i))
        except InputError as error:
            raise DataError(f"{words(i)}: {error}") from error

    return LabelledImages(tuple(classes), tuple(labels), read, read_bytes, name, template)


class Pixels:
    """Preprocessed images of a set, decoded when they are first asked for."""

    def __init__(self, data: LabelledImages, preprocess: Callable[[Image.Image], Tensor]) -> None:
        self.data, self.preprocess = data, preprocess
        self._left = MAX_HELD_BYTES
        self._held: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Tensor:
        """Image `index` as uint8, (3, S, S)."""
        pixels = self._held.get(index)
        if pixels is None:
            pixels = self.preprocess(self.data.read(index))
            if pixels.nbytes <= self._left:
                self._left -= pixels.nbytes
                self._held[index] = pixels
        return pixels

    def batch(self, indices: Sequence[int]) -> Tensor:
        """Images at `indices`, uint8, (N, 3, S, S)."""
        return torch.stack([self[i] for i in indices])
