"""What a sweep found, in words and as points."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import pandas as pd

from tapt.defenses import find_defenses
from tapt.evaluation.sweep import Sweep


def falls(result: Sweep) -> str:
    """Up to where each defence is right, of what has been measured."""
    items = "".join(
        f"<li>{escape(row.title)}: {_falls(result, result.answers[row.name])}</li>"
        for row in find_defenses(list(result.answers))
    )
    return f'<ul class="t-list">{items}</ul>'


def _falls(result: Sweep, answers: Sequence[str]) -> str:
    if not answers:
        return "not measured"
    measured, asked = len(answers), len(result.epsilons)
    right, good, bad = result.label, "right", "wrong"
    if not result.label_given:
        right, good, bad = answers[0], "kept", "changed"
    wrong = [e for e, answer in zip(result.epsilons, answers, strict=False) if answer != right]
    if not wrong:
        text = f"{good} up to {result.epsilons[measured - 1]}/255"
    elif len(wrong) == sum(epsilon >= wrong[0] for epsilon in result.epsilons[:measured]):
        text = f"{bad} from {wrong[0]}/255 on"
    else:
        text = f"{bad} at {', '.join(f'{epsilon}/255' for epsilon in wrong)}"
    return text + (f" ({measured} of {asked} measured)" if measured < asked else "")


def points(result: Sweep) -> pd.DataFrame:
    """One row for each point of the curves."""
    return pd.DataFrame(
        {"epsilon": epsilon, "probability": round(value, 4), "defence": row.title}
        for row in find_defenses(list(result.answers))
        for epsilon, value in zip(result.epsilons, result.probabilities[row.name], strict=False)
    )
