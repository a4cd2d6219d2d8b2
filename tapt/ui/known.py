"""The ten kinds that the embedded model was trained on, and everyday names for them."""

from __future__ import annotations

from collections.abc import Iterable

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
