"""From per-image outcomes to tables, intervals and paired differences."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from statistics import median

Z95 = 1.959963984540054
CONDITION = ("dataset", "threat", "attack", "epsilon_255", "steps")
THREATS = {
    "clip": "white-box on vanilla CLIP, the image then shown to every defence",
    "static": "white-box on the prompts before the test-time step, the image then shown to every "
    "defence (the published protocol)",
    "square": "black-box queries to each row's own defence as it is deployed",
    "adaptive": "white-box on each row's own defence as it is deployed",
    "all": "per image, the worst of the attacks that the budget names",
}


def wilson(right: float, n: int) -> tuple[float, float]:
    """Wilson 95 % interval of a proportion; `right` may be a sum of shares."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = right / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # at the ends rounding would leave the proportion outside
    return min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half))


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p-value for `only_a` images that one defence alone answers rightly, and
    `only_b` that the other one does."""
    n, fewer = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)


class Outcomes:
    """Per condition and defence, the outcome of every image.

    records: lines of outcomes.jsonl; of two for the same image and defence the later one counts.
    """

    def __init__(self, records: Iterable[dict]) -> None:
        self.cells: dict[tuple, dict[str, dict[int, dict]]] = defaultdict(lambda: defaultdict(dict))
        for record in records:
            condition = tuple(record[key] for key in CONDITION)
            for defense, right in record["right"].items():
                kept = {**record, "right": right, "seconds": record["seconds"][defense]}
                self.cells[condition][defense][record["image"]] = kept

    def attacked(self) -> list[tuple]:
        """Conditions with an attack."""
        return [condition for condition in self.cells if condition[1] is not None]

    def clean(self, dataset: str, defense: str) -> dict[int, dict]:
        return self.cells.get((dataset, None, None, None, None), {}).get(defense, {})

    def rows(self) -> list[dict]:
        """One row per set, defence and attack, and the worst case over the attacks."""
        rows = [
            self._row(condition, defense, images)
            for condition in self.attacked()
            for defense, images in self.cells[condition].items()
        ]
        return rows + self._worst()

    def _row(self, condition: tuple, defense: str, images: dict[int, dict]) -> dict:
        clean = self.clean(condition[0], defense)
        fooled = [
            r["l2"] for i, r in images.items() if r["right"] < 0.5 <= _rightness(clean.get(i))
        ]
        clean = [clean[i]["right"] for i in images if i in clean]
        right, n = sum(r["right"] for r in images.values()), len(images)
        first = next(iter(images.values()))
        row = {
            **dict(zip(CONDITION, condition, strict=True)),
            "defense": defense,
            "n": n,
            "clean_accuracy": sum(clean) / max(1, len(clean)),
            "clean_ci95": list(wilson(sum(clean), len(clean))),
            "accuracy": right / n,
            "ci95": list(wilson(right, n)),
            "budget": first["budget"],
            "seconds_per_image": sum(r["seconds"] for r in images.values()) / n,
            "attack_seconds_per_image": sum(r["attack_seconds"] for r in images.values()) / n,
            "peak_memory_mb": max(r["peak_memory_mb"] for r in images.values()),
        }
        if condition[3] is None:  # an attack without epsilon counts by its size
            row["l2_median"] = median(fooled) if fooled else None
        return row

    def _worst(self) -> list[dict]:
        groups: dict[tuple, list[tuple]] = defaultdict(list)
        for condition in self.attacked():
            dataset, _, _, epsilon, _ = condition
            for defense in self.cells[condition]:
                if epsilon is not None:
                    groups[dataset, epsilon, defense].append(condition)
        rows = []
        for (dataset, epsilon, defense), conditions in groups.items():
            seen = [self.cells[condition][defense] for condition in conditions]
            common = sorted(set.intersection(*(set(images) for images in seen)))
            if len(conditions) < 2 or not common:
                continue
            worst = {i: min((images[i] for images in seen), key=_rightness) for i in common}
            budget = "; ".join(
                f"{c[2]} on {c[1]} ({next(iter(self.cells[c][defense].values()))['budget']})"
                for c in conditions
            )
            worst = {i: {**record, "budget": budget} for i, record in worst.items()}
            rows.append(self._row((dataset, "all", "worst", epsilon, None), defense, worst))
        return rows

    def paired(self) -> list[dict]:
        """Differences between defences on the same images, under every condition."""
        rows = []
        for condition in self.cells:
            for a, b in combinations(self.cells[condition], 2):
                one, other = self.cells[condition][a], self.cells[condition][b]
                pairs = [
                    (one[i]["right"] >= 0.5, other[i]["right"] >= 0.5) for i in one if i in other
                ]
                only_a, only_b = pairs.count((True, False)), pairs.count((False, True))
                rows.append(
                    {
                        **dict(zip(CONDITION, condition, strict=True)),
                        "a": a,
                        "b": b,
                        "n": len(pairs),
                        "only_a": only_a,
                        "only_b": only_b,
                        "difference": (only_a - only_b) / max(1, len(pairs)),
                        "p_value": mcnemar(only_a, only_b),
                    }
                )
        return rows


def _rightness(record: dict | None) -> float:
    return 1.0 if record is None else record["right"]


def attack_name(row: dict) -> str:
    """Attack and its steps, such as `pgd-100`."""
    return row["attack"] if row["steps"] is None else f"{row['attack']}-{row['steps']}"


def epsilon_name(row: dict) -> str:
    """`1/255`, or the median size of an attack without epsilon."""
    if row["epsilon_255"] is not None:
        return f"{row['epsilon_255']}/255"
    return "L2" if row.get("l2_median") is None else f"L2 {row['l2_median']:.2f}"


def percent(row: dict, key: str) -> str:
    """An interval in percent."""
    return f"{100 * row[key][0]:.1f}-{100 * row[key][1]:.1f}"


def table(rows: Sequence[dict]) -> str:
    """The rows for people; one line per set, defence, threat, attack and epsilon."""
    names = [row["dataset"] for row in rows]
    data = max(map(len, [*names, "data"]))
    lines = [
        f"{'data':<{data}} {'defence':<13} {'attacked model':<15} {'attack':<15} {'eps':>8}  "
        f"{'n':>5}  {'clean %':>7} {'95 % interval':>14}  {'attacked %':>10} "
        f"{'95 % interval':>14}  {'s/image':>8}"
    ]
    for row in rows:
        lines.append(
            f"{row['dataset']:<{data}} {row['defense']:<13} {row['threat']:<15} "
            f"{attack_name(row):<15} {epsilon_name(row):>8}  {row['n']:>5}  "
            f"{100 * row['clean_accuracy']:>7.1f} {percent(row, 'clean_ci95'):>14}  "
            f"{100 * row['accuracy']:>10.1f} {percent(row, 'ci95'):>14}  "
            f"{row['seconds_per_image']:>8.4f}"
        )
    return "\n".join(lines)


def markdown(summary: dict, plots: Sequence[str]) -> str:
    """The report: settings, what each threat means, rows, paired differences, plots."""
    rows, settings = summary["rows"], summary["settings"]
    lines = ["# Evaluation", ""]
    lines += [f"- {name}: {_plain(value)}" for name, value in settings.items()]
    lines += ["", "Attacked models:", ""]
    present = dict.fromkeys(row["threat"] for row in rows)
    lines += [f"- `{threat}`: {THREATS[threat]}" for threat in present]
    header = "defence|attacked model|attack|epsilon|n|clean %|95 %|attacked %|95 %|s/image|budget"
    lines += ["", "## Accuracy", "", *_head(f"data|{header}")]
    lines += [
        f"| {row['dataset']} | {row['defense']} | {row['threat']} | {attack_name(row)} | "
        f"{epsilon_name(row)} | {row['n']} | {100 * row['clean_accuracy']:.1f} | "
        f"{percent(row, 'clean_ci95')} | {100 * row['accuracy']:.1f} | {percent(row, 'ci95')} | "
        f"{row['seconds_per_image']:.4f} | {row['budget']} |"
        for row in [*rows, *averages(rows)]
    ]
    lines += ["", *(f"![{Path(plot).stem}]({plot})" for plot in plots)]
    if "bfloat16" in summary:
        lines += ["", "## bfloat16", "", _agreement(summary["bfloat16"])]
    lines += ["", "## Paired differences", ""]
    lines += ["Exact McNemar test on the same images; right is at least half of the draws.", ""]
    lines += _head("data|attacked model|attack|epsilon|a|b|n|only a right|only b right|a - b %|p")
    for row in summary["paired"]:
        seen = (
            ("clean", "", "")
            if row["threat"] is None
            else (row["threat"], attack_name(row), epsilon_name(row))
        )
        lines.append(
            f"| {row['dataset']} | {' | '.join(seen)} | {row['a']} | {row['b']} | {row['n']} | "
            f"{row['only_a']} | {row['only_b']} | {100 * row['difference']:+.1f} | "
            f"{row['p_value']:.2g} |"
        )
    return "\n".join(lines) + "\n"


def _agreement(told: dict) -> str:
    seconds = told["seconds_per_image"]
    return (
        f"Views selected in bfloat16, {told['n']} clean images of {told['dataset']}: TAPT answers "
        f"as in float32 on {100 * told['top1_agreement']:.1f} % of them, no probability differs by "
        f"more than {told['largest_probability_difference']:.2g}, and an image takes "
        f"{seconds['bfloat16']:.4f} s instead of {seconds['float32']:.4f} s."
    )


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _head(titles: str) -> list[str]:
    return ["| " + titles.replace("|", " | ") + " |", "|" + "---|" * (titles.count("|") + 1)]


def averages(rows: Sequence[dict]) -> list[dict]:
    """Means over several sets, one row of each; the errors of independent sets add up as squares
    (Newcombe 1998)."""
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for row in rows:
        groups[(row["defense"], *(row[key] for key in CONDITION[1:]))].append(row)

    def mean(group: list[dict], key: str) -> float:
        return sum(row[key] for row in group) / len(group)

    def interval(group: list[dict], key: str, ends: str) -> list[float]:
        low, high = (math.hypot(*(row[key] - row[ends][i] for row in group)) for i in (0, 1))
        middle = mean(group, key)
        return [middle - low / len(group), middle + high / len(group)]

    return [
        {
            **group[0],
            "dataset": f"mean of {len(group)}",
            "n": sum(row["n"] for row in group),
            **{
                key: mean(group, key) for key in ("clean_accuracy", "accuracy", "seconds_per_image")
            },
            "clean_ci95": interval(group, "clean_accuracy", "clean_ci95"),
            "ci95": interval(group, "accuracy", "ci95"),
        }
        for group in groups.values()
        if len({row["dataset"] for row in group}) == len(group) > 1
    ]
