"""What TAPT did to one picture: the views it kept, its losses, its distances and its time."""

from __future__ import annotations

import base64
import io

import torch
from torch import Tensor

from tapt.compare import Comparison, trace_dict
from tapt.images import to_float, to_picture
from tapt.ui.chart import line_chart, plain_table
from tapt.views import make_views

MAX_SHOWN = 64
THUMBNAIL = 64
TERMS = {
    "entropy": "Entropy of the mean answer of the kept views",
    "adversarial": "Distance to the adversarial statistics",
    "clean": "Distance to the clean statistics",
    "total": "Loss, weighted sum of these",
}
PHASES = {
    "text": "class names",
    "select": "all views, without gradients",
    "gradient": "kept views, with gradients, and the step",
    "predict": "the answer",
    "after": "losses after the step (for this table only)",
}
KINDS = {"clean": "On the original image", "attacked": "On the attacked image"}


def what_tapt_did(result: Comparison) -> str:
    """All there is to show of the steps so far."""
    parts = [
        f"<section><h2>{title}</h2>{_one(result, kind)}</section>"
        for kind, title in KINDS.items()
        if result.traces.get(kind) is not None
    ]
    return f'<div class="t-did">{"".join(parts) or "<p>TAPT has not answered yet.</p>"}</div>'


def _one(result: Comparison, kind: str) -> str:
    trace = trace_dict(result.traces[kind])
    before, after = trace["before"], trace["after"] or trace["before"]
    terms = [
        (title, f"{before[name]:.4f}", f"{after[name]:.4f}")
        for name, title in TERMS.items()
        if before[name] is not None
    ]
    seconds = [(PHASES[name], f"{value:.3f} s") for name, value in trace["seconds"].items()]
    return (
        _views(result.clean if kind == "clean" else result.attacked, result, trace)
        + plain_table(("Loss", "before", "after"), terms)
        + _distances(before, after)
        + plain_table(("Time", "seconds"), seconds)
    )


def _views(pixels: Tensor, result: Comparison, trace: dict) -> str:
    count, kept = len(trace["entropies"]), trace["kept"]
    generator = torch.Generator().manual_seed(result.settings["seed"])  # the same crops again
    views = make_views(to_float(pixels), count, generator=generator)
    others = [index for index in range(count) if index not in set(kept)]
    shown = [*kept, *others][:MAX_SHOWN]
    items = "".join(
        f'<li{" class=t-kept" if index in set(kept) else ""}><img src="{_thumbnail(views[index])}" '
        f'alt="">{"<strong>kept</strong> " if index in set(kept) else ""}'
        f"{trace['entropies'][index]:.2f}</li>"
        for index in shown
    )
    cut = f", of which {len(shown)} are shown" if len(shown) < count else ""
    return (
        f"<p>{count} views{cut}, the {len(kept)} most confident ones kept. Below each: its entropy "
        f'in nats under the static prompts.</p><ul class="t-views">{items}</ul>'
    )


def _thumbnail(view: Tensor) -> str:
    picture = to_picture((view * 255).round().to(torch.uint8))
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _distances(before: dict, after: dict) -> str:
    if before["per_block_adversarial"] is None:
        return "<p>These prompts have no token statistics: the entropy alone was lowered.</p>"
    series = {
        f"{name}, {when}": list(enumerate(values[f"per_block_{name}"]))
        for name in ("adversarial", "clean")
        for when, values in (("before", before), ("after", after))
    }
    blocks = range(len(before["per_block_clean"]))
    return line_chart(
        series,
        title="Distance to the adversarial and the clean statistics, per block",
        x_label="image block",
        x_range=(0, max(1, len(blocks) - 1)),
        x_ticks=blocks,
        y_max=max(y for points in series.values() for _, y in points),
    )
