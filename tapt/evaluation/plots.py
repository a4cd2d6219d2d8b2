"""Plots of an evaluation: accuracy by defence and attack, and against epsilon."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tapt.packs.rows import Row, accuracy_figure, attack_name, defense_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_files(rows: Sequence[Row]) -> dict[str, bytes]:
    """PNG files by name, two per set: accuracy by defence and attack, and against epsilon."""
    files = {}
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        own = [row for row in rows if row["dataset"] == dataset]
        for kind, draw in (("accuracy", accuracy_figure), ("epsilon", epsilon_figure)):
            figure, buffer = draw(own), io.BytesIO()
            figure.suptitle(dataset)
            figure.savefig(buffer, format="png", dpi=120)
            name = "".join(c if c.isalnum() else "-" for c in dataset)
            files[f"{kind}-{name}.png"] = buffer.getvalue()
    return files


def epsilon_figure(rows: Sequence[Row]) -> Figure:
    """Accuracy against epsilon, one part per attacked model and attack; of several rows for a
    point, that of most images."""
    from matplotlib.figure import Figure

    points = {}
    for row in sorted(rows, key=lambda row: row["n"]):
        if row["epsilon_255"] is not None:
            place = row["attacked_model"], attack_name(row)
            points[place, defense_name(row), row["epsilon_255"]] = row
    parts: dict[tuple, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for (place, name, _), row in sorted(points.items(), key=lambda item: item[0][2]):
        parts[place][name].append(row)
    names = list(dict.fromkeys(defense_name(row) for row in rows))
    count = max(1, len(parts))
    figure = Figure(figsize=(2 + 2.6 * count, 4), layout="constrained")
    every = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for axes, ((model, attack), groups) in zip(every, parts.items(), strict=False):
        for name, own in groups.items():
            number = names.index(name)
            shift = 0.06 * (number - (len(names) - 1) / 2)  # intervals beside each other
            values = [own[0]["clean_accuracy"], *(row["accuracy"] for row in own)]
            ends = [own[0]["clean_ci95"], *(row["ci95"] for row in own)]
            pairs = list(zip(values, ends, strict=True))
            axes.errorbar(
                [shift, *(row["epsilon_255"] + shift for row in own)],
                [100 * value for value in values],
                yerr=[
                    [100 * max(0.0, value - low) for value, (low, _) in pairs],
                    [100 * max(0.0, high - value) for value, (_, high) in pairs],
                ],
                marker="o",
                capsize=2,
                color=f"C{number % 10}",
                label=name,
            )
        axes.set_title(f"{attack} on {model}", fontsize="small")
        axes.set_xlabel("epsilon, 1/255")
    every[0].set_ylim(0, 100)
    every[0].set_ylabel("accuracy, %")
    every[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
