"""Line charts as SVG that follows the page's colours, each with its numbers as a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 340, 230
LEFT, RIGHT, TOP, BOTTOM = 50, 328, 12, 184

Series = Mapping[str, Sequence[tuple[float, float]]]


def line_chart(
    series: Series,
    *,
    title: str,
    x_label: str,
    x_range: tuple[float, float],
    y_max: float,
    x_ticks: Sequence[float],
    show: Callable[[float], str] = "{:.3g}".format,
) -> str:
    """Lines over x, told apart by colour and by dashes.

    series: points by name, in drawing order; at most six lines.
    y_max: the axis ends at the next round number.
    show: how a y value is written.
    """
    low, high = x_range
    span, y_max = (high - low) or 1, _round_up(y_max)

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - low) / span * (RIGHT - LEFT)
        return round(across, 1), round(BOTTOM - min(y / y_max, 1) * (BOTTOM - TOP), 1)

    parts = []
    for part in range(5):
        _, y = at(low, y_max * part / 4)
        parts.append(f'<line class="t-grid" x1="{LEFT}" x2="{RIGHT}" y1="{y}" y2="{y}"/>')
        label = show(y_max * part / 4)
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{label}</text>')
    for tick in x_ticks:
        x, below = at(tick, 0)[0], BOTTOM + 17
        parts.append(f'<text x="{x}" y="{below}" text-anchor="middle">{tick:g}</text>')
    middle = (LEFT + RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{x_label}</text>')
    for index, (name, points) in enumerate(series.items()):
        spots = [at(x, y) for x, y in points]
        path = " ".join(f"{x},{y}" for x, y in spots)
        dots = "".join(
            f'<circle cx="{x}" cy="{y}" r="3"><title>{escape(name)}, {point[0]:g}: '
            f"{show(point[1])}</title></circle>"
            for (x, y), point in zip(spots, points, strict=True)
        )
        parts.append(f'<g class="t-line t-line-{index}"><polyline points="{path}"/>{dots}</g>')
    keys = "".join(
        f'<li><svg viewBox="0 0 28 8" aria-hidden="true"><g class="t-line t-line-{index}">'
        f'<polyline points="0,4 28,4"/></g></svg>{escape(name)}</li>'
        for index, name in enumerate(series)
    )
    return (
        f'<figure class="t-chart"><figcaption>{title}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}; the numbers are in '
        f'the table below">{"".join(parts)}</svg><ul class="t-keys">{keys}</ul>'
        f"<details><summary>As numbers</summary>{_numbers(series, x_label, show)}</details>"
        "</figure>"
    )


def _round_up(value: float) -> float:
    """The next number whose quarters are easy to read; 1 for nothing."""
    if value <= 0:
        return 1
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 6, 8, 10) if step * power >= value)


def _numbers(series: Series, x_label: str, show: Callable[[float], str]) -> str:
    xs = sorted({x for points in series.values() for x, _ in points})
    values = {name: dict(points) for name, points in series.items()}
    rows = [
        (f"{x:g}", *(show(values[name][x]) if x in values[name] else "" for name in series))
        for x in xs
    ]
    return plain_table((x_label, *series), rows)


def plain_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column names its rows."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(text)}</td>" for text in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return (
        '<div class="t-scroll" tabindex="0"><table class="t-plain"><thead><tr>'
        f"{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
