"""What a defence did to one picture: the views that it kept, its losses and its distances."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tapt.comparison import Answer, Comparison
from tapt.core.images import to_float, to_picture
from tapt.core.views import image_seeds
from tapt.defenses import ImageBatch
from tapt.ui.chart import line_chart, plain_table

MAX_SHOWN = 64
THUMBNAIL = 64
TERMS = {
    "entropy": "Entropy of the mean answer of the kept views",
    "adversarial": "Distance to the adversarial statistics",
    "clean": "Distance to the clean statistics",
    "total": "Loss, weighted sum of these",
}
KINDS = {"clean": "original", "attacked": "attacked"}


def what_happened(result: Comparison) -> str:
    """All there is to show, so far, of the defences that tune something."""
    parts = [
        f"<section><h2>{result.title(name)} on the {word} image</h2>"
        f"{_one(result, getattr(result, kind), answer)}</section>"
        for name, answers in result.answers.items()
        for kind, word in KINDS.items()
        if (answer := getattr(answers, kind)) is not None and "before" in answer.trace
    ]
    return f'<div class="t-did">{"".join(parts) or "<p>No answer yet.</p>"}</div>'


def _one(result: Comparison, pixels: Tensor, answer: Answer) -> str:
    trace = answer.trace
    before, after = trace["before"], trace["after"] or trace["before"]
    terms = [
        (title, f"{before[name]:.4f}", f"{after[name]:.4f}")
        for name, title in TERMS.items()
        if before[name] is not None
    ]
    return (
        _views(pixels, result.settings["seed"], trace)
        + plain_table(("Loss", "before", "after"), terms)
        + _distances(before, after)
        + f"<p>{answer.seconds:.3f} s in all.</p>"
    )


def _views(pixels: Tensor, seed: int, trace: Mapping[str, Any]) -> str:
    count, kept = len(trace["entropies"]), trace["kept"]
    batch = ImageBatch(to_float(pixels)[None], image_seeds(seed, [0]))  # the same crops again
    views = batch.views(count)[0]
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


def _distances(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
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
