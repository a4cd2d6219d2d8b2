"""Settings: the type, range, default and help of each one stand once, in its class.

Command options, the page's fields, checks of requests and the schema of packs come from there.
"""

from __future__ import annotations

import types
import typing
from typing import Any, Literal

from annotated_types import Gt, Lt
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from typing_extensions import Self

from tapt.core.errors import InputError

STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


class Settings(BaseModel):
    """Frozen, checked values, by name or in their order; any other raises `InputError`."""

    model_config = STRICT

    def __init__(self, *args: Any, **values: Any) -> None:
        named = dict(zip(type(self).model_fields, args, strict=False))
        if len(args) > len(named) or named.keys() & values.keys():
            raise TypeError(f"{type(self).__name__} was given a value twice, or too many values")
        try:
            super().__init__(**named, **values)
        except ValidationError as error:
            raise InputError(f"{sentence(error, type(self))}.") from error

    def updated(self, **changes: object) -> Self:
        """A checked copy in which every change that is not None replaces a value."""
        changed = {name: value for name, value in changes.items() if value is not None}
        return type(self)(**{**self.model_dump(), **changed})


def sentence(error: ValidationError, model: type[BaseModel]) -> str:
    """The first fault of `error` in words, without the full stop: what, the rule, the value."""
    first = error.errors(include_url=False)[0]
    name, index, field = "", "", None
    owner: type[BaseModel] | None = model
    inner: type[BaseModel] | None = model
    for part in first["loc"]:
        if isinstance(part, int):
            index += f"[{part}]"
        elif not part.startswith("function-"):
            owner, field = inner, inner.model_fields.get(part) if inner else None
            inner, name, index = _model_in(field), f"{name}{index}.{part}".lstrip("."), ""
    name += "" if field and _own_rule(field) else index  # such a rule is of the whole value
    if first["type"] == "value_error":
        return str(first["ctx"]["error"]).rstrip(".")
    if first["type"] == "missing" and isinstance(first["loc"][-1], str):
        return f"{name} is missing"
    if first["type"] == "extra_forbidden":
        known = ", ".join(owner.model_fields) if owner else "others"
        return f"{name} is unknown; there are {known}"
    allowed = rule(field) if field else first["msg"].removeprefix("Input should be ")
    return f"{name} must be {allowed}, got {shown(first['input'])}"


def rule(field: FieldInfo) -> str:
    """What a field allows, as it stands behind "must be"."""
    if own := _own_rule(field):
        return own
    kind = plain_type(field)
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(kind)))}"
    what, ends = KINDS.get(kind, "a valid value"), {type(bound) for bound in field.metadata}
    low, high = limits(field)
    if Gt in ends and high is not None:
        return f"{what} above {low:.12g} and at most {high:.12g}"
    if Lt in ends and low is not None:
        return f"{what} from {low:.12g} to below {high:.12g}"
    if low is not None and high is not None:
        return f"{what} from {low:.12g} to {high:.12g}"
    return f"{what} of at least {low:.12g}" if low is not None else what


def limits(field: FieldInfo) -> tuple[float | None, float | None]:
    """Lowest and highest value of a number; None where there is no such end."""
    low, high = (
        [getattr(m, name) for name in names for m in field.metadata if hasattr(m, name)]
        for names in (("ge", "gt"), ("le", "lt"))
    )
    return (low or [None])[0], (high or [None])[0]


def plain_type(field: FieldInfo) -> Any:
    """The type of a field, without "or None"."""
    kinds = [kind for kind in _members(field.annotation) if kind is not type(None)]
    return kinds[0] if len(kinds) == 1 else field.annotation


def shown(value: object) -> str:
    """A value in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _own_rule(field: FieldInfo) -> str:
    extra = field.json_schema_extra
    return str(extra.get("rule", "")) if isinstance(extra, dict) else ""


def _members(annotation: Any) -> tuple[Any, ...]:
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


def _model_in(field: FieldInfo | None) -> type[BaseModel] | None:
    """The class of a field's values, or of what they hold."""
    kinds = [*_members(field.annotation)] if field else []
    kinds += [held for kind in kinds for held in typing.get_args(kind)]
    models = (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
    return next(models, None)
