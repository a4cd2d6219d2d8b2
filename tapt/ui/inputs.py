"""What a person or an API client may send, checked value by value.

Gradio itself checks too little: its image input opens any file of the server that a request
names, and its slider lets NaN through.
"""

from __future__ import annotations

import base64
import html
import math
from pathlib import Path

import gradio as gr
from gradio.data_classes import ImageData
from PIL import Image
from pydantic import ValidationError

from tapt.attacks import AttackConfig
from tapt.defense import THREATS
from tapt.errors import InputError
from tapt.images import open_image

MAX_EPSILON = 16
MAX_BYTES = 10_000_000
MAX_TEXT = 100_000
PGD_STEPS = 10
NOT_A_PICTURE = "Send the picture as an uploaded file or as a data: URL."


def refusal(error: Exception | str) -> gr.Error:
    """An error for the page: one sentence, nothing in the log. The page shows HTML, so the
    sentence is escaped."""
    return gr.Error(html.escape(str(error), quote=False), print_exception=False)


class _PictureData(ImageData):
    @classmethod
    def model_validate(cls, value: object, **options: object) -> ImageData:
        try:
            return super().model_validate(value, **options)
        except ValidationError:
            raise refusal(NOT_A_PICTURE) from None


class PictureInput(gr.Image):
    """An image input that reads uploads and nothing else; handlers get RGB pictures."""

    is_template = True  # the browser shows it as a plain Image
    data_model = _PictureData

    def preprocess(self, payload: ImageData | None) -> Image.Image | None:
        try:
            return read_picture(payload, self.GRADIO_CACHE)
        except InputError as error:
            raise refusal(error) from error


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


def read_attack(attack: object, epsilon: object, threat: object) -> AttackConfig | None:
    """The attack of a request, or None without one.

    attack: whether to attack at all.
    epsilon: in 1/255; 0 is no attack.

    Raises:
        InputError: a value has the wrong type or is out of range.
    """
    if not isinstance(attack, bool):
        raise InputError(f"Attack must be true or false, got {_shown(attack)}.")
    number = isinstance(epsilon, (int, float)) and not isinstance(epsilon, bool)
    if not number or not math.isfinite(epsilon) or epsilon != int(epsilon):
        raise InputError(
            f"Epsilon must be a whole number from 0 to {MAX_EPSILON} (in 1/255), "
            f"got {_shown(epsilon)}."
        )
    if not 0 <= epsilon <= MAX_EPSILON:
        raise InputError(f"Epsilon must be from 0 to {MAX_EPSILON} (in 1/255), got {int(epsilon)}.")
    if not isinstance(threat, str) or threat not in THREATS:
        raise InputError(
            f"The attacked model must be one of {', '.join(THREATS)}, got {_shown(threat)}."
        )
    if not attack or epsilon == 0:
        return None
    return AttackConfig(epsilon=int(epsilon) / 255, steps=PGD_STEPS)


def read_label(text: str, classes: tuple[str, ...]) -> str | None:
    """The true class as it stands among the class names; None when nobody named one.

    Raises:
        InputError: it is not one of the class names.
    """
    wanted = " ".join(text.split()).casefold()
    if not wanted:
        return None
    for name in classes:
        if name.casefold() == wanted:
            return name
    raise InputError(f"The true class {_shown(text.strip())} is not one of the class names.")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
