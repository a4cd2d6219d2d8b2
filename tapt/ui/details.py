"""How a defence decided, from its trace; nothing here knows a defence by its name."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import torch
from torch import Tensor

from tapt.comparison import Answer, Comparison
from tapt.core.images import to_float, to_picture
from tapt.core.views import image_seeds
from tapt.defenses import ImageBatch
from tapt.ui.links import png_url

SHOWN, FEW = 16, 12  # views; values of a list
Trace = Mapping[str, Any]


def how(result: Comparison, name: str) -> str:
    """Everything that there is of a defence's answers: settings, views, losses, values."""
    settings = result.settings["test_time"][name]
    parts = [f"<p>Settings: {_listed(settings)}.</p>"] if settings else []
    for kind, word in (("clean", "original"), ("attacked", "attacked")):
        answer, pixels = getattr(result[name], kind), getattr(result, kind)
        if answer is not None and answer.trace:
            body = _one(result, pixels, answer, settings)
            parts.append(f"<section><h3>On the {word} picture</h3>{body}</section>")
    return "".join(parts) or "<p>One pass, nothing tuned or chosen.</p>"


def _one(result: Comparison, pixels: Tensor, answer: Answer, settings: Trace) -> str:
    trace, depth = dict(answer.trace), result.settings["prompts"]["visual_depth"]
    views = _views(trace, pixels, result.settings["seed"], settings)
    before, after = (trace.get(key) for key in ("before", "after"))
    losses = ""
    if isinstance(before, Mapping):
        losses = _losses(before, trace.pop("after") or {}, settings, depth)
        del trace["before"]
    elif after is None:
        trace.pop("after", None)
    pictures = "".join(_picture(name, trace.pop(name)) for name in _pictures(trace))
    rows = {_said(name): _value(value) + _limit(name, settings) for name, value in trace.items()}
    return views + losses + pictures + table(("What", "Value"), list(rows.items()))


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
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
    return f'<table class="t-plain"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'


def _views(trace: dict[str, Any], pixels: Tensor, seed: int, settings: Trace) -> str:
    """Takes what there is of every view, or of every kept one, out of the trace."""
    count, kept = len(trace.get("entropies") or ()), list(trace.pop("kept", None) or ())
    if not count:
        return ""
    columns: dict[str, dict[int, float]] = {}
    for name, values in list(trace.items()):
        if not isinstance(values, list) or (name != "entropies" and "loss" in name):
            continue
        index = {count: range(count), len(kept): kept}.get(len(values))
        if index is not None:
            columns[_said(name)] = dict(zip(index, trace.pop(name), strict=True))
    crops = None  # a defence that changes its views otherwise has others
    if settings.get("views") == count and not settings.get("augmix"):
        crops = ImageBatch(to_float(pixels)[None], image_seeds(seed, [0])).views(count)[0]
    order = [*kept, *(index for index in range(count) if index not in kept)][:SHOWN]
    items = "".join(
        f"<li{' class=t-kept' if index in kept else ''}>"
        + ("" if crops is None else f'<img src="{_thumbnail(crops[index])}" alt="">')
        + f"<strong>{'the picture' if index == 0 else f'view {index}'}"
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


def _thumbnail(view: Tensor) -> str:
    picture = to_picture((view * 255).round().to(torch.uint8))
    picture.thumbnail((48, 48))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _losses(before: Trace, after: Trace, settings: Trace, depth: int) -> str:
    rows = [
        (_said(name), _value(value), _value(after.get(name)))
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
    return table(("Loss", "before the step", "after"), rows) + note


def _pictures(trace: Trace) -> list[str]:
    """Names of what has the shape of a picture."""
    return [
        name
        for name, value in trace.items()
        if isinstance(value, list) and len(value) == 3 and isinstance(value[0], list)
    ]


def _picture(name: str, values: list) -> str:
    change = torch.tensor(values)
    scale = 0.5 / max(1e-6, float(change.abs().max()))
    picture = to_picture(((change * scale + 0.5) * 255).clamp(0, 255).byte())
    text = f"{_said(name)}, × {scale:.0f} around mid-grey"
    return (
        f'<figure class="t-figure"><img class="t-pixels" src="{png_url(picture)}" alt="{text}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def _limit(name: str, settings: Trace) -> str:
    """The threshold that a value is held against."""
    keys = [f"{name}_threshold", *(["threshold"] if name == "score" else [])]
    return "".join(f" (threshold {settings[key]:g})" for key in keys if key in settings)


def _listed(settings: Trace) -> str:
    return escape(", ".join(f"{_said(key)} {_value(value)}" for key, value in settings.items()))


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
