"""How a defence decided, from its trace; nothing here knows a defence by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import torch
from torch import Tensor

from tapt.comparison import Answer, Comparison
from tapt.core.images import to_float, to_picture
from tapt.core.views import image_seeds
from tapt.defenses import ImageBatch, find_defense
from tapt.ui.pictures import change_figure, image

SHOWN, FEW = 16, 12  # views; values of a list
Trace = Mapping[str, Any]


def how(result: Comparison, name: str, batches: Mapping[str, ImageBatch]) -> str:
    """Everything that there is of a defence's answers: settings, views, losses, values.

    batches: of `shown_batches`, for all defences of a result.
    """
    settings = result.settings["test_time"][name]
    parts = [f"<p>Settings: {escape(_value(settings))}.</p>"] if settings else []
    for kind, word in (("clean", "original"), ("attacked", "attacked")):
        answer = getattr(result[name], kind)
        if answer is not None and answer.trace:
            body = _one(result, name, batches[kind], answer)
            parts.append(f"<section><h3>On the {word} picture</h3>{body}</section>")
    return "".join(parts) or "<p>One pass, nothing tuned or chosen.</p>"


def shown_batches(result: Comparison) -> dict[str, ImageBatch]:
    """The original and the attacked picture, as the defences got them."""
    kinds = {"clean": result.clean, "attacked": result.attacked}
    seeds = image_seeds(result.settings["seed"], [0])
    return {k: ImageBatch(to_float(x)[None], seeds) for k, x in kinds.items() if x is not None}


def _one(result: Comparison, name: str, batch: ImageBatch, answer: Answer) -> str:
    settings, trace = result.settings["test_time"][name], dict(answer.trace)
    parts = []
    if trace.get("entropies"):
        row = find_defense(name)  # views as the defence saw them, where it says which
        views = row.views and row.views(batch, row.settings(**settings))[0]
        parts.append(_views(trace, views))
    if isinstance(before := trace.get("before"), Mapping):
        depth = result.settings["prompts"]["visual_depth"]
        after = trace.pop("after", None) if settings.get("steps") else None
        parts.append(_losses(before, after, settings, depth))
        trace = {key: value for key, value in trace.items() if key not in ("before", "after")}
    for key, value in [*trace.items()]:
        if isinstance(value, list) and len(value) == 3 and isinstance(value[0], list):
            parts.append(change_figure(255 * torch.tensor(trace.pop(key)), _said(key)))
    rows = [(_said(k), _value(v) + _limit(k, settings)) for k, v in trace.items() if v is not None]
    return "".join([*parts, table(("What", "Value"), rows)])


def table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", kind: str = "t-plain"
) -> str:
    """A small table of plain values, empty without rows."""
    if not rows:
        return ""
    top = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<table class="{kind}">{title}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'
    )


def _views(trace: dict[str, Any], views: Tensor | None) -> str:
    """Takes what there is of every view, or of every kept one, out of the trace."""
    count, kept = len(trace["entropies"]), list(trace.pop("kept", None) or ())
    columns: dict[str, dict[int, float]] = {}
    for name, values in [*trace.items()]:
        if isinstance(values, list) and (name == "entropies" or "loss" not in name):
            index = {count: range(count), len(kept): kept}.get(len(values))
            if index is not None:
                columns[_said(name)] = dict(zip(index, trace.pop(name), strict=True))
    order = [*kept, *(index for index in range(count) if index not in kept)][:SHOWN]
    items = "".join(
        f"<li{' class=t-kept' if index in kept else ''}>{_thumbnail(views, index)}"
        + f"<strong>{f'view {index}' if index else 'the picture'}"
        + f"{', kept' if index in kept else ''}</strong>"
        + "".join(f"<br>{name} {v[index]:.3g}" for name, v in columns.items() if index in v)
        + "</li>"
        for index in order
    )
    chosen = f", {len(kept)} kept" if kept else ""
    cut = f", {len(order)} shown" if len(order) < count else ""
    return (
        f"<p>{count} views{chosen}{cut}. Entropies in nats: 0 is certain.</p>"
        f'<ul class="t-views">{items}</ul>'
    )


def _thumbnail(views: Tensor | None, index: int) -> str:
    if views is None:
        return ""
    picture = to_picture((views[index] * 255).round().to(torch.uint8))
    picture.thumbnail((48, 48))
    return image(picture, "", "WEBP")


def _losses(before: Trace, after: Trace | None, settings: Trace, depth: int) -> str:
    heads = ("Loss", "before the step", "after") if after else ("Loss, no step was taken", "value")
    rows = [
        (_said(name), _value(value), *([_value(after.get(name))] if after else []))
        for name, value in before.items()
        if value is not None
    ]
    formula = "the entropy alone: these prompts have no statistics"
    if before.get("adversarial") is not None:
        weight, alpha = settings["alignment_weight"], settings["alpha"]
        formula = (
            f"entropy + {weight:g} / {depth} × ({alpha:g} × adversarial + {1 - alpha:g} × clean)"
        )
    note = f"<p>total = {formula}; {depth} is the number of blocks with prompts.</p>"
    return table(heads, rows) + note


def _limit(name: str, settings: Trace) -> str:
    """The threshold that a value is held against."""
    keys = [f"{name}_threshold", *(["threshold"] if name == "score" else [])]
    return "".join(f" (threshold {settings[key]:g})" for key in keys if key in settings)


def _said(name: str) -> str:
    return name.replace("_", " ")


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, (int, float)):
        return f"{value:.5g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{_said(key)} {_value(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        flat = [item for item in value if isinstance(item, (int, float))]
        if len(flat) == len(value) <= FEW:
            return ", ".join(_value(item) for item in value)
        ends = f", {_value(min(flat))} to {_value(max(flat))}" if flat else ""
        return f"{len(value)} values{ends}"
    return str(value)
