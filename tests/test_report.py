"""What the report says beyond its rows."""

from __future__ import annotations

import math

import pytest

from tapt.report import averages, markdown, wilson


def row(dataset: str, right: int, n: int) -> dict:
    interval = list(wilson(right, n))
    return {
        "dataset": dataset,
        "defense": "tapt",
        "threat": "static",
        "attack": "pgd",
        "epsilon_255": 1,
        "steps": 5,
        "n": n,
        "clean_accuracy": right / n,
        "clean_ci95": interval,
        "accuracy": right / n,
        "ci95": interval,
        "seconds_per_image": 1.0,
        "budget": "5 steps",
    }


def test_the_interval_of_a_mean_over_sets():
    """Four sets with the same interval: half as wide around the mean, by the normal rule."""
    rows = [row(name, 50, 100) for name in "abcd"]
    (mean,) = averages(rows)
    assert (mean["dataset"], mean["n"], mean["accuracy"]) == ("mean of 4", 400, 0.5)
    for key in ("ci95", "clean_ci95"):
        assert mean[key] == pytest.approx([0.5 - 0.09617 / 2, 0.5 + 0.09617 / 2], abs=1e-5)
    (uneven,) = averages([row("a", 0, 10), row("b", 10, 20)])
    low, high = wilson(10, 20)
    assert uneven["accuracy"] == 0.25
    assert uneven["ci95"][0] == pytest.approx(0.25 - (0.5 - low) / 2)
    assert uneven["ci95"][1] == pytest.approx(0.25 + math.hypot(wilson(0, 10)[1], high - 0.5) / 2)
    assert averages(rows[:1]) == []
    assert averages([row("a", 5, 10), row("a", 50, 100)]) == []  # two subsets of one set


def test_the_report_says_how_far_bfloat16_agrees():
    summary = {"settings": {"seed": 0}, "rows": [row("a", 5, 10)], "paired": []}
    assert "bfloat16" not in markdown(summary, [])
    summary["bfloat16"] = {
        "dataset": "a",
        "n": 500,
        "top1_agreement": 0.998,
        "largest_probability_difference": 0.0123,
        "seconds_per_image": {"bfloat16": 0.5, "float32": 1.25},
    }
    report = markdown(summary, [])
    assert "500 clean images of a: TAPT answers as in float32 on 99.8 % of them" in report
    assert "no probability differs by more than 0.012" in report
    assert "0.5000 s instead of 1.2500 s" in report
