"""The report of an evaluation: Markdown, and plots of accuracy by attack and against epsilon."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tapt.evaluation.outcomes import averages
from tapt.packs.rows import (
    Row,
    accuracy_figure,
    attack_name,
    defense_name,
    epsilon_name,
    markdown,
    markdown_table,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ATTACKED_MODELS = {
    "clip": "vanilla CLIP, the attacked image then shown to every defence",
    "static": "the prompts before the test-time step, the attacked image then shown to every "
    "defence (the published protocol)",
    "deployed": "each row's own defence as it is deployed: the adaptive attack with gradients, "
    "black-box with an attack that only asks for answers",
    "all": "per image, the worst of the attacks that the budget names",
}


def report(results: Mapping[str, Any], plots: Sequence[str]) -> str:
    """Settings, what each attacked model means, rows, paired differences, plots.

    results: `Results.to_dict()`; plots: names of files beside the report.
    """
    rows = results["rows"]
    present = dict.fromkeys(row["attacked_model"] for row in rows)
    parts = [
        "# Evaluation",
        "\n".join(f"- {name}: {_plain(value)}" for name, value in results["settings"].items()),
        "Attacked models:",
        "\n".join(f"- `{name}`: {ATTACKED_MODELS[name]}" for name in present),
        "## Accuracy",
        markdown_table([*rows, *averages(rows)]),
        "\n".join(f"![{Path(plot).stem}]({plot})" for plot in plots),
    ]
    if results["agreement"]:
        parts += ["## Selection in bfloat16", "\n".join(map(_agreement, results["agreement"]))]
    if pairs := [_pair(row) for row in results["paired"]]:
        parts += [
            "## Paired differences",
            "Exact McNemar test on the same images; right is at least half of the draws.",
            markdown(pairs),
        ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _pair(row: Row) -> dict[str, str]:
    clean = row["attacked_model"] is None
    return {
        "data": row["dataset"],
        "attacked model": "clean" if clean else row["attacked_model"],
        "attack": "" if clean else attack_name(row),
        "epsilon": "" if clean else epsilon_name(row),
        **{name: str(row[name]) for name in ("a", "b", "n")},
        "only a right": str(row["only_a"]),
        "only b right": str(row["only_b"]),
        "a - b %": f"{100 * row['difference']:+.1f}",
        "p": f"{row['p_value']:.2g}",
    }


def _agreement(entry: Mapping[str, Any]) -> str:
    seconds = entry["seconds_per_image"]
    return (
        f"- {entry['n']} clean images of {entry['dataset']}: {entry['defense']} answers as in "
        f"float32 on {100 * entry['top1_agreement']:.1f} % of them, no probability differs by more "
        f"than {entry['largest_probability_difference']:.2g}, and an image takes "
        f"{seconds['bfloat16']:.4f} s instead of {seconds['float32']:.4f} s."
    )


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


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

    parts: dict[tuple, dict[str, dict[int, Row]]] = defaultdict(lambda: defaultdict(dict))
    limited = [row for row in rows if row["epsilon_255"] is not None]
    for row in sorted(limited, key=lambda row: (row["epsilon_255"], row["n"])):
        part = parts[row["attacked_model"], attack_name(row)]
        part[defense_name(row)][row["epsilon_255"]] = row
    names = list(dict.fromkeys(defense_name(row) for row in rows))
    count = max(1, len(parts))
    figure = Figure(figsize=(2 + 2.6 * count, 4), layout="constrained")
    every = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for axes, ((model, attack), curves) in zip(every, parts.items(), strict=False):
        for name, points in curves.items():
            number, first = names.index(name), next(iter(points.values()))
            shift = 0.06 * (number - (len(names) - 1) / 2)  # intervals beside each other
            shares = [(first["clean_accuracy"], *first["clean_ci95"])]
            shares += [(row["accuracy"], *row["ci95"]) for row in points.values()]
            axes.errorbar(
                [epsilon + shift for epsilon in (0, *points)],
                [100 * value for value, *_ in shares],
                yerr=[
                    [100 * max(0.0, value - low) for value, low, _ in shares],
                    [100 * max(0.0, high - value) for value, _, high in shares],
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
