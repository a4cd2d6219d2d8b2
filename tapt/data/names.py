"""Class names as people write them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from tapt.core.errors import InputError

MAX_CLASSES = 1000
_NAME = re.compile(r'\s*"([^"\n]+)"\s*(?=[,;\n]|\Z)|([^,;\n]+)')


def class_names(text: str) -> list[str]:
    """The names in a text, one per line or by commas or semicolons, which quotes around a name
    keep; trimmed, empty ones left out."""
    found = _NAME.findall("\n".join(text.splitlines()))
    names = (" ".join((quoted or plain).split()) for quoted, plain in found)
    return [name for name in names if name]


def names_text(names: Iterable[str]) -> str:
    """The text of which `class_names` makes these names, in one line."""
    return ", ".join(f'"{name}"' if re.search("[,;]", name) else name for name in names)


def distinct(names: Iterable[str]) -> list[str]:
    """The first of the names that differ in case or spaces alone."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault("".join(name.casefold().split()), name)
    return list(first.values())


def parse_classes(text: str | Sequence[str]) -> list[str]:
    """Class names from text, as `class_names` reads it, without repetitions. A sequence is taken
    name by name. `InputError` for fewer than two names, or more than 1,000."""
    names = class_names(text) if isinstance(text, str) else [" ".join(n.split()) for n in text]
    classes = distinct(filter(None, names))
    count = len(classes)
    if count < 2:
        raise InputError(
            f"Give at least two class names, one per line or separated by commas; got {count}."
        )
    if count > MAX_CLASSES:
        raise InputError(f"Give at most {MAX_CLASSES:,} class names; got {count:,}.")
    return classes
