"""What a person or an API client may send, checked value by value.

Gradio itself checks too little: its image input opens any file of the server that a request
names, and its number fields let NaN through.

Settings of the defences come as one field, `settings`: an object of changes, "DEFENCE.NAME" for one
defence or "NAME" for every one that has it, as `tapt.model.Model.settings` takes them; the
defence's own class says what is wrong with a value. `attacked_model` is `clip`, `static`,
`deployed` or `deployed:NAME`. An empty `true_class` (answers are kept or changed then) or `target`
is none.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import ImageData
from PIL import Image
from pydantic import Field, ValidationError, field_validator
from typing_extensions import Self

from tapt.core.attacks import METHODS, Attack
from tapt.core.errors import InputError, TaptError
from tapt.core.settings import Settings, shown
from tapt.data.names import parse_classes
from tapt.data.pictures import open_image
from tapt.defenses import all_defenses, find_defenses
from tapt.model import ATTACKED_MODELS

MAX_BYTES = 30 * 2**20  # of a picture; gradio writes it as 30.0 MB
MAX_TEXT = 100_000
ATTACKS = ("none", *METHODS)
NOT_A_PICTURE = "Send the picture as an uploaded file or as a data: URL."
BROKEN = "This run failed on the server, for a reason that its log names. Please try again."


class Fields(Settings):
    """What a request holds beside the picture, in the order of the API's parameters and in the
    units of the page."""

    class_names: str = Field(
        "", description="What CLIP may answer: two names at least, by commas or one per line."
    )
    attack: str = Field(
        "none",
        title="Attack",
        description="What moves the pixels; square is black-box, the others use gradients.",
        json_schema_extra={"rule": f"one of {', '.join(ATTACKS)}"},
    )
    epsilon: int = Field(
        4,
        ge=0,
        le=16,
        title="Epsilon",
        description="Largest change of a pixel, in 1/255; 0: no attack.",
    )
    attacked_model: str = Field(
        "clip",
        description="What the attack sees: clip (vanilla CLIP), static (the prompts as trained), "
        "or deployed:NAME (a whole defence, random views and tuning included).",
    )
    true_class: str = Field(
        "", description="The right one of the class names; empty where nobody knows it."
    )
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
    target: str = Field(
        "", description="A class name that the attack moves towards; empty: away from the truth."
    )
    seed: int = Field(
        0, ge=0, le=2**31 - 1, title="Seed", description="Of all that is random, attack and views."
    )
    defenses: list[str] | None = Field(
        None,
        title="Defences",
        description="Names of those that answer; left out: those that do by default.",
        json_schema_extra={"rule": "a list of names"},
    )
    backbone: str = Field("", description="The CLIP model; empty: the page's first one.")
    pack: str = Field("", description="The trained prompts; empty: the backbone's own.")
    settings: dict[str, Any] | None = Field(
        None,
        title="Settings of the defences",
        description='Changes, as {"views": 32} for all that have views, or {"tapt.lr": 0.001}.',
        json_schema_extra={"rule": "an object of names and values"},
    )
    max_epsilon: int = Field(
        8, ge=1, le=16, title="Largest epsilon", description="In 1/255; the sweep begins at 0."
    )
    epsilon_step: int = Field(
        1, ge=1, le=8, title="Step", description="Between two points, in 1/255."
    )

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: object) -> object:
        if isinstance(value, str) and len(value) > MAX_TEXT:
            raise InputError(f"Texts have at most {MAX_TEXT:,} characters, got {len(value):,}")
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise InputError("Texts must be valid Unicode; half of a surrogate pair is in one")
        return _whole(value)  # JSON has one kind of number

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
            raise InputError(
                "attacked_model must be one of clip, static, deployed and deployed:NAME of a "
                f"defence, got {shown(attacked)}"
            )
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
        row.settings(**{name: value})
    return value


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


class PictureData(ImageData):
    """What a request sends as a picture; anything else is refused in a sentence."""

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        try:
            return super().model_validate(obj, **options)
        except ValidationError:
            raise refusal(NOT_A_PICTURE) from None


class PictureInput(gr.Image):
    """An image input that reads uploads and nothing else; handlers get RGB pictures."""

    is_template = True  # the browser shows it as a plain Image
    data_model = PictureData

    def preprocess(self, payload: ImageData | None) -> Image.Image | None:
        with in_words():
            return read_picture(payload, self.GRADIO_CACHE)


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
    """Checks a request.

    values: `image` and what `Fields` has; what is missing or None counts as the default.
    uploads: the only folder that the picture may be read from.

    Raises:
        InputError: a value has the wrong type, is out of range or does not fit the others.
    """
    image = values.get("image")
    picture = read_picture(image and PictureData.model_validate(image), uploads)
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
        raise InputError(f"This picture is too large: at most {MAX_BYTES // 2**20} MB.")
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
