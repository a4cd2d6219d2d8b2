"""The report of an evaluation in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tapt.evaluation.outcomes import averages
from tapt.packs.rows import attack_name, epsilon_name, markdown_table

ATTACKED_MODELS = {
    "clip": "vanilla CLIP, the attacked image then shown to every defence",
    "static": "the prompts before the test-time step, the attacked image then shown to every "
    "defence (the published protocol)",
    "deployed": "each row's own defence as it is deployed: the adaptive attack with gradients, "
    "black-box with an attack that only asks for answers",
    "all": "per image, the worst of the attacks that the budget names",
}
PAIRED = (
    "data",
    "attacked model",
    "attack",
    "epsilon",
    "a",
    "b",
    "n",
    "only a right",
    "only b right",
    "a - b %",
    "p",
)


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
    parts += [
        "## Paired differences",
        "Exact McNemar test on the same images; right is at least half of the draws.",
        "\n".join(
            f"| {' | '.join(line)} |"
            for line in [PAIRED, ["---"] * len(PAIRED), *map(_pair, results["paired"])]
        ),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _pair(row: Mapping[str, Any]) -> list[str]:
    condition = ["clean", "", ""]
    if row["attacked_model"] is not None:
        condition = [row["attacked_model"], attack_name(row), epsilon_name(row)]
    return [
        row["dataset"],
        *condition,
        row["a"],
        row["b"],
        str(row["n"]),
        str(row["only_a"]),
        str(row["only_b"]),
        f"{100 * row['difference']:+.1f}",
        f"{row['p_value']:.2g}",
    ]


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
