"""Plots of an evaluation: accuracy by defence and attack, and against epsilon."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from tapt.report import attack_name, epsilon_name


def write_plots(rows: Sequence[dict], folder: Path) -> list[str]:
    """Two PNG files per set: accuracy by defence and attack, and against epsilon."""
    names = []
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        mine = [row for row in rows if row["dataset"] == dataset]
        for kind, draw in (("accuracy", _bars), ("epsilon", _curves)):
            figure = draw(mine)
            figure.suptitle(dataset)
            names.append(f"{kind}-{''.join(c if c.isalnum() else '-' for c in dataset)}.png")
            figure.savefig(folder / names[-1], dpi=120)
    return names


def _errors(rows: Sequence[dict], value: str, interval: str) -> list[list[float]]:
    return [
        [100 * max(0.0, row[value] - row[interval][0]) for row in rows],
        [100 * max(0.0, row[interval][1] - row[value]) for row in rows],
    ]


def _bars(rows: Sequence[dict]) -> Figure:
    labels = dict.fromkeys(_label(row) for row in rows)
    defenses = list(dict.fromkeys(row["defense"] for row in rows))
    places = {label: i for i, label in enumerate(["clean", *labels])}
    figure = Figure(figsize=(3 + 0.7 * len(places), 5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(defenses)
    for number, defense in enumerate(defenses):
        mine = [row for row in rows if row["defense"] == defense]
        shift = (number - (len(defenses) - 1) / 2) * width
        bars = [
            ([places["clean"] + shift], mine[:1], "clean_accuracy", "clean_ci95"),
            ([places[_label(row)] + shift for row in mine], mine, "accuracy", "ci95"),
        ]
        for where, drawn, value, interval in bars:
            axes.bar(
                where,
                [100 * row[value] for row in drawn],
                width,
                yerr=_errors(drawn, value, interval),
                capsize=2,
                color=f"C{number}",
                label=defense if value == "accuracy" else None,
            )
    axes.set_xticks(list(places.values()), list(places), rotation=30, ha="right", fontsize="small")
    axes.set_ylim(0, 100)
    axes.set_ylabel("accuracy, %")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _label(row: dict) -> str:
    return f"{row['threat']}\n{attack_name(row)} {epsilon_name(row)}, n = {row['n']}"


def _curves(rows: Sequence[dict]) -> Figure:
    """One panel per attacked model and attack; of several rows for a point, that of most images."""
    points: dict[tuple, dict] = {}
    for row in sorted(rows, key=lambda row: row["n"]):
        if row["epsilon_255"] is not None:
            key = row["threat"], attack_name(row), row["defense"], row["epsilon_255"]
            points[key] = row
    panels: dict[tuple, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for row in sorted(points.values(), key=lambda row: row["epsilon_255"]):
        panels[row["threat"], attack_name(row)][row["defense"]].append(row)
    defenses = list(dict.fromkeys(row["defense"] for row in rows))
    count = max(1, len(panels))
    figure = Figure(figsize=(2 + 2.6 * count, 4), layout="constrained")
    every = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for axes, ((threat, attack), groups) in zip(every, panels.items(), strict=False):
        for defense, mine in groups.items():
            number = defenses.index(defense)
            shift = 0.06 * (number - (len(defenses) - 1) / 2)  # intervals beside each other
            low, high = _errors(mine, "accuracy", "ci95")
            (low_clean,), (high_clean,) = _errors(mine[:1], "clean_accuracy", "clean_ci95")
            axes.errorbar(
                [shift, *(row["epsilon_255"] + shift for row in mine)],
                [100 * mine[0]["clean_accuracy"], *(100 * row["accuracy"] for row in mine)],
                yerr=[[low_clean, *low], [high_clean, *high]],
                marker="o",
                capsize=2,
                color=f"C{number}",
                label=defense,
            )
        axes.set_title(f"{attack} on {threat}", fontsize="small")
        axes.set_xlabel("epsilon, 1/255")
    every[0].set_ylim(0, 100)
    every[0].set_ylabel("accuracy, %")
    every[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
