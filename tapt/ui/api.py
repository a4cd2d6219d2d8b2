"""Endpoints for programs, and two tools for agents by the Model Context Protocol.

For programs `/analyze`, `/sweep` and `/compare` return every number. An agent pays for every word:
its tools return one JSON text of 8 KB at most, with the top answers, and the attacked picture.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, get_args

import gradio as gr
from gradio.data_classes import FileData
from gradio.processing_utils import save_pil_to_cache
from torch import Tensor

from tapt.comparison import Answer, Comparison
from tapt.core.images import to_picture
from tapt.core.settings import rule
from tapt.evaluation.sweep import Sweep
from tapt.ui.background import QUEUE, Runs
from tapt.ui.inputs import FIELDS, SWEEP_FIELDS, Fields, in_words

MAX_BYTES = 8000  # of an agent's text
DETAIL = ((5, 60), (3, 30), (1, 12))  # classes per answer, characters per name
PICTURE = "    image: The picture, of any size: an uploaded file, or a data: URL."
ANALYZE = "What CLIP and its defences see in a picture, before and after an adversarial attack."
SWEEP = "How sure CLIP and its defences stay of a picture's true class while an attack grows."
SHORT = (
    "A JSON text: each defence's top classes and the true one, and what the attack did to it "
    "(held, fooled, wrong before, recovered; without a true class kept or changed), times, "
    "settings, versions. And the attacked picture, PNG."
)
SHORT_SWEEP = (
    "A JSON text: each defence's probabilities of the true class and its answers, in the order of "
    "epsilons (1/255), settings, versions."
)
FULL = "The JSON object of `tapt {} --json`."
COMPARED = f"A sentence, a table, both pictures, PNG. {FULL.format('predict')}"


def add_api(runs: Runs) -> None:
    """Adds the endpoints to the page that is being built."""

    def png(pixels: Tensor | None) -> dict[str, Any] | None:
        if pixels is None:
            return None
        path = save_pil_to_cache(to_picture(pixels), runs.uploads, format="png")
        return FileData(path=path).model_dump()

    def short(result: Comparison) -> tuple[Any, ...]:
        return short_comparison(result), png(result.attacked)

    def compared(result: Comparison) -> tuple[Any, ...]:
        pictures = png(result.clean), png(result.attacked)
        return result.verdict(), str(result), *pictures, result.to_dict()

    # the tools first: an agent sees the functions' names, each one once
    _tool(_function("analyze", runs, False, short, tuple[str, FileData], SHORT))
    _tool(_function("sweep", runs, True, short_sweep, str, SHORT_SWEEP))
    for name, sweeps, values, types, about in (
        ("analyze", False, Comparison.to_dict, dict, FULL.format("predict")),
        ("sweep", True, Sweep.to_dict, dict, FULL.format("sweep")),
        ("compare", False, compared, tuple[str, str, FileData, FileData, dict], COMPARED),
    ):
        call = _function(name, runs, sweeps, values, types, about)
        call._mcp_type = "none"
        gr.api(call, api_name=name, api_description=call.__doc__, **QUEUE)


def _tool(steps: Callable[..., Iterator[Any]]) -> None:
    """Out of gradio's queue, from which an agent gets several values as one Python list; `Runs`
    has its own."""

    @wraps(steps)
    def tool(*values: object) -> Any:
        *_, found = steps(*values)
        return found

    gr.api(tool, api_name=f"{tool.__name__}_short", queue=False)


def _function(
    name: str, runs: Runs, sweeps: bool, values: Callable[[Any], Any], returned: Any, about: str
) -> Any:
    """A generator function as gradio reads it: parameters with types and defaults, a docstring.

    values: what it returns for a result, of the types `returned`.
    """
    names = SWEEP_FIELDS if sweeps else FIELDS
    run: Callable[..., Iterator[Any]] = runs.sweep if sweeps else runs.compare

    def call(*given: object) -> Iterator[Any]:
        with in_words():
            request = runs.request(dict(zip(names, given, strict=True)))
            nothing = (None,) * max(1, len(get_args(returned)))
            for _, now in run(request):
                result = now
                yield nothing if len(nothing) > 1 else None
            yield values(result)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters, lines = [inspect.Parameter("image", kind)], [PICTURE]
    types: dict[str, Any] = {"image": FileData}
    for field_name in names[1:]:
        field = Fields.model_fields[field_name]
        parameters.append(inspect.Parameter(field_name, kind, default=field.default))
        types[field_name] = field.annotation
        limits = "" if rule(field) == "text" else f" Must be {rule(field)}."
        lines.append(f"    {field_name}: {field.description}{limits}")
    function: Any = call
    function.__signature__ = inspect.Signature(parameters, return_annotation=returned)
    function.__annotations__, function.__name__ = types, name
    doc = [SWEEP if sweeps else ANALYZE, "Args:", *lines, "Returns:", f"    {about}"]
    function.__doc__ = "\n".join(doc)
    return function


def short_comparison(result: Comparison) -> str:
    """A comparison as JSON for an agent."""
    full, true = result.to_dict(), result.label if result.label_given else None

    def answer(value: Answer, count: int, length: int) -> dict[str, Any]:
        order = value.probabilities.argsort(descending=True).tolist()
        shown = dict.fromkeys([*order[:count], *([] if true is None else [true])])
        top = [[_cut(result.classes[i], length), _round(value.probabilities[i])] for i in shown]
        return {"top": top, "seconds": round(value.seconds, 2)}

    def make(count: int, length: int) -> dict[str, Any]:
        kept = ("linf_255", "l2", "settings", "versions")
        return {
            "true_class": None if true is None else _cut(result.classes[true], length),
            "defenses": {
                name: {
                    "state": result.state(name),
                    **{kind: answer(a, count, length) for kind, a in vars(row).items() if a},
                }
                for name, row in result.answers.items()
            },
            "seconds": {name: round(value, 2) for name, value in result.seconds.items()},
            **{name: full[name] for name in kept},
        }

    return _text(make)


def short_sweep(result: Sweep) -> str:
    """A sweep as JSON for an agent."""

    def make(count: int, length: int) -> dict[str, Any]:
        probabilities, answers = result.probabilities.items(), result.answers.items()
        return {
            **result.to_dict(),
            "label": _cut(result.label, length),
            "probabilities": {name: [_round(p) for p in row] for name, row in probabilities},
            "answers": {name: [_cut(answer, length) for answer in row] for name, row in answers},
        }

    return _text(make)


def _text(make: Callable[[int, int], dict[str, Any]]) -> str:
    """The most detailed text that is short enough."""
    for detail in DETAIL:
        text = json.dumps(make(*detail), ensure_ascii=False, separators=(",", ":"))
        if len(text.encode()) <= MAX_BYTES:
            break
    return text


def _cut(name: str, length: int) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def _round(probability: Tensor | float) -> float:
    return float(f"{float(probability):.3g}")
