"""What a person or an API client may send, checked value by value.

Gradio itself checks too little: its image input opens any file of the server that a request
names, and its number fields let NaN through.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gradio as gr
from gradio.data_classes import ImageData
from PIL import Image
from pydantic import Field, ValidationError, field_validator

from tapt.core.attacks import METHODS, Attack
from tapt.core.errors import InputError
from tapt.core.settings import Settings, limits, plain_type, shown
from tapt.core.tuning import TuneConfig
from tapt.data.names import parse_classes
from tapt.data.pictures import open_image
from tapt.defenses import find_defenses
from tapt.model import ATTACKED_MODELS

MAX_BYTES = 10_000_000
MAX_TEXT = 100_000
NOT_A_PICTURE = "Send the picture as an uploaded file or as a data: URL."


def _of(owner: type[Settings], name: str, title: str, default: Any, most: int | None = None) -> Any:
    """A field as its own class declares it, with what the page calls it and, for everybody's
    sake, at most as much as `most`."""
    field = owner.model_fields[name]
    low, high = limits(field)
    text = f"{field.description}."
    text = text[0].upper() + text[1:]
    return Field(default, title=title, description=text, ge=low, le=most or high)


class Fields(Settings):
    """What a request holds beside the picture, in the order of the API's parameters and in the
    units of the page. None among the test-time settings leaves the pack's own."""

    class_names: str = ""
    attack: Literal[("none", *METHODS)] = "none"
    epsilon: int = Field(
        4,
        ge=0,
        le=16,
        title="Epsilon",
        description="Largest change of a pixel, in 1/255; 0: no attack.",
    )
    attacked_model: Literal[ATTACKED_MODELS] = "clip"
    true_class: str = ""
    steps: int = Field(
        0,
        ge=0,
        le=5000,
        title="Attack steps",
        description="Or queries; 0: the attack's own number.",
    )
    step_size: float = Field(
        0, ge=0, le=16, title="Step size", description="In 1/255; 0: 2.5 × epsilon / steps."
    )
    target: str = ""
    seed: int = _of(Attack, "seed", "Seed", 0)
    defenses: list[str] | None = Field(
        None, title="Defences", json_schema_extra={"rule": "a list of names"}
    )
    backbone: str = ""
    pack: str = ""
    views: int | None = _of(TuneConfig, "views", "Views", None, 256)
    keep: float | None = _of(TuneConfig, "keep", "Kept share", None)
    tune_steps: int | None = _of(TuneConfig, "steps", "Tuning steps", None, 20)
    lr: float | None = _of(TuneConfig, "lr", "Learning rate", None, 1)
    alpha: float | None = _of(TuneConfig, "alpha", "Alpha", None)
    max_epsilon: int = Field(
        8, ge=1, le=16, title="Largest epsilon", description="In 1/255; the sweep begins at 0."
    )
    epsilon_step: int = Field(
        1, ge=1, le=8, title="Step", description="Between two points, in 1/255."
    )

    @field_validator("*", mode="before")
    @classmethod
    def _whole(cls, value: object) -> object:
        return int(value) if isinstance(value, float) and value.is_integer() else value

    @field_validator("defenses")
    @classmethod
    def _registered(cls, names: list[str] | None) -> list[str] | None:
        return names and [row.name for row in find_defenses(names)]

    @field_validator("class_names", "true_class", "target", "backbone", "pack")
    @classmethod
    def _text(cls, value: str) -> str:
        if len(value) > MAX_TEXT:
            raise InputError(f"Texts have at most {MAX_TEXT:,} characters, got {len(value):,}")
        if any("\ud800" <= character <= "\udfff" for character in value):  # JSON lets these through
            raise InputError("Texts must be valid Unicode; half of a surrogate pair is in one")
        return value


SWEEP_ONLY = ("max_epsilon", "epsilon_step")
NAMES = tuple(Fields.model_fields)
# parameters of the endpoints
FIELDS = ("image", *(name for name in NAMES if name not in SWEEP_ONLY))
SWEEP_FIELDS = (*(name for name in FIELDS if name != "epsilon"), *SWEEP_ONLY)
TEST_TIME = {"views": "views", "keep": "keep", "tune_steps": "steps", "lr": "lr", "alpha": "alpha"}


def refusal(error: Exception | str) -> gr.Error:
    """An error for the page: one sentence, nothing in the log. The page shows HTML, so the
    sentence is escaped."""
    return gr.Error(html.escape(str(error), quote=False), print_exception=False)


class PictureData(ImageData):
    """What a request sends as a picture; anything else is refused in a sentence."""

    @classmethod
    def model_validate(cls, value: object, **options: object) -> ImageData:
        try:
            return super().model_validate(value, **options)
        except ValidationError:
            raise refusal(NOT_A_PICTURE) from None


class PictureInput(gr.Image):
    """An image input that reads uploads and nothing else; handlers get RGB pictures."""

    is_template = True  # the browser shows it as a plain Image
    data_model = PictureData

    def preprocess(self, payload: ImageData | None) -> Image.Image | None:
        try:
            return read_picture(payload, self.GRADIO_CACHE)
        except InputError as error:
            raise refusal(error) from error


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

    @property
    def changes(self) -> dict[str, float]:
        """Test-time settings by their own names."""
        given = ((own, getattr(self.fields, name)) for name, own in TEST_TIME.items())
        return {name: value for name, value in given if value is not None}


def read_request(values: Mapping[str, object], uploads: str) -> Request:
    """Checks a request.

    values: `image` and what `Fields` has; what is missing or None counts as the default.
    uploads: the only folder that the picture may be read from.

    Raises:
        InputError: a value has the wrong type, is out of range or does not fit the others.
    """
    image = values.get("image")
    payload = None if image is None else PictureData.model_validate(image)
    picture = read_picture(payload, uploads)
    if picture is None:
        raise InputError("Choose a picture first: upload one, paste one or pick an example.")
    fields = read_fields(values)
    classes = tuple(parse_classes(fields.class_names))
    attack = _attack(fields)
    return Request(
        picture,
        fields,
        classes,
        attack,
        read_class("true class", fields.true_class, classes),
        None if attack is None else read_class("target", fields.target, classes),
        {name: values.get(name) for name in FIELDS[1:]},
    )


def read_fields(values: Mapping[str, object]) -> Fields:
    """What `Fields` has of `values`, checked; raises `InputError`."""
    return Fields(**{k: values[k] for k in NAMES if values.get(k) is not None})


def _attack(fields: Fields) -> Attack | None:
    if fields.attack == "none":
        return None
    if METHODS[fields.attack].norm == "Linf" and not fields.epsilon:
        return None
    return Attack(
        fields.attack,
        max(1, fields.epsilon) / 255,  # CW has none
        fields.steps or None,
        fields.step_size / 255 or None,
        seed=fields.seed,
    )


def read_picture(payload: ImageData | None, uploads: str) -> Image.Image | None:
    """The picture of a request, in RGB.

    uploads: the only folder whose files may be read.

    Raises:
        InputError: not an upload, not a picture, damaged or too large.
    """
    if payload is None:
        return None
    if payload.url and payload.url.startswith("data:"):
        return open_image(_data_url(payload.url))
    if not payload.path:
        raise InputError(NOT_A_PICTURE)
    try:
        path = Path(payload.path).resolve()
        inside = path.is_relative_to(Path(uploads).resolve()) and path.is_file()
    except (OSError, ValueError) as error:
        raise InputError(NOT_A_PICTURE) from error
    if not inside:
        raise InputError(f"That is not an uploaded file. {NOT_A_PICTURE}")
    return open_image(path)


def _data_url(url: str) -> bytes:
    header, _, data = url.partition(",")
    if len(data) > MAX_BYTES * 4 / 3 + 4:
        raise InputError(f"This picture is too large: at most {MAX_BYTES // 1_000_000} MB.")
    try:
        if not header.endswith(";base64"):
            raise ValueError("not base64")
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        raise InputError("The data: URL of the picture is not valid base64.") from error


def read_class(name: str, text: str, classes: tuple[str, ...]) -> str | None:
    """A class as it stands among the class names; None when nobody named one.

    Raises:
        InputError: it is not one of the class names.
    """
    wanted = " ".join(text.split()).casefold()
    if not wanted:
        return None
    for known in classes:
        if known.casefold() == wanted:
            return known
    raise InputError(f"The {name} {shown(text.strip())} is not one of the class names.")


def number(name: str, kind: type = gr.Number, **options: object) -> gr.components.Component:
    """The input of a number, as `Fields` declares it."""
    field = Fields.model_fields[name]
    low, high = limits(field)
    return kind(
        value=field.default,
        label=field.title,
        info=field.description,
        minimum=low,
        maximum=high,
        step=1 if plain_type(field) is int else 0.0001,
        min_width=120,
        **options,
    )
