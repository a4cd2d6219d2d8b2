"""The benchmark sets of the paper: class names, templates, and their layouts on disk."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from tapt.core.errors import DataError
from tapt.data.images import LabelledImages, check_classes, labelled_files
from tapt.data.pictures import to_rgb

# how each set names its held-out part and its training part; none: it has no parts of its own
TORCHVISION_SPLITS: dict[str, tuple[dict[str, Any], ...]] = {
    "ImageNet": ({"split": "val"}, {"split": "train"}),
    **dict.fromkeys(("Caltech101", "EuroSAT", "SUN397"), ({}, {})),
    **dict.fromkeys(("OxfordIIITPet", "FGVCAircraft"), ({"split": "test"}, {"split": "trainval"})),
    **dict.fromkeys(
        ("DTD", "Food101", "Flowers102", "StanfordCars"), ({"split": "test"}, {"split": "train"})
    ),
    **dict.fromkeys(("CIFAR10", "CIFAR100"), ({"train": False}, {"train": True})),
}
# sets whose own names may be ids: n01440764, or 1 to 102
NUMBERED = ("ImageNet", "Flowers102")
SPLIT_NAMES = {
    "DescribableTextures": "DTD",
    "OxfordFlowers": "Flowers102",
    "OxfordPets": "OxfordIIITPet",
}


@dataclass(frozen=True)
class Benchmark:
    """classes: names as they go into a sentence.
    template: class sentence for vanilla CLIP and V.
    aliases: the set's own names where they differ; None is a class that the literature leaves out.
    """

    name: str
    classes: tuple[str, ...]
    template: str
    aliases: Mapping[str, str | None]

    def rename(self, own: Sequence[str]) -> list[str | None]:
        """The name in a sentence for each of the set's own class names; `DataError` where one is
        none of this set's."""
        if tuple(own) == self.classes:  # ImageNet has names that are there twice
            return list(own)
        ids = [match for name in own if (match := re.fullmatch(r"n?(\d+)", name))]
        if self.name in NUMBERED and len(own) == len(ids) == len(self.classes):
            numbers = [int(match[1]) for match in ids]
            return [self.classes[sorted(numbers).index(number)] for number in numbers]
        known = {_key(name): name for name in self.classes}
        renamed = []
        for name in own:
            if name not in self.aliases and _key(name) not in known:
                raise DataError(f"{name!r} is not a class of {self.name}.")
            renamed.append(self.aliases[name] if name in self.aliases else known[_key(name)])
        return renamed


def _key(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


@cache
def benchmarks() -> dict[str, Benchmark]:
    """The sets of the paper and CIFAR-10 by name. Caltech101 has the 100 classes of the
    literature, without the background and the second class of faces."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES  # slow to import

    path = Path(__file__).with_name("classnames.json")
    entries = json.loads(path.read_text(encoding="utf-8"))
    return {
        name: Benchmark(
            name,
            tuple(entry.get("classes", IMAGENET_CLASSNAMES)),
            entry["template"],
            entry.get("aliases", {}),
        )
        for name, entry in entries.items()
    }


def renamed(data: LabelledImages, name: str) -> LabelledImages:
    """The same images with the class names and the template of a benchmark set; images of classes
    that the literature leaves out are dropped, and `DataError` where a class is none of the set's.
    """
    benchmark = benchmarks()[name]
    names = benchmark.rename(data.classes)
    used = {own: new for own, new in enumerate(names) if new is not None}
    label = {own: i for i, own in enumerate(used)}  # two classes of ImageNet share names
    kept = data.subset([i for i, own in enumerate(data.labels) if own in used])
    return replace(
        kept,
        classes=tuple(used.values()),
        labels=tuple(label[own] for own in kept.labels),
        name=name,
        template=benchmark.template,
    )


def from_torchvision(source: str, split: str) -> LabelledImages:
    """`torchvision:NAME[:ROOT]`; sets without parts of their own give all their images.
    `DataError` where the set is unknown or not complete under its root."""
    from torchvision import datasets

    _, name, *root = source.split(":", 2)
    if name not in TORCHVISION_SPLITS:
        known = ", ".join(TORCHVISION_SPLITS)
        raise DataError(f"torchvision set {name!r} is not one of {known}.")
    options = TORCHVISION_SPLITS[name][split == "train"]
    try:
        data = getattr(datasets, name)(root[0] if root else "data", **options)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise DataError(f"torchvision set {name} is not complete under its root.") from error
    # Flowers102 of older versions has no names at all
    own = tuple(getattr(data, "classes", ()) or getattr(data, "categories", ()))
    if name == "ImageNet" and len(own) != 1000:
        raise DataError(f"ImageNet has 1,000 classes, these folders have {len(own)}.")
    if name in NUMBERED:  # their labels follow the literature's list, whatever their own names
        own = benchmarks()[name].classes
    if name in ("CIFAR10", "CIFAR100"):

        def read(i: int) -> Image.Image:
            return to_rgb(data[i][0])

        images = LabelledImages(own, tuple(data.targets), read, lambda i: read(i).tobytes(), name)
    else:
        files, labels = zip(*_files(data), strict=True)
        images = _from_files(own, [int(label) for label in labels], files, name)
    return renamed(images, name) if name in benchmarks() else images


def _files(data: Any) -> list[tuple[Path, int]]:
    """The image files of a torchvision set with their labels."""
    if hasattr(data, "categories"):  # Caltech101
        root = Path(data.root, "101_ObjectCategories")
        named = zip(data.y, data.index, strict=True)
        return [(root / data.categories[y] / f"image_{n:04d}.jpg", y) for y, n in named]
    if hasattr(data, "_labels"):
        files = data._images if hasattr(data, "_images") else data._image_files
        pairs = [(Path(file), y) for file, y in zip(files, data._labels, strict=True)]
        listed = type(data).__name__ != "SUN397"  # which comes as the file system pleases
        return pairs if listed else sorted(pairs, key=lambda pair: str(pair[0]))
    return [(Path(file), y) for file, y in getattr(data, "samples", None) or data._samples]


def _from_files(
    classes: Sequence[str], labels: Sequence[int], files: Sequence[Path], name: str
) -> LabelledImages:
    template = benchmarks()[name].template if name in benchmarks() else None
    return labelled_files(classes, labels, files, f"of {name}", name, template)


def from_split_file(path: Path, split: str) -> LabelledImages:
    """A split file of CoOp (`split_zhou_*.json`): lists of [image, label, class name], with the
    class names of the literature. Images lie beside the file or in a folder beside it;
    `DataError` where they do not, and where it is no such file."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))[split]
        entries = [(str(image), int(label), str(name)) for image, label, name in rows]
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise DataError(
            f"{path.name} is not a split file: it needs a list {split!r} of [image, label, class]."
        ) from error
    names = {label: name for _, label, name in entries}
    if not entries or sorted(names) != list(range(len(names))):
        raise DataError(f"{path.name}: the labels of {split!r} must count up from 0.")
    for image, label, name in entries:
        if name != names[label]:
            raise DataError(f"{path.name}: label {label} is {name!r} and {names[label]!r}.")
        if "\0" in image:
            raise DataError(f"{path.name}: {image!r} is not a name of a file.")
    classes = tuple(names[label] for label in range(len(names)))
    check_classes(classes, path.name)
    folders = [path.parent, *sorted(p for p in path.parent.iterdir() if p.is_dir())]
    root = next((folder for folder in folders if os.path.isfile(folder / entries[0][0])), None)
    if root is None:
        raise DataError(f"The images of {path.name} are not beside it, nor in a folder beside it.")
    name = path.stem.removeprefix("split_zhou_")
    files = [root / image for image, _, _ in entries]
    labels = [label for _, label, _ in entries]
    return _from_files(classes, labels, files, SPLIT_NAMES.get(name, name))
