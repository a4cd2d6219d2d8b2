"""What a person or an API client may send, checked value by value.

Gradio itself checks too little: its image input opens any file of the server that a request
names, and its number fields let NaN through.

`settings` changes those of the defences: an object of "DEFENCE.NAME", or "NAME" for every one that
has it, and values, which the defence's own class checks. `attacked_model` is `clip`, `static`,
`deployed` or `deployed:NAME`. An empty `true_class` (answers are then kept or changed) or `target`
is none.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import ImageData
from PIL import Image
from pydantic import Field, ValidationError, field_validator

from tapt.core.attacks import METHODS, Attack
from tapt.core.errors import InputError, TaptError
from tapt.core.settings import Settings, shown
from tapt.data.names import parse_classes
from tapt.data.pictures import open_image
from tapt.defenses import all_defenses, find_defenses, list_defenses
from tapt.model import ATTACKED_MODELS

MAX_BYTES = 30 * 2**20  # of a picture; gradio writes it as 30.0 MB
MAX_TEXT = 100_000
ATTACKS = ("none", *METHODS)
NOT_A_PICTURE = "Send the picture as an uploaded file or as a data: URL."
BROKEN = "This run failed on the server, for a reason that its log names. Please try again."


def _field(default: Any, title: str, about: str, rule: str = "", **limits: Any) -> Any:
    extra: Any = {"rule": rule} if rule else None
    return Field(default, title=title, description=about, json_schema_extra=extra, **limits)


class Fields(Settings):
    """What a request holds beside the picture, in the order of the API's parameters and in the
    units of the page."""

    class_names: str = _field(
        "", "Class names", "What CLIP may answer: two at least, by commas or one per line."
    )
    attack: str = _field(
        "none",
        "Attack",
        "What moves the pixels; square is black-box, the others use gradients.",
        f"one of {', '.join(ATTACKS)}",
    )
    epsilon: int = _field(
        4, "Epsilon", "Largest change of a pixel, in 1/255; 0: no attack.", ge=0, le=16
    )
    attacked_model: str = _field(
        "clip",
        "The attack sees",
        "clip (vanilla CLIP), static (the prompts as trained) or deployed:NAME (a whole defence).",
    )
    true_class: str = _field("", "True class", "One of the class names, or empty: not known.")
    steps: int = _field(0, "Attack steps", "Or queries; 0: the attack's own number.", ge=0, le=5000)
    step_size: float = _field(0, "Step size", "In 1/255; 0: 2.5 × epsilon / steps.", ge=0, le=16)
    target: str = _field("", "Target", "A class name that the attack moves towards, or empty.")
    seed: int = _field(0, "Seed", "Of all that is random: attack and views.", ge=0, le=2**31 - 1)
    defenses: list[str] | None = _field(
        None,
        "Defences",
        f"Who answers, of {', '.join(list_defenses())}; left out: those by default.",
        "a list of names",
    )
    backbone: str = _field("", "Backbone", "A CLIP model; empty: the page's first one.")
    pack: str = _field("", "Prompts", "Trained for the backbone; empty: its own ones.")
    settings: dict[str, Any] | None = _field(
        None,
        "Settings of the defences",
        'Changes, as {"views": 32} for all that have views, or {"tapt.lr": 0.001}.',
        "an object of names and values",
    )
    max_epsilon: int = _field(8, "Largest epsilon", "In 1/255; the sweep begins at 0.", ge=1, le=16)
    epsilon_step: int = _field(1, "Step", "Between two points, in 1/255.", ge=1, le=8)

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: object) -> object:
        if isinstance(value, str) and len(value) > MAX_TEXT:
            raise InputError(f"Texts have at most {MAX_TEXT:,} characters, got {len(value):,}")
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise InputError("Texts must be valid Unicode; half of a surrogate pair is in one")
        return _whole(value)

    @field_validator("attack")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in ATTACKS:
            raise InputError(f"attack must be one of {', '.join(ATTACKS)}, got {shown(name)}")
        return name

    @field_validator("attacked_model")
    @classmethod
    def _attackable(cls, attacked: str) -> str:
        kind, _, name = attacked.partition(":")
        if kind not in ATTACKED_MODELS or (name and kind != "deployed"):
            allowed = "one of clip, static, deployed and deployed:NAME of a defence"
            raise InputError(f"attacked_model must be {allowed}, got {shown(attacked)}")
        find_defenses([name] if name else None)
        return attacked

    @field_validator("defenses")
    @classmethod
    def _registered(cls, names: list[str] | None) -> list[str] | None:
        return names and [row.name for row in find_defenses(names)]

    @field_validator("settings")
    @classmethod
    def _changes(cls, changes: dict[str, Any] | None) -> dict[str, Any]:
        return {key: _setting(key, value) for key, value in (changes or {}).items()}


def _whole(value: Any) -> Any:
    """A number as Python has it: JSON does not tell 4 from 4.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _setting(key: str, value: object) -> object:
    """A checked change of a setting."""
    owner, _, name = key.rpartition(".")
    rows = [row for row in all_defenses() if owner in ("", row.name)]
    rows = [row for row in rows if name in row.settings.model_fields]
    if not rows:
        raise InputError(f"{shown(key)} is a setting of no defence; write NAME or DEFENCE.NAME.")
    value = _whole(value)
    for row in rows if value is not None else ():
        if isinstance(value, str) and isinstance(row.settings.model_fields[name].default, tuple):
            with suppress(ValueError):
                value = [float(part) for part in value.split(",")]
        row.settings(**{name: value})
    return value


def setting_text(value: object) -> object:
    """A setting as a field or the command line holds it: several numbers as one text."""
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value


SWEEP_ONLY = ("max_epsilon", "epsilon_step")
NAMES = tuple(Fields.model_fields)
# parameters of the endpoints
FIELDS = ("image", *(name for name in NAMES if name not in SWEEP_ONLY))
SWEEP_FIELDS = (*(name for name in FIELDS if name != "epsilon"), *SWEEP_ONLY)


def refusal(error: Exception | str) -> gr.Error:
    """An error for the page: one sentence, nothing in the log. The page shows HTML, so the
    sentence is escaped."""
    return gr.Error(html.escape(str(error), quote=False), print_exception=False)


@contextmanager
def in_words() -> Iterator[None]:
    """Whatever goes wrong within, the person gets one sentence."""
    try:
        yield
    except TaptError as error:
        raise refusal(error) from error
    except gr.Error:
        raise
    except Exception as error:
        raise gr.Error(BROKEN) from error  # with its traceback in the log


@dataclass(frozen=True)
class Request:
    """A checked request.

    values: as they came, without the picture.
    """

    picture: Image.Image
    fields: Fields
    classes: tuple[str, ...]
    attack: Attack | None
    label: str | None
    target: str | None
    values: dict[str, object]

    @property
    def epsilons(self) -> range:
        """Of a sweep, in 1/255."""
        return range(0, self.fields.max_epsilon + 1, self.fields.epsilon_step)


def read_request(values: Mapping[str, object], uploads: str) -> Request:
    """Checks a request; `InputError` where a value has the wrong type, is out of range or does
    not fit the others.

    values: `image` and what `Fields` has; what is missing or None counts as the default.
    uploads: the only folder that the picture may be read from.
    """
    picture = read_picture(values.get("image"), uploads)
    if picture is None:
        raise InputError("Choose a picture first: upload one, paste one or pick an example.")
    fields = read_fields(values)
    classes = tuple(parse_classes(fields.class_names))
    attack = None
    if fields.attack != "none" and (fields.epsilon or METHODS[fields.attack].norm != "Linf"):
        attack = Attack(
            fields.attack,
            max(1, fields.epsilon) / 255,  # CW has none
            fields.steps or None,
            fields.step_size / 255 or None,
            seed=fields.seed,
        )
    label = read_class("true class", fields.true_class, classes)
    target = read_class("target", fields.target, classes) if attack else None
    given = {name: values.get(name) for name in FIELDS[1:]}
    return Request(picture, fields, classes, attack, label, target, given)


def read_fields(values: Mapping[str, object]) -> Fields:
    """What `Fields` has of `values`, checked; raises `InputError`."""
    return Fields(**{k: values[k] for k in NAMES if values.get(k) is not None})


def read_picture(payload: object, uploads: str) -> Image.Image | None:
    """The picture of a request, in RGB; `InputError` where it is no upload, no picture, damaged or
    too large.

    payload: as it came; None for no picture.
    uploads: the only folder whose files may be read.
    """
    if payload is None:
        return None
    try:
        sent = ImageData.model_validate(payload)
        if sent.url and sent.url.startswith("data:"):
            return open_image(_data_url(sent.url))
        path = Path(sent.path or "").resolve()
        inside = path.is_relative_to(Path(uploads).resolve()) and path.is_file()
    except InputError:
        raise
    except (ValidationError, OSError, ValueError) as error:
        raise InputError(NOT_A_PICTURE) from error
    if not inside:
        raise InputError(f"That is not an uploaded file. {NOT_A_PICTURE}")
    return open_image(path)


def _data_url(url: str) -> bytes:
    header, _, data = url.partition(",")
    if len(data) > MAX_BYTES * 4 / 3 + 4:
        raise InputError(f"This picture is too large: at most {MAX_BYTES // 2**20} MB.")
    try:
        if not header.endswith(";base64"):
            raise ValueError("not base64")
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        raise InputError("The data: URL of the picture is not valid base64.") from error


def read_class(name: str, text: str, classes: tuple[str, ...]) -> str | None:
    """A class as it stands among the class names, None when nobody named one; `InputError` where
    it is none of them."""
    wanted = " ".join(text.split()).casefold()
    found = [known for known in classes if known.casefold() == wanted]
    if wanted and not found:
        raise InputError(f"The {name} {shown(text.strip())} is not one of the class names.")
    return found[0] if found else None
