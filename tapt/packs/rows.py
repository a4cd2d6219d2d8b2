"""Evaluation rows for people: the names, the tables and the figure that all of the project uses.

A row is a dict as `tapt.packs.schema.Row` describes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
NUMBERS = ("n", "clean %", "clean 95 %", "attacked %", "attacked 95 %", "s/image")


def attack_name(row: Row) -> str:
    """Attack and its steps, such as `pgd-100`."""
    return row["attack"] if row["steps"] is None else f"{row['attack']}-{row['steps']}"


def epsilon_name(row: Row) -> str:
    """`1/255`, or the median size of an attack without epsilon."""
    if row["epsilon_255"] is not None:
        return f"{row['epsilon_255']}/255"
    return "L2" if row.get("l2_median") is None else f"L2 {row['l2_median']:.2f}"


def defense_name(row: Row) -> str:
    """The defence, with the settings by which it differs from the pack's: `tapt (views 8)`."""
    changes = [
        key.replace("_", " ") + ("" if value is True else f" {value}")
        for key, value in row.get("settings", {}).items()
    ]
    return f"{row['defense']} ({', '.join(changes)})" if changes else row["defense"]


def percent(row: Row, key: str) -> str:
    """A share, or both ends of an interval, in percent."""
    value = row[key]
    return "-".join(f"{100 * v:.1f}" for v in (value if isinstance(value, list) else [value]))


def row_cells(row: Row) -> dict[str, str]:
    """The cells of a row by column title, in order."""
    return {
        "data": row["dataset"],
        "defence": defense_name(row),
        "attacked model": row["attacked_model"],
        "attack": attack_name(row),
        "epsilon": epsilon_name(row),
        "n": str(row["n"]),
        "clean %": percent(row, "clean_accuracy"),
        "clean 95 %": percent(row, "clean_ci95"),
        "attacked %": percent(row, "accuracy"),
        "attacked 95 %": percent(row, "ci95"),
        "s/image": f"{row['seconds_per_image']:.4f}",
        "budget": row["budget"],
    }


def clean_rows(rows: Sequence[Row]) -> list[Row]:
    """For each set and defence the row with the most images, whose clean accuracy counts."""
    ascending = sorted(rows, key=lambda row: row["n"])
    return [*{(row["dataset"], defense_name(row)): row for row in ascending}.values()]


def markdown_table(rows: Sequence[Row]) -> str:
    """The rows as a table in Markdown."""
    return markdown([row_cells(row) for row in rows])


def markdown(cells: Sequence[Mapping[str, str]]) -> str:
    """Lines of cells by column title as a table in Markdown."""
    lines = [list(cells[0]), ["---"] * len(cells[0])] if cells else []
    lines += [[value.replace("|", "\\|") for value in line.values()] for line in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def text_table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, without their budget."""
    cells = [{k: v for k, v in row_cells(row).items() if k != "budget"} for row in rows]
    if not cells:
        return ""
    columns = []
    for title in cells[0]:
        column = [title, *(line[title] for line in cells)]
        width = max(map(len, column))
        columns.append([v.rjust(width) if title in NUMBERS else v.ljust(width) for v in column])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def accuracy_figure(rows: Sequence[Row]) -> Figure:
    """Bars with 95 % intervals, grouped by what was attacked and how; clean accuracy first."""
    from matplotlib.figure import Figure

    groups = _bars(rows)
    defenses = list(dict.fromkeys(defense_name(row) for row in rows))
    count = sum(map(len, groups.values()))
    figure = Figure((8, 1.5 + 0.16 * count + 0.2 * len(groups)), dpi=110, layout="constrained")
    axes = figure.subplots()
    ticks, place = [], 0.0
    for bars in groups.values():
        ticks.append(place + (len(bars) - 1) / 2)
        for defense, (value, (low, high)) in bars.items():
            number = defenses.index(defense)
            spread = [[100 * max(0.0, value - low)], [100 * max(0.0, high - value)]]
            axes.barh(place, 100 * value, 0.9, xerr=spread, color=f"C{number % 10}", capsize=2)
            place += 1
        place += 1
    for number, defense in enumerate(defenses):
        axes.barh(0, 0, color=f"C{number % 10}", label=defense)
    axes.set_yticks(ticks, list(groups), fontsize=7)
    axes.set_ylim(place - 0.5, -1)
    axes.set_xlim(0, 100)
    axes.set_xlabel("accuracy, %")
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure


def _bars(rows: Sequence[Row]) -> dict[str, dict[str, tuple[float, list[float]]]]:
    """Per group and defence a share with its interval."""
    several = len({row["dataset"] for row in rows}) > 1
    groups: dict[str, dict[str, tuple[float, list[float]]]] = {}
    for row in clean_rows(rows):
        name = f"{row['dataset']}\nclean" if several else "clean"
        clean = row["clean_accuracy"], row["clean_ci95"]
        groups.setdefault(name, {})[defense_name(row)] = clean
    for row in rows:
        name = f"{row['dataset']}\n" if several else ""
        name += f"{attack_name(row)} on {row['attacked_model']}\n{epsilon_name(row)}, n={row['n']}"
        groups.setdefault(name, {})[defense_name(row)] = row["accuracy"], row["ci95"]
    return groups
