"""Class names by what a backbone has seen, and the examples."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tapt.data.benchmarks import benchmarks
from tapt.data.names import names_text
from tapt.packs.backbones import known_names

FEW = 20


class Example(NamedTuple):
    """A picture that comes with the page.

    classes: None for the names that the page starts with.
    """

    name: str
    file: str
    true_class: str
    classes: str | None = None

    @property
    def path(self) -> Path:
        return Path(__file__).parents[1] / "examples" / self.file


EXAMPLES = [
    Example("Horse", "tuxpaint-gpl2/horse.png", "horse"),
    Example("Frog", "tuxpaint-gpl2/frog.png", "frog", "frog, cat, mushroom, orange, ship"),
    Example("Truck", "tuxpaint-gpl2/fire-truck.png", "fire truck", "fire truck, ship, pizza, dog"),
    Example("Coffee", "coffee.png", "espresso", "espresso, teapot, plate, ice cream, frying pan"),
    Example("Rocket", "rocket.png", "rocket", "rocket, banana, cathedral, person, tree"),
]


@cache
def presets(backbone: str) -> dict[str, str]:
    """Class names by name, as text for the page; the first are those that it starts with."""
    names = list(known_names(backbone))
    own = {f"All {len(names)} that this model knows": names} if names else {}
    if len(names) > 2 * FEW:
        own = {f"{FEW} everyday things": names[:FEW], **own}
    sets = {name: benchmark.classes for name, benchmark in benchmarks().items()}
    first = {} if names else {"CIFAR10": sets["CIFAR10"]}
    return {name: names_text(each) for name, each in {**own, **first, **sets}.items()}


def first_names(backbone: str) -> str:
    """The class names that the page starts with."""
    return next(iter(presets(backbone).values()))


def unknown_names(classes: Iterable[str], backbone: str) -> list[str]:
    """The class names that a backbone has never seen, where that is known of it."""
    known = _words(backbone)
    return [name for name in classes if known and not _spellings(name) & known]


@cache
def _words(backbone: str) -> frozenset[str]:
    return frozenset(
        word
        for name, words in known_names(backbone).items()
        for each in (name, *words)
        for word in _spellings(each)
    )


def _spellings(name: str) -> set[str]:
    """A name without its article, in one and in many."""
    words = " ".join(re.sub("[_-]", " ", name.casefold()).split())
    words = re.sub("^(an?|the) ", "", words)
    return {words, words.removesuffix("s")}
