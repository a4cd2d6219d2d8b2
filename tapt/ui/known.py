"""What the page knows by heart: the embedded model's ten kinds with everyday names for them, the
class names of data sets, and the examples."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tapt.data.benchmarks import benchmarks

KINDS = {
    "airplane": ("plane", "aeroplane", "jet", "aircraft", "airliner", "jumbo jet"),
    "automobile": ("car", "sports car", "sedan", "motor car", "racing car"),
    "bird": ("songbird", "sparrow", "little bird", "ostrich"),
    "cat": ("kitten", "kitty", "tabby cat", "house cat"),
    "deer": ("doe", "stag", "fawn", "elk", "reindeer"),
    "dog": ("puppy", "doggy", "hound", "pup"),
    "frog": ("toad", "tree frog", "bullfrog"),
    "horse": ("pony", "stallion", "mare", "foal"),
    "ship": ("boat", "vessel", "ferry", "ocean liner", "yacht", "cargo ship"),
    "truck": ("lorry", "fire truck", "fire engine", "pickup truck", "dump truck"),
}
_KNOWN = {name for kind, synonyms in KINDS.items() for name in (kind, *synonyms)}
_ARTICLES = ("a ", "an ", "the ")


def is_known(name: str) -> bool:
    """Whether a class name is one of the ten kinds or an everyday name for one."""
    words = " ".join(name.casefold().replace("_", " ").replace("-", " ").split())
    for article in _ARTICLES:
        words = words.removeprefix(article)
    return words in _KNOWN or words.removesuffix("s") in _KNOWN


def unknown_names(classes: Iterable[str]) -> list[str]:
    """The class names that are none of the ten kinds."""
    return [name for name in classes if not is_known(name)]


TEN_KINDS = ", ".join(KINDS)
OWN_PRESET = "The embedded model's ten kinds"


def presets() -> dict[str, str]:
    """Class names by data set, as text for the page."""
    sets = {name: "\n".join(benchmark.classes) for name, benchmark in benchmarks().items()}
    del sets["CIFAR10"]  # the same ten
    return {OWN_PRESET: TEN_KINDS, **sets}


class Example(NamedTuple):
    """A picture that comes with the page."""

    name: str
    file: str
    classes: str = TEN_KINDS

    @property
    def path(self) -> Path:
        return Path(__file__).parents[1] / "examples" / self.file


EXAMPLES = [
    Example("Horse", "tuxpaint-gpl2/horse.png"),
    Example("Plane", "tuxpaint-gpl2/airplane.png"),
    Example("Frog", "tuxpaint-gpl2/frog.png"),
    Example("Truck", "tuxpaint-gpl2/fire-truck.png", "fire truck, sports car, airplane, ship"),
    Example("Cat", "cat.png"),
    Example("Coffee", "coffee.png", "cup of coffee, teapot, cat, dog"),
]
