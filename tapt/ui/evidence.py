"""The recorded rows of a pack, as one table and one chart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from tapt.defenses import all_defenses
from tapt.packs.rows import Row, attack_name, defense_name, epsilon_name, row_cells

if TYPE_CHECKING:
    from matplotlib.figure import Figure

THIN = 200
ABOUT = (
    "Accuracy over many pictures, as recorded with the loaded prompts. Rows of fewer than "
    f"{THIN} pictures are thin evidence, and pale in the chart."
)


def recorded(rows: Sequence[Row]) -> pd.DataFrame:
    """The rows as a table whose numbers stay numbers, to be sorted."""
    cells = [row_cells({**row, "defense": _title(row)}) for row in rows]
    table = pd.DataFrame(cells).drop(columns="budget", errors="ignore")
    for name in table.columns.intersection(["n", "clean %", "attacked %", "s/image"]):
        table[name] = pd.to_numeric(table[name])
    return table.assign(evidence=[f"thin: n < {THIN}" if r["n"] < THIN else "" for r in rows])


def condition(row: Row) -> str:
    """What was attacked and how, as one choice of the chart."""
    name = f"{attack_name(row)} on {row['attacked_model']}, {epsilon_name(row)}"
    return f"{name}, {row['dataset']}, n = {row['n']}"


def conditions(rows: Sequence[Row]) -> dict[str, Any]:
    """The choices of the chart; that of most pictures first."""
    ordered = sorted(rows, key=lambda row: -row["n"])
    choices = list(dict.fromkeys(map(condition, ordered)))
    return {"choices": choices, "value": choices[0] if choices else None}


def chart(rows: Sequence[Row], chosen: str) -> Figure:
    """Clean against attacked accuracy of every defence under one attack, with 95 % intervals;
    few pictures look pale."""
    from matplotlib.figure import Figure

    figure = Figure((6.5, 4.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    for number, row in enumerate(row for row in rows if condition(row) == chosen):
        (x, wide), (y, high) = (
            (100 * row[key], [[100 * abs(row[key] - end)] for end in row[ends]])
            for key, ends in (("clean_accuracy", "clean_ci95"), ("accuracy", "ci95"))
        )
        axes.errorbar(
            *(x, y, high, wide, "os^Dv<>P*X"[number % 10]),
            capsize=3,
            color=f"C{number % 10}",
            alpha=0.35 if row["n"] < THIN else 1.0,
            label=defense_name({**row, "defense": _title(row)}),
        )
    axes.set(xlabel="accuracy on clean pictures, %", ylabel="on attacked pictures, %")
    axes.set_ylim(-2, 102)
    axes.set_title(chosen, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _title(row: Row) -> str:
    """The defence's name for people."""
    name: str = row["defense"]
    return {defense.name: defense.title for defense in all_defenses()}.get(name, name)
