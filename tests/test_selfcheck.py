"""Every rule of the self-check holds for the harness and fails for a broken one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import TOY_CLASSES
from torch import Tensor

from tapt import selfcheck
from tapt.__main__ import main
from tapt.adaptive import attack_deployed
from tapt.attacks import AttackConfig, attack_images
from tapt.backbone import Backbone, load_backbone
from tapt.defense import make_defender
from tapt.pack import Pack, base_model
from tapt.prompts import PromptConfig, init_prompts
from tapt.selfcheck import BROKEN, RULES, Lab, broken_attack, example_pixels
from tapt.tuning import TuneConfig


def lab_on(backbone: Backbone) -> Lab:
    prompts = init_prompts(backbone, PromptConfig("VLI", 2, 3), seed=1)
    pack = Pack(prompts, None, TuneConfig(lr=0.005), "toy", base_model(backbone))
    defender = make_defender(backbone, pack, TOY_CLASSES)
    return Lab(defender, example_pixels(defender, 10))


@pytest.fixture(scope="module")
def lab(toy: Backbone) -> Lab:
    return lab_on(toy)


def broken(change: Callable[[AttackConfig], bool]) -> dict[str, Callable]:
    """Attacks that do nothing where `change` says so."""

    def attack(classifier, pixels: Tensor, labels: Tensor, config: AttackConfig) -> Tensor:
        return pixels if change(config) else attack_images(classifier, pixels, labels, config)

    def deployed(defender, defense, pixels, labels, settings, **options: object) -> Tensor:
        if change(settings):
            return pixels
        return attack_deployed(defender, defense, pixels, labels, settings, **options)

    return {"attack": attack, "deployed": deployed}


@pytest.mark.parametrize("rule", [*RULES, broken_attack], ids=lambda rule: rule.__name__)
def test_every_rule_holds_for_the_harness(lab: Lab, rule):
    passed, seen = rule(lab)
    assert passed, seen


FAULTS = {
    "large_epsilon": lambda config: True,
    "more_steps": lambda config: config.steps > 5,
    "autoattack": lambda config: config.name == "autoattack",
    "black_box": lambda config: config.name == "pgd",
}


@pytest.mark.parametrize("name", list(FAULTS))
def test_a_rule_fails_for_an_attack_that_gives_up(lab: Lab, name: str, monkeypatch):
    monkeypatch.setattr(selfcheck, "SMALL", 16 / 255)  # so that a working attack succeeds here
    monkeypatch.setattr(selfcheck, "MIDDLE", 64 / 255)
    rule = getattr(selfcheck, name)
    passed, seen = rule(replace(lab, **broken(FAULTS[name])))
    assert not passed, seen
    assert "%" in seen


def test_deployed_defences_are_checked_under_a_large_epsilon(lab: Lab):
    nothing = broken(lambda config: True)["deployed"]
    passed, seen = selfcheck.large_epsilon(replace(lab, deployed=nothing))
    assert not passed
    assert "tapt" in seen


@pytest.mark.parametrize("shift", [-1, 1])
def test_the_rounding_rule_fails_for_a_shifted_ball(lab: Lab, shift: int):
    def attack(*arguments: object) -> Tensor:
        return (attack_images(*arguments).int() + shift).clamp(0, 255).to(torch.uint8)

    passed, seen = selfcheck.rounding(replace(lab, attack=attack))
    assert not passed
    assert "leaves the ball" in seen


def test_the_rounding_rule_fails_for_an_attack_that_stays_short(lab: Lab):
    def attack(classifier, pixels: Tensor, *rest: object) -> Tensor:
        change = attack_images(classifier, pixels, *rest).int() - pixels.int()
        return (pixels.int() + change.clamp(-3, 2)).to(torch.uint8)

    passed, seen = selfcheck.rounding(replace(lab, attack=attack))
    assert not passed
    assert "moves from -3 to 2 of 3" in seen


def test_the_model_rule_fails_for_other_sentences_and_types(lab: Lab, toy_folder):
    other = make_defender(lab.defender.backbone, lab.defender.pack, ["bus", "tree", "fish"])
    wrong = replace(lab.defender, static_features=other.static_features)
    passed, _ = selfcheck.same_model(replace(lab, defender=wrong))
    assert not passed
    double = lab_on(load_backbone(f"local-dir:{toy_folder}", device="cpu", dtype=torch.float64))
    passed, _ = selfcheck.same_model(double)
    assert not passed


def test_the_broken_attacks_must_be_caught(lab: Lab, monkeypatch):
    for name in ("large_epsilon", "rounding"):
        monkeypatch.setattr(selfcheck, name, lambda lab: (True, "anything goes"))
    passed, seen = broken_attack(lab)
    assert not passed
    assert all(name in seen for name in BROKEN)


def test_the_command_prints_a_verdict_per_rule(toy_folder, monkeypatch, capsys):
    def good(lab: Lab) -> tuple[bool, str]:
        """Water is wet."""
        return True, "wet"

    def bad(lab: Lab) -> tuple[bool, str]:
        """Fire is cold."""
        return False, "hot"

    command = ["selfcheck", "--backbone", f"local-dir:{toy_folder}", "--device", "cpu"]
    monkeypatch.setattr(selfcheck, "broken_attack", good)
    monkeypatch.setattr(selfcheck, "RULES", (good,))
    assert main(command) == 0
    assert "All rules hold." in capsys.readouterr().out
    monkeypatch.setattr(selfcheck, "RULES", (good, bad))
    assert main(command) == 1
    out = capsys.readouterr().out
    assert "pass  Water is wet." in out
    assert "FAIL  Fire is cold." in out
    assert "1 of 3 rules fail." in out
