"""config.json of a pack: what it must hold, and how version 1 becomes version 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from tapt.core.errors import PackError
from tapt.core.prompts import PromptConfig
from tapt.core.settings import STRICT, sentence

FORMAT, VERSION = "tapt-pack", 2
OBJECT: Any = Field(json_schema_extra={"rule": "an object"})
SETTINGS: Any = {"rule": "an object for each defence"}
ROWS: Any = {"rule": "an object for each row"}
INTERVAL: Any = {"rule": "two numbers from 0 to 1"}
COLOURS: Any = {"rule": "three numbers from -10 to 10"}

Size = Annotated[int, Field(ge=1, le=99_999)]
Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0, le=1e9)]
Interval = Annotated[list[Share], Field(min_length=2, max_length=2, json_schema_extra=INTERVAL)]
Colour = Annotated[
    list[Annotated[float, Field(ge=-10, le=10)]],
    Field(min_length=3, max_length=3, json_schema_extra=COLOURS),
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
    base_model: BaseModelEntry = OBJECT
    prompts: PromptConfig = OBJECT
    test_time: dict[str, dict[str, JsonValue]] = Field(json_schema_extra=SETTINGS)
    training: dict[str, JsonValue] = OBJECT
    evaluation: list[Row] = Field(json_schema_extra=ROWS)


def _is(value: object) -> bool:
    return isinstance(value, dict)


def parse_config(config: object, where: str) -> PackConfig:
    """Checks the content of a config.json.

    where: the file in messages.

    Raises:
        PackError: what is wrong with it, in one sentence.
    """
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
        changed["evaluation"] = [_converted_row(row) if _is(row) else row for row in rows]
    return changed


def _converted_row(row: Mapping[str, Any]) -> dict[str, Any]:
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
