"""Files of a pack, read with distrust: what they must hold, and how version 1 becomes version 2.

One sentence says whatever is wrong with them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tapt.core.errors import PackError
from tapt.core.prompts import PromptConfig
from tapt.core.settings import STRICT, sentence

FORMAT, VERSION = "tapt-pack", 2
MAX_CONFIG_BYTES = 1_000_000
Shape = tuple[int, ...]


def _rule(text: str, **limits: Any) -> Any:
    return Field(json_schema_extra={"rule": text}, **limits)


Size = Annotated[int, Field(ge=1, le=99_999)]
Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0, le=1e9)]
Interval = Annotated[list[Share], _rule("two numbers from 0 to 1", min_length=2, max_length=2)]
Colour = Annotated[
    list[Annotated[float, Field(ge=-10, le=10)]],
    _rule("three numbers from -10 to 10", min_length=3, max_length=3),
]


class Architecture(BaseModel):
    """Sizes of a backbone, as `Backbone.architecture` names them."""

    model_config = STRICT

    image_size: Size
    image_tokens: Size
    visual_width: Size
    visual_blocks: Size
    text_width: Size
    text_blocks: Size
    context_length: Size


class BaseModelEntry(BaseModel):
    """The backbone that a pack was made for."""

    model_config = STRICT

    source: str
    revision: str | None = None
    sha256: str | None = None
    architecture: Architecture
    mean: Colour
    std: Colour


class Row(BaseModel):
    """One result: a data set, a defence, and an attack. Other keys are dropped.

    settings: test-time settings by which it differs from the pack's own.
    """

    model_config = ConfigDict(**{**STRICT, "extra": "ignore"})

    dataset: str
    defense: str
    attacked_model: Literal["clip", "static", "deployed", "all"]
    attack: str
    epsilon_255: int | None = Field(ge=0, le=255)
    steps: int | None = Field(ge=0, le=10**9)
    n: int = Field(ge=1, le=10**9)
    clean_accuracy: Share
    clean_ci95: Interval
    accuracy: Share
    ci95: Interval
    budget: str
    seconds_per_image: Seconds
    attack_seconds_per_image: Seconds
    l2_median: float | None = Field(None, ge=0, le=1e6)
    settings: dict[str, JsonValue] = {}


class PackConfig(BaseModel):
    """The whole file.

    test_time: settings by defence, which the registry of defences judges.
    training: how the prompts were made; anything.
    """

    model_config = STRICT

    format: Literal["tapt-pack"] = "tapt-pack"
    version: Literal[2] = 2
    base_model: BaseModelEntry = _rule("an object")
    prompts: PromptConfig = _rule("an object")
    test_time: dict[str, dict[str, JsonValue]] = _rule("an object for each defence")
    training: dict[str, JsonValue] = _rule("an object")
    evaluation: list[Row] = _rule("an object for each row")


def read_config(path: Path, name: str) -> PackConfig:
    """A checked config.json, `PackError` where there is none; `name` is the pack's in messages."""
    where = f"{path.name} of pack {name!r}"
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise PackError(f"{where} is larger than 1 MB.")
        text = path.read_text(encoding="utf-8")
        config = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except FileNotFoundError as error:
        raise PackError(f"Pack {name!r} has no {path.name}.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise PackError(f"{where} is not valid JSON.") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise PackError(f'{where} does not say "format": "{FORMAT}".')
    version = config.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise PackError(
            f"{where} has format version {version!r}; this program reads versions 1 to {VERSION}."
        )
    try:
        return PackConfig(**(_converted(config) if version == 1 else config))
    except ValidationError as error:
        raise PackError(f"{where}: {sentence(error, PackConfig)}.") from error


def _converted(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config of version 1 as one of version 2, faults and all."""
    settings, rows = config.get("test_time"), config.get("evaluation")
    changed = {**config, "version": 2}
    if isinstance(settings, dict):
        views = {name: settings[name] for name in ("views", "keep") if name in settings}
        changed["test_time"] = {"tapt": settings, "ensemble": views}
    if isinstance(rows, list):
        changed["evaluation"] = [_converted_row(row) for row in rows]
    return changed


def _converted_row(row: Any) -> Any:
    if not isinstance(row, dict):
        return row
    changed = {**row}
    if "threat" in row:
        threat = changed.pop("threat")
        changed["attacked_model"] = "deployed" if threat in ("square", "adaptive") else threat
    if isinstance(budget := row.get("budget"), str):  # of the worst of several attacks
        for old in ("adaptive", "square"):
            budget = budget.replace(f" on {old} (", " on deployed (")
        changed["budget"] = budget
    if row.get("defense") == "random-start":
        changed |= {"defense": "tapt", "settings": {"random_start": True}}
    return changed


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError("JSON has no such number")
    return value


def read_tensors(path: Path, shapes: Mapping[str, Shape], name: str) -> dict[str, Tensor]:
    """Reads exactly the tensors of `shapes`, in float32, header first and values after;
    `PackError` where they are missing or malformed."""
    where = f"{path.name} of pack {name!r}"
    try:
        with safe_open(path, "pt") as file:
            keys = set(file.keys())
            for word, wrong in (("lacks", set(shapes) - keys), ("has unknown", keys - set(shapes))):
                if wrong:
                    raise PackError(f"{where} {word} {', '.join(sorted(wrong))}.")
            for key, shape in shapes.items():
                entry = file.get_slice(key)
                if entry.get_dtype() != "F32":
                    raise PackError(f"{where}: {key} must be F32, got {entry.get_dtype()}.")
                if tuple(entry.get_shape()) != shape:
                    raise PackError(
                        f"{where}: {key} must have shape {shape}, got {tuple(entry.get_shape())}."
                    )
            tensors = {key: file.get_tensor(key) for key in shapes}
    except FileNotFoundError as error:
        raise PackError(f"Pack {name!r} has no {path.name}.") from error
    except (SafetensorError, OSError) as error:
        raise PackError(f"{where} is not a complete safetensors file.") from error
    check_values(tensors, f"{where}: ")
    return tensors


def check_values(tensors: Mapping[str, Tensor], where: str = "") -> None:
    """`PackError` for values that are not finite, and for variances below 0."""
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise PackError(f"{where}{key} has values that are not finite.")
        if key.endswith(".var") and (tensor < 0).any():
            raise PackError(f"{where}{key} has negative values.")
