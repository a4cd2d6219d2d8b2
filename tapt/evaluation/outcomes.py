"""From per-image outcomes to rows, intervals and paired differences."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tapt.core.errors import InputError
from tapt.core.settings import sentence
from tapt.files import describe

Z95 = 1.959963984540054
CONDITION = ("dataset", "attacked_model", "attack", "epsilon_255", "steps")
Key = tuple[Any, ...]
Share = Annotated[float, Field(ge=0, le=1)]
Size = Annotated[float, Field(ge=0)]


class Outcome(BaseModel):
    """One image under one condition: a line of outcomes.jsonl.

    attacked_model, attack, epsilon_255, steps: None for clean images.
    image: its index in the data set.
    answers: the class that each defence answers most often over its draws.
    right: share of each defence's draws that answer `label`.
    linf_255, l2: measured size of the attack, in 1/255 and in [0, 1] pixels.
    budget: what the attack might spend, in words.
    seconds: that each defence took alone; attack_seconds: that the attack took.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    dataset: str
    attacked_model: str | None
    attack: str | None
    epsilon_255: int | None
    steps: int | None
    image: int = Field(ge=0)
    label: int = Field(ge=0)
    answers: dict[str, int]
    right: dict[str, Share]
    linf_255: int = Field(ge=0)
    l2: Size
    budget: str
    seconds: dict[str, Size]
    attack_seconds: Size

    @model_validator(mode="after")
    def _check(self) -> Outcome:
        if not set(self.right) <= set(self.seconds):
            raise ValueError("seconds of a defence are missing")
        return self

    @property
    def condition(self) -> Key:
        """Values of `CONDITION`."""
        return tuple(getattr(self, name) for name in CONDITION)


def read_outcomes(path: Path) -> list[Outcome]:
    """Whole lines of outcomes.jsonl; a line that an interruption cut short is left out.

    Raises:
        InputError: the file cannot be read, or a line is whole and something else.
    """
    try:
        lines = path.read_bytes().splitlines() if path.exists() else []
    except OSError as error:
        raise InputError(f"{path.name} cannot be read: {describe(error)}.") from error
    outcomes = []
    for number, line in enumerate(lines, 1):
        try:
            outcomes.append(Outcome.model_validate_json(line))
        except ValidationError as error:
            if error.errors()[0]["type"] != "json_invalid":
                raise InputError(
                    f"{path.name} is damaged in line {number}: {sentence(error, Outcome)}."
                ) from error
    return outcomes


def to_lines(outcomes: Sequence[Outcome]) -> bytes:
    """Outcomes as they stand in outcomes.jsonl."""
    return "".join(outcome.model_dump_json() + "\n" for outcome in outcomes).encode()


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

    outcomes: of two for the same image and defence the later one counts.
    """

    def __init__(self, outcomes: Iterable[Outcome]) -> None:
        self.cells: dict[Key, dict[str, dict[int, Outcome]]] = defaultdict(
            lambda: defaultdict(dict)
        )
        for outcome in outcomes:
            for defense in outcome.right:
                self.cells[outcome.condition][defense][outcome.image] = outcome

    def has(self, condition: Key, defense: str, image: int) -> bool:
        """Whether this outcome is there."""
        return image in self.cells.get(condition, {}).get(defense, {})

    def rows(self) -> list[dict[str, Any]]:
        """One row per set, defence and attack, and the worst case over the attacks."""
        rows = []
        limited: dict[Key, dict[Key, dict[int, Outcome]]] = defaultdict(dict)
        for condition, cell in self.cells.items():
            dataset, attacked_model, _, epsilon, _ = condition
            for defense, images in cell.items() if attacked_model else ():
                rows.append(self._row(condition, defense, images))
                if epsilon is not None:
                    limited[dataset, epsilon, defense][condition] = images
        for (dataset, epsilon, defense), attacks in limited.items():
            common = sorted(set.intersection(*map(set, attacks.values())))
            if len(attacks) > 1 and common:
                every = {i: [images[i] for images in attacks.values()] for i in common}
                worst = {i: min(some, key=lambda o: o.right[defense]) for i, some in every.items()}
                row = self._row((dataset, "all", "worst", epsilon, None), defense, worst)
                budgets = [
                    f"{o.attack} on {o.attacked_model} ({o.budget})" for o in every[common[0]]
                ]
                rows.append({**row, "budget": "; ".join(budgets)})
        return rows

    def paired(self) -> list[dict[str, Any]]:
        """Differences between defences on the same images, under every condition; a defence is
        right where at least half of its draws are."""
        rows = []
        for condition, cell in self.cells.items():
            for a, b in combinations(cell, 2):
                common = cell[a].keys() & cell[b].keys()
                pairs = [(cell[a][i].right[a] >= 0.5, cell[b][i].right[b] >= 0.5) for i in common]
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

    def _row(self, condition: Key, defense: str, images: Mapping[int, Outcome]) -> dict[str, Any]:
        every = self.cells.get((condition[0], None, None, None, None), {}).get(defense, {})
        clean = {i: every[i].right[defense] for i in images if i in every}
        shares = {i: outcome.right[defense] for i, outcome in images.items()}
        n = len(images)
        row = {
            **dict(zip(CONDITION, condition, strict=True)),
            "defense": defense,
            "n": n,
            "clean_accuracy": sum(clean.values()) / max(1, len(clean)),
            "clean_ci95": list(wilson(sum(clean.values()), len(clean))),
            "accuracy": sum(shares.values()) / n,
            "ci95": list(wilson(sum(shares.values()), n)),
            "budget": next(iter(images.values())).budget,
            "seconds_per_image": sum(o.seconds[defense] for o in images.values()) / n,
            "attack_seconds_per_image": sum(o.attack_seconds for o in images.values()) / n,
        }
        if row["epsilon_255"] is None:  # an attack without epsilon counts by its size
            fooled = [i for i, share in shares.items() if share < 0.5 <= clean.get(i, 1)]
            row["l2_median"] = median(images[i].l2 for i in fooled) if fooled else None
        return row


def averages(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over several sets, one row of each."""
    groups: dict[Key, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        settings = json.dumps(row.get("settings", {}), sort_keys=True)
        key = (row["defense"], settings, *(row[name] for name in CONDITION[1:]))
        groups[key].append(row)
    several = (group for group in groups.values() if len(group) > 1)
    return [_mean(group) for group in several if len({r["dataset"] for r in group}) == len(group)]


def _mean(group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The errors of independent sets add up as squares (Newcombe 1998)."""
    count = len(group)
    mean = {**group[0], "dataset": f"mean of {count}", "n": sum(row["n"] for row in group)}
    for key in ("clean_accuracy", "accuracy", "seconds_per_image"):
        mean[key] = sum(row[key] for row in group) / count
    for key, ends in (("clean_accuracy", "clean_ci95"), ("accuracy", "ci95")):
        low, high = (math.hypot(*(row[key] - row[ends][i] for row in group)) for i in (0, 1))
        mean[ends] = [mean[key] - low / count, mean[key] + high / count]
    return mean
