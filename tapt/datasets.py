"""The benchmark sets of the paper: class names, templates, and their layouts on disk."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

from tapt.data import LabelledImages, open_rgb
from tapt.errors import DataError

# how each set names its held-out part and its training part; {}: it has no parts of its own
TORCHVISION_SPLITS: dict[str, dict[str, dict]] = {
    "ImageNet": {"test": {"split": "val"}, "train": {"split": "train"}},
    "Caltech101": {},
    "DTD": {"test": {"split": "test"}, "train": {"split": "train"}},
    "EuroSAT": {},
    "OxfordIIITPet": {"test": {"split": "test"}, "train": {"split": "trainval"}},
    "FGVCAircraft": {"test": {"split": "test"}, "train": {"split": "trainval"}},
    "Food101": {"test": {"split": "test"}, "train": {"split": "train"}},
    "Flowers102": {"test": {"split": "test"}, "train": {"split": "train"}},
    "StanfordCars": {"test": {"split": "test"}, "train": {"split": "train"}},
    "SUN397": {},
    "CIFAR10": {"test": {"train": False}, "train": {"train": True}},
    "CIFAR100": {"test": {"train": False}, "train": {"train": True}},
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
        """The name in a sentence for each of the set's own class names.

        Raises:
            DataError: a name is none of this set's.
        """
        if tuple(own) == self.classes:  # ImageNet has names that are there twice
            return list(own)
        ids = [re.fullmatch(r"n?(\d+)", name) for name in own]
        if self.name in NUMBERED and len(own) == len(self.classes) and all(ids):
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
    that the literature leaves out are dropped."""
    benchmark = benchmarks()[name]
    names = benchmark.rename(data.classes)
    used = [own for own, name in enumerate(names) if name is not None]
    kept = [i for i, label in enumerate(data.labels) if label in used]
    classes = tuple(names[own] for own in used)  # two classes of ImageNet share names
    labels = tuple(used.index(data.labels[i]) for i in kept)
    read = data.read
    return LabelledImages(classes, labels, lambda i: read(kept[i]), name, benchmark.template)


def from_torchvision(source: str, split: str) -> LabelledImages:
    """`torchvision:NAME[:ROOT]`; sets without parts of their own give all their images."""
    from torchvision import datasets

    _, name, *root = source.split(":", 2)
    if name not in TORCHVISION_SPLITS:
        known = ", ".join(TORCHVISION_SPLITS)
        raise DataError(f"torchvision set {name!r} is not one of {known}.")
    options = TORCHVISION_SPLITS[name].get(split, {})
    try:
        data = getattr(datasets, name)(root[0] if root else "data", **options)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise DataError(f"torchvision set {name} is not complete under its root.") from error
    labels = _labels(data)
    order = range(len(labels))
    if name == "SUN397":  # listed as the file system pleases
        order = sorted(order, key=lambda i: str(data._image_files[i]))
    # Flowers102 of older versions has no names at all
    own = list(getattr(data, "classes", None) or getattr(data, "categories", ()))
    if name == "ImageNet" and len(own) != 1000:
        raise DataError(f"ImageNet has 1,000 classes, these folders have {len(own)}.")
    if name in NUMBERED:  # their labels follow the literature's list, whatever their own names
        own = list(benchmarks()[name].classes)
    images = LabelledImages(
        tuple(own), tuple(int(labels[i]) for i in order), lambda i: data[order[i]][0], name
    )
    return renamed(images, name) if name in benchmarks() else images


def _labels(data: object) -> Sequence[int]:
    for attribute in ("targets", "y", "_labels"):
        if hasattr(data, attribute):
            return getattr(data, attribute)
    return [label for _, label in data._samples]


def from_split_file(path: Path, split: str) -> LabelledImages:
    """A split file of CoOp (`split_zhou_*.json`): lists of [image, label, class name], with the
    class names of the literature. Images lie beside the file or in a folder beside it."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))[split]
        entries = [(str(image), int(label), str(name)) for image, label, name in entries]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path.name} is not a split file: it needs a list {split!r} of [image, label, class]."
        ) from error
    names = {label: name for _, label, name in entries}
    if not entries or sorted(names) != list(range(len(names))):
        raise DataError(f"{path.name}: the labels of {split!r} must count up from 0.")
    folders = [path.parent, *sorted(p for p in path.parent.iterdir() if p.is_dir())]
    found = [folder for folder in folders if (folder / entries[0][0]).is_file()]
    if not found:
        raise DataError(f"The images of {path.name} are not beside it, nor in a folder beside it.")
    name = path.stem.removeprefix("split_zhou_")
    name = SPLIT_NAMES.get(name, name)
    benchmark = benchmarks().get(name)
    return LabelledImages(
        tuple(names[label] for label in range(len(names))),
        tuple(label for _, label, _ in entries),
        lambda i: open_rgb((found[0] / entries[i][0]).read_bytes, entries[i][0]),
        name,
        benchmark and benchmark.template,
    )
