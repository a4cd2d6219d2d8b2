"""Class names as people write them."""

from __future__ import annotations

from collections.abc import Sequence

from tapt.core.errors import InputError

MAX_CLASSES = 1000


def class_names(text: str) -> list[str]:
    """The names in a text, one per line or by commas; trimmed, empty ones left out."""
    names = (" ".join(part.split()) for line in text.splitlines() for part in line.split(","))
    return [name for name in names if name]


def parse_classes(text: str | Sequence[str]) -> list[str]:
    """Class names from text, one per line or by commas; trimmed, without repetitions. A sequence
    is taken name by name. `InputError` for fewer than two names, or more than 1,000."""
    names = class_names(text) if isinstance(text, str) else [" ".join(n.split()) for n in text]
    first: dict[str, str] = {}
    for name in filter(None, names):  # names that differ in case alone are one class
        first.setdefault(name.casefold(), name)
    classes = list(first.values())
    count = len(classes)
    if count < 2:
        raise InputError(
            f"Give at least two class names, one per line or separated by commas; got {count}."
        )
    if count > MAX_CLASSES:
        raise InputError(f"Give at most {MAX_CLASSES:,} class names; got {count:,}.")
    return classes
