"""From outcomes to rows, intervals, paired differences, the report and its curves."""

from __future__ import annotations

import math

import pytest

from tapt.evaluation.outcomes import Outcome, Outcomes, averages, mcnemar, wilson
from tapt.evaluation.report import epsilon_figure, report

PGD = {"attacked_model": "static", "attack": "pgd", "epsilon_255": 1, "steps": 5}


def outcome(image: int, tapt: float = 0.0, **changes: object) -> Outcome:
    values = {"dataset": "d", **PGD, "image": image, "label": 0, "answers": {}, "linf_255": 1}
    values |= {"l2": 0.5, "budget": "5 steps", "right": {"tapt": tapt}, "attack_seconds": 2.0}
    return Outcome(**{**values, "seconds": {"tapt": 1.0, "clip": 1.0}, **changes})


def row(dataset: str, right: int, n: int, **changes: object) -> dict:
    interval = list(wilson(right, n))
    values = {"dataset": dataset, "defense": "tapt", **PGD, "n": n, "seconds_per_image": 1.0}
    values |= {"accuracy": right / n, "ci95": interval, "budget": "5 steps"}
    return {**values, "clean_accuracy": right / n, "clean_ci95": interval, **changes}


def test_the_later_of_two_outcomes_counts():
    (only,) = Outcomes([outcome(0, 0.0), outcome(1, 1.0), outcome(0, 1.0)]).rows()
    assert (only["n"], only["accuracy"]) == (2, 1.0)


def test_the_worst_case_covers_the_images_that_met_every_attack():
    records = [outcome(i, 1.0) for i in range(4)]
    records += [outcome(i, float(i > 0), attack="apgd") for i in range(2)]
    rows = {row["attack"]: row for row in Outcomes(records).rows()}
    assert rows["worst"]["n"] == 2
    assert rows["worst"]["accuracy"] == 0.5
    assert rows["worst"]["attacked_model"] == "all"
    assert rows["worst"]["budget"] == "pgd on static (5 steps); apgd on static (5 steps)"


def test_an_attack_without_epsilon_counts_by_its_size():
    clean = {"attacked_model": None, "attack": None, "epsilon_255": None, "steps": None}
    records = [outcome(i, float(i != 2), **clean) for i in range(4)]
    cw = {"attack": "cw", "epsilon_255": None}
    records += [outcome(i, float(i == 3), l2=i + 0.5, **cw) for i in range(4)]
    (only,) = Outcomes(records).rows()
    assert only["clean_accuracy"] == 0.75
    assert only["l2_median"] == 1.0  # of images 0 and 1: 2 was wrong before, 3 resisted


def test_wilson_interval():
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(50, 100)  # by hand from the formula
    assert low == pytest.approx(0.40383, abs=1e-5)
    assert high == pytest.approx(0.59617, abs=1e-5)
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == pytest.approx(1.0)


def test_mcnemar_by_hand():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 0) == pytest.approx(2 / 32)
    assert mcnemar(1, 4) == mcnemar(4, 1) == pytest.approx(2 * (1 + 5) / 32)
    assert mcnemar(3, 3) == 1.0
    assert mcnemar(400, 100) < 1e-30


def test_paired_differences_by_hand():
    pairs = [(1.0, 0.0), (1.0, 1.0), (0.0, 1.0), (1.0, 0.0)]
    records = [outcome(i, right={"tapt": a, "clip": b}) for i, (a, b) in enumerate(pairs)]
    (pair,) = Outcomes(records).paired()
    assert (pair["a"], pair["b"], pair["only_a"], pair["only_b"]) == ("tapt", "clip", 2, 1)
    assert pair["difference"] == 0.25
    assert pair["p_value"] == 1.0


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
    assert averages([row("a", 5, 10), row("b", 5, 10, settings={"views": 2})]) == []


def test_the_report_says_how_far_bfloat16_agrees():
    results = {"settings": {"seed": 0}, "rows": [row("a", 5, 10)], "paired": [], "agreement": []}
    assert "bfloat16" not in report(results, [])
    results["agreement"] = [
        {
            "dataset": "a",
            "defense": "tapt",
            "n": 500,
            "top1_agreement": 0.998,
            "largest_probability_difference": 0.0123,
            "seconds_per_image": {"bfloat16": 0.5, "float32": 1.25},
        }
    ]
    text = report(results, [])
    assert "500 clean images of a: tapt answers as in float32 on 99.8 % of them" in text
    assert "no probability differs by more than 0.012" in text
    assert "0.5000 s instead of 1.2500 s" in text


def test_curves_take_rows_of_several_sizes():
    sizes = ((1000, 2, 300), (200, 2, 50), (300, 1, 120))
    rows = [
        row("set", right, n, epsilon_255=epsilon, clean_accuracy=0.8, clean_ci95=[0.7, 0.9])
        for n, epsilon, right in sizes
    ]
    (axes,) = epsilon_figure(rows).axes
    points = axes.lines[0].get_xydata().tolist()
    assert points == [[0, 80], [1, 40], [2, 30]]  # at 2/255 that of 1,000 images
