"""Every rule of the self-check holds for the harness and fails for a broken one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import TOY_CLASSES, local_backbone, toy_model
from PIL import Image
from torch import Tensor

from tapt.core.attacks import Attack, attack_images
from tapt.core.backbone import Backbone
from tapt.data import LabelledImages
from tapt.defenses.deployed import ask, attack_deployed
from tapt.evaluation import selfcheck
from tapt.evaluation.probes import Masked
from tapt.evaluation.selfcheck import BROKEN, RULES, Lab, broken_attack, example_pixels

VIEWS = {"views": 16, "keep": 0.25, "lr": 0.005}


def lab_on(backbone: Backbone, pixels: Tensor | None = None) -> Lab:
    model = toy_model(backbone, statistics=None)
    clip = model.prepare(TOY_CLASSES)
    pixels = example_pixels(model, 10) if pixels is None else pixels
    return Lab(clip, model.prepare_defenses(clip, changes=VIEWS), pixels)


@pytest.fixture(scope="module")
def lab(toy: Backbone) -> Lab:
    return lab_on(toy)


def broken(change: Callable[[Attack], bool]) -> dict[str, Callable]:
    """Attacks that do nothing where `change` says so."""

    def attack(model, pixels: Tensor, labels: Tensor, settings: Attack) -> Tensor:
        return pixels if change(settings) else attack_images(model, pixels, labels, settings)

    def deployed(prepared, pixels, labels, settings, **options: object) -> Tensor:
        if change(settings):
            return pixels
        return attack_deployed(prepared, pixels, labels, settings, **options)

    return {"attack": attack, "deployed": deployed}


@pytest.mark.parametrize("rule", [*RULES, broken_attack], ids=lambda rule: rule.__name__)
def test_every_rule_holds_for_the_harness(lab: Lab, rule):
    passed, measured = rule(lab)
    assert passed, measured


FAULTS = {
    "large_epsilon": lambda attack: True,
    "more_steps": lambda attack: attack.steps > 5,
    "autoattack": lambda attack: attack.name == "autoattack",
    "black_box": lambda attack: attack.name == "pgd",
}


@pytest.mark.parametrize("name", list(FAULTS))
def test_a_rule_fails_for_an_attack_that_gives_up(lab: Lab, name: str, monkeypatch):
    monkeypatch.setattr(selfcheck, "SMALL", 16 / 255)  # so that a working attack succeeds here
    monkeypatch.setattr(selfcheck, "MIDDLE", 64 / 255)
    rule = getattr(selfcheck, name)
    passed, measured = rule(replace(lab, **broken(FAULTS[name])))
    assert not passed, measured
    assert "%" in measured


def deployed_fault(fault: str) -> Callable[..., Tensor]:
    """An attack on deployed defences with one fault."""

    def attack(prepared, pixels, labels, settings, *, adaptive) -> Tensor:
        if fault == "gives up" or (fault == "loses by more" and adaptive.pool > 2):
            return pixels
        if fault == "knows no BPDA":
            prepared = Masked(prepared.clip, None)
        return attack_deployed(prepared, pixels, labels, settings, adaptive=adaptive)

    return attack


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("no_weaker_than_replays", "gives up"),
        ("more_pool", "loses by more"),
        ("masked_gradient", "knows no BPDA"),
        ("no_defence", "gives up"),
    ],
)
def test_a_rule_fails_for_a_faulty_attack_on_deployed_defences(lab, name, fault, monkeypatch):
    monkeypatch.setattr(selfcheck, "SMALL", 16 / 255)
    monkeypatch.setattr(selfcheck, "MIDDLE", 64 / 255)
    rule = getattr(selfcheck, name)
    assert rule(lab)[0], rule(lab)[1]
    passed, measured = rule(replace(lab, deployed=deployed_fault(fault)))
    assert not passed, measured


def test_the_rule_of_draws_fails_where_the_judging_ones_score(lab: Lab):
    def judged(prepared, pixels, seeds, purpose, draws) -> Tensor:
        return ask(prepared, pixels, seeds, "judging", draws)

    passed, measured = selfcheck.other_draws(replace(lab, ask=judged))
    assert (passed, measured) == (False, "4 of 4 are shared")


def test_deployed_defences_are_checked_under_a_large_epsilon(lab: Lab):
    nothing = broken(lambda attack: True)["deployed"]
    passed, measured = selfcheck.large_epsilon(replace(lab, deployed=nothing))
    assert not passed
    assert "ensemble" in measured
    assert "tapt" in measured


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda moved: moved - 1, "leaves the ball"),
        (lambda moved: moved + 1, "leaves the ball"),
        (lambda moved: moved.clamp(-3, 2), "moves from -3 to 2 of 3"),
    ],
)
def test_the_rounding_rule_fails_for_another_ball(lab: Lab, change: Callable, words: str):
    def attack(model, pixels: Tensor, *rest: object) -> Tensor:
        moved = change(attack_images(model, pixels, *rest).int() - pixels.int())
        return (pixels.int() + moved).clamp(0, 255).to(torch.uint8)

    passed, measured = selfcheck.rounding(replace(lab, attack=attack))
    assert not passed
    assert words in measured


def test_the_model_rule_fails_for_other_sentences_and_types(lab: Lab, toy_folder):
    wrong = lab_on(lab.clip.backbone, lab.pixels)
    other = replace(lab.clip, classes=("bus", "tree", "fish"))
    vars(wrong.clip)["text_features"] = other.text_features
    assert not selfcheck.same_model(wrong)[0]
    double = lab_on(local_backbone(toy_folder, torch.float64), lab.pixels)
    assert not selfcheck.same_model(double)[0]


def test_the_broken_attacks_must_be_caught(lab: Lab, monkeypatch):
    for name in ("large_epsilon", "rounding"):
        monkeypatch.setattr(selfcheck, name, lambda lab: (True, "anything goes"))
    passed, measured = broken_attack(lab)
    assert not passed
    assert all(name in measured for name in BROKEN)


def test_a_verdict_per_rule_on_examples_and_on_data(toy, monkeypatch):
    def good(lab: Lab) -> tuple[bool, str]:
        """Water is wet."""
        return True, f"{len(lab.pixels)} of {len(lab.clip.classes)}"

    def bad(lab: Lab) -> tuple[bool, str]:
        """Fire is cold."""
        return False, "hot"

    monkeypatch.setattr(selfcheck, "broken_attack", good)
    monkeypatch.setattr(selfcheck, "RULES", (good, bad))
    model = toy_model(toy)
    verdicts = [verdict[:3] for verdict in selfcheck.selfcheck(model)]
    assert verdicts[:2] == [("Water is wet.", True, "16 of 10"), ("Fire is cold.", False, "hot")]
    assert len(verdicts) == 3
    picture = Image.new("RGB", (32, 32), "red")
    data = LabelledImages(("a", "b", "c"), (0, 1), lambda i: picture, lambda i: b"", "reds")
    assert next(selfcheck.selfcheck(model, data))[2] == "2 of 3"
