"""Files of a pack, read with distrust: what they must hold, and how version 1 becomes version 2."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, create_model
from pydantic_core import from_json
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tapt.core.backbone import ARCHITECTURE
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
Mean = Annotated[
    list[Annotated[float, Field(ge=-10, le=10)]],
    _rule("three numbers from -10 to 10", min_length=3, max_length=3),
]
Std = Annotated[
    list[Annotated[float, Field(gt=0, le=10)]],
    _rule("three numbers above 0 and at most 10", min_length=3, max_length=3),
]
_sizes: dict[str, Any] = {name: (Size, ...) for name in ARCHITECTURE}
Architecture: Any = create_model("Architecture", __config__=STRICT, **_sizes)


class BaseModelEntry(BaseModel):
    """The backbone that a pack was made for."""

    model_config = STRICT

    source: str
    revision: str | None = None
    sha256: str | None = None
    architecture: Architecture
    mean: Mean
    std: Std


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

    format: Literal["tapt-pack"]
    version: Literal[2]
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
        config = from_json(path.read_bytes(), allow_inf_nan=False)
    except FileNotFoundError as error:
        raise PackError(f"Pack {name!r} has no {path.name}.") from error
    except (OSError, ValueError) as error:
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
    except (AttributeError, KeyError, TypeError) as error:
        raise PackError(f"{where} is not a config of version {version}.") from error


def _converted(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config of version 1 as one of version 2."""
    settings = config["test_time"]
    views = {name: settings[name] for name in ("views", "keep") if name in settings}
    rows = [_converted_row(**row) for row in config["evaluation"]]
    test_time = {"tapt": settings, "ensemble": views}
    return {**config, "version": 2, "test_time": test_time, "evaluation": rows}


def _converted_row(threat: str, defense: str, budget: str, **row: Any) -> dict[str, Any]:
    for old in ("adaptive", "square"):  # in the worst of several attacks
        budget = budget.replace(f" on {old} (", " on deployed (")
    attacked = "deployed" if threat in ("square", "adaptive") else threat
    row |= {"attacked_model": attacked, "defense": defense, "budget": budget}
    if defense == "random-start":
        row |= {"defense": "tapt", "settings": {"random_start": True}}
    return row


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
                if (kind := entry.get_dtype()) != "F32":
                    raise PackError(f"{where}: {key} must be F32, got {kind}.")
                if (own := tuple(entry.get_shape())) != shape:
                    raise PackError(f"{where}: {key} must have shape {shape}, got {own}.")
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
