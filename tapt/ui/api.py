"""Endpoints for programs, and two tools for agents by the Model Context Protocol.

For programs `/analyze`, `/sweep` and `/compare` return every number. An agent pays for every word:
its tools return one JSON text of 8 KB at most, with the top answers, and the attacked picture.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

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
ABOUT = (
    "What is in a picture, by CLIP and by its test-time defences, before and after an adversarial "
    "attack on one of them.",
    "How sure each test-time defence of CLIP stays of a picture's true class while an adversarial "
    "attack grows.",
)
PICTURE = "    image: The picture, of any size: an uploaded file, or a data: URL."


class Endpoint(NamedTuple):
    """values: of a result; with their types, and what they are."""

    name: str
    sweeps: bool
    values: Callable[[Any], tuple[Any, ...]]
    types: tuple[Any, ...]
    returns: str
    tool: bool = False


def add_api(runs: Runs) -> None:
    """Adds the endpoints to the page that is being built."""

    def png(pixels: Tensor | None) -> dict[str, Any] | None:
        if pixels is None:
            return None
        path = save_pil_to_cache(to_picture(pixels), runs.uploads, format="png")
        return FileData(path=path).model_dump()

    numbers = "The JSON object of `tapt {} --json`."
    for endpoint in (  # the tools first: an agent sees the names of functions, each one once
        Endpoint(
            "analyze_short",
            False,
            lambda result: (short_comparison(result), png(result.attacked)),
            (str, FileData),
            "A JSON text: the top classes of each defence and the true one, what the attack did "
            "(held, fooled, wrong before, recovered; without a true class kept, changed), times, "
            "settings, versions; and the attacked picture as a PNG file.",
            tool=True,
        ),
        Endpoint(
            "sweep_short",
            True,
            lambda result: (short_sweep(result),),
            (str,),
            "A JSON text: for each defence the probabilities of the true class and the answers, in "
            "the order of epsilons (in 1/255); settings, versions.",
            tool=True,
        ),
        Endpoint("analyze", False, lambda r: (r.to_dict(),), (dict,), numbers.format("predict")),
        Endpoint("sweep", True, lambda r: (r.to_dict(),), (dict,), numbers.format("sweep")),
        Endpoint(
            "compare",
            False,
            lambda r: (r.verdict(), str(r), png(r.clean), png(r.attacked), r.to_dict()),
            (str, str, FileData, FileData, dict),
            "The sentence that counts, a table, the original and the attacked picture as PNG "
            "files, and the JSON object of `tapt predict --json`.",
        ),
    ):
        call = _function(endpoint, runs)
        if endpoint.tool:
            # out of gradio's queue, from which an agent gets several values as one Python list;
            # `Runs` has its own
            gr.api(call, api_name=endpoint.name, queue=False)
        else:
            gr.api(call, api_name=endpoint.name, api_description=call.__doc__, **QUEUE)


def _function(endpoint: Endpoint, runs: Runs) -> Callable[..., Any]:
    """A function as gradio reads it: parameters with types and defaults, and a docstring."""
    names = SWEEP_FIELDS if endpoint.sweeps else FIELDS
    run: Callable[..., Iterator[Any]] = runs.sweep if endpoint.sweeps else runs.compare

    def steps(*values: object) -> Iterator[Any]:
        with in_words():
            request = runs.request(dict(zip(names, values, strict=True)))
            nothing = (None,) * len(endpoint.types)
            for _, now in run(request):
                result = now
                yield nothing if len(nothing) > 1 else None
            found = endpoint.values(result)
            yield found if len(found) > 1 else found[0]

    def last(*values: object) -> Any:
        *_, found = steps(*values)
        return found

    call: Any = last if endpoint.tool else steps
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters, types, lines = [inspect.Parameter("image", kind)], {"image": FileData}, [PICTURE]
    for name in names[1:]:
        field = Fields.model_fields[name]
        parameters.append(inspect.Parameter(name, kind, default=field.default))
        types[name] = field.annotation
        limits = "" if rule(field) == "text" else f" Must be {rule(field)}."
        lines.append(f"    {name}: {field.description}{limits}")
    returned = endpoint.types[0] if len(endpoint.types) == 1 else tuple[endpoint.types]
    call.__signature__ = inspect.Signature(parameters, return_annotation=returned)
    call.__annotations__ = types
    call.__name__ = endpoint.name.removesuffix("_short")
    call._mcp_type = "tool" if endpoint.tool else "none"
    call.__doc__ = "\n".join(
        [ABOUT[endpoint.sweeps], "Args:", *lines, "Returns:", f"    {endpoint.returns}"]
    )
    return call


def short_comparison(result: Comparison) -> str:
    """A comparison as JSON for an agent."""
    full = result.to_dict()
    true = result.label if result.label_given else None

    def answer(value: Answer, count: int, length: int) -> dict[str, Any]:
        order = value.probabilities.argsort(descending=True).tolist()
        shown = dict.fromkeys([*order[:count], *([] if true is None else [true])])
        top = [[_cut(result.classes[i], length), _round(value.probabilities[i])] for i in shown]
        return {"top": top, "seconds": round(value.seconds, 2)}

    def make(count: int, length: int) -> dict[str, Any]:
        defenses = {
            name: {
                "state": full["states"][name],
                **{kind: answer(a, count, length) for kind, a in vars(answers).items() if a},
            }
            for name, answers in result.answers.items()
        }
        true_class = full["label"] if result.label_given else None
        return {
            "true_class": true_class and _cut(true_class, length),
            "classes": len(result.classes),
            "defenses": defenses,
            **{key: full[key] for key in ("linf_255", "l2", "settings", "versions")},
            "seconds": result.seconds,
        }

    return _text(make)


def short_sweep(result: Sweep) -> str:
    """A sweep as JSON for an agent."""

    def make(count: int, length: int) -> dict[str, Any]:
        return {
            **result.to_dict(),
            "label": _cut(result.label, length),
            "probabilities": {
                name: [_round(p) for p in values] for name, values in result.probabilities.items()
            },
            "answers": {
                name: [_cut(answer, length) for answer in answers]
                for name, answers in result.answers.items()
            },
        }

    return _text(make)


def _text(make: Callable[[int, int], Mapping[str, Any]]) -> str:
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
