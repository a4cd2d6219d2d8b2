"""What a person or an API client may send, checked value by value.

Gradio itself checks too little: its image input opens any file of the server that a request
names, and its number fields let NaN through.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
from gradio.data_classes import ImageData
from PIL import Image
from pydantic import ValidationError

from tapt.attacks import ATTACKS, AttackConfig
from tapt.compare import ALL_THREATS
from tapt.defense import parse_classes
from tapt.errors import InputError
from tapt.images import open_image

MAX_BYTES = 10_000_000
MAX_TEXT = 100_000
NOT_A_PICTURE = "Send the picture as an uploaded file or as a data: URL."


@dataclass(frozen=True)
class Number:
    """A number that a request may hold: its name on the page, its range, one line for the person
    who chooses, and what stands for None."""

    label: str
    low: int
    high: int
    info: str
    default: float | None = 0
    whole: bool = True


NUMBERS = {
    "epsilon": Number("Epsilon", 0, 16, "Largest change of a pixel, in 1/255; 0: no attack.", 4),
    "steps": Number("Attack steps", 0, 5000, "Or queries; 0: the attack's own number."),
    "step_size": Number("Step size", 0, 16, "In 1/255; 0: 2.5 × epsilon / steps.", whole=False),
    "seed": Number("Seed", 0, 2**31 - 1, "Of the views and of all that is random in the attack."),
    "views": Number("Views", 1, 256, "The picture and random crops of it.", None),
    "keep": Number("Kept share", 0, 1, "The most confident views take part.", None, False),
    "tune_steps": Number("Tuning steps", 0, 20, "AdamW steps; the method takes one.", None),
    "lr": Number("Learning rate", 0, 1, "Of the tuning steps.", None, False),
    "alpha": Number(
        "Alpha",
        0,
        1,
        "Share of the adversarial statistics; the clean ones get the rest.",
        None,
        False,
    ),
    "max_epsilon": Number("Largest epsilon", 1, 16, "In 1/255; the sweep begins at 0.", 8),
    "epsilon_step": Number("Step", 1, 8, "Between two points, in 1/255.", 1),
}
# what a request is made of, in the order of the API's parameters
FIELDS = (
    "image",
    "class_names",
    "attack",
    "epsilon",
    "threat",
    "true_class",
    "steps",
    "step_size",
    "target",
    "seed",
    "backbone",
    "pack",
    "views",
    "keep",
    "tune_steps",
    "lr",
    "alpha",
)
SWEEP_FIELDS = (*(name for name in FIELDS if name != "epsilon"), "max_epsilon", "epsilon_step")
TEXTS = {"class_names": "Class names", "true_class": "True class", "target": "Target"}


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

    epsilons: of a sweep.
    changes: test-time settings that replace the pack's own; None leaves one as it is.
    values: as they came, without the picture.
    """

    picture: Image.Image
    classes: tuple[str, ...]
    attack: AttackConfig | None
    threat: str
    label: str | None
    target: str | None
    seed: int
    epsilons: tuple[int, ...]
    backbone: str
    pack: str
    changes: dict[str, float | None]
    values: dict[str, object]


def read_request(values: Mapping[str, object], uploads: str) -> Request:
    """Checks a request.

    values: by the names of `FIELDS` or `SWEEP_FIELDS`; what is missing counts as None, and None
        as the default.
    uploads: the only folder that the picture may be read from.

    Raises:
        InputError: a value has the wrong type, is out of range or does not fit the others.
    """
    image = values.get("image")
    payload = None if image is None else PictureData.model_validate(image)
    picture = read_picture(payload, uploads)
    if picture is None:
        raise InputError("Choose a picture first: upload one, paste one or pick an example.")
    texts = {name: read_text(title, values.get(name)) for name, title in TEXTS.items()}
    classes = tuple(parse_classes(texts["class_names"]))
    numbers = {name: read_number(name, values.get(name)) for name in NUMBERS}
    attack = _attack(read_choice("Attack", values.get("attack"), ("none", *ATTACKS)), numbers)
    threat = read_choice("The attacked model", values.get("threat"), ALL_THREATS)
    if threat == "adaptive" and attack is not None and attack.name == "square":
        threat = "square"  # queries need no gradients to be adaptive
    names = ("views", "keep", "lr", "alpha")
    return Request(
        picture,
        classes,
        attack,
        threat,
        read_class("true class", texts["true_class"], classes),
        None if attack is None else read_class("target", texts["target"], classes),
        numbers["seed"],
        tuple(range(0, numbers["max_epsilon"] + 1, numbers["epsilon_step"])),
        read_text("Backbone", values.get("backbone")),
        read_text("Pack", values.get("pack")),
        {**{name: numbers[name] for name in names}, "steps": numbers["tune_steps"]},
        {name: values.get(name) for name in FIELDS[1:]},
    )


def _attack(name: str, numbers: Mapping[str, float]) -> AttackConfig | None:
    if name == "none" or (ATTACKS[name].norm == "Linf" and not numbers["epsilon"]):
        return None
    return AttackConfig(
        name,
        max(1, numbers["epsilon"]) / 255,  # CW has none
        numbers["steps"] or None,
        numbers["step_size"] / 255 or None,
        seed=numbers["seed"],
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


def read_text(name: str, value: object) -> str:
    """Text of a request; None counts as empty.

    Raises:
        InputError: not text, or longer than any sensible list of names.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{name} must be text, got {_shown(value)}.")
    if len(value) > MAX_TEXT:
        raise InputError(f"{name} must be at most {MAX_TEXT:,} characters, got {len(value):,}.")
    if any("\ud800" <= character <= "\udfff" for character in value):  # JSON lets these through
        raise InputError(f"{name} must be valid Unicode; half of a surrogate pair is in it.")
    return value


def read_number(name: str, value: object) -> float | None:
    """A number of `NUMBERS`; None counts as its default.

    Raises:
        InputError: not a number, not finite, not whole where it must be, or out of range.
    """
    rule = NUMBERS[name]
    if value is None:
        return rule.default
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not rule.low <= value <= rule.high or (rule.whole and value != int(value)):
        kind = "a whole number" if rule.whole else "a number"
        raise InputError(
            f"{rule.label} must be {kind} from {rule.low} to {rule.high}, got {_shown(value)}."
        )
    return int(value) if rule.whole else float(value)


def read_choice(name: str, value: object, allowed: Iterable[str]) -> str:
    """One of the allowed words; None counts as the first.

    Raises:
        InputError: something else.
    """
    allowed = list(allowed)
    if value is None:
        return allowed[0]
    if not isinstance(value, str) or value not in allowed:
        raise InputError(f"{name} must be one of {', '.join(allowed)}, got {_shown(value)}.")
    return value


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
    raise InputError(f"The {name} {_shown(text.strip())} is not one of the class names.")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
