"""Batches of an evaluation: how they are cut, and which draws of the views score them."""

from __future__ import annotations

import pytest
import torch
from conftest import TOY_CLASSES

from tapt import adaptive, panel
from tapt.adaptive import Deployed
from tapt.attacks import AttackConfig
from tapt.backbone import Backbone
from tapt.defense import make_defender
from tapt.pack import Pack, base_model
from tapt.panel import Condition, Panel, make_units
from tapt.prompts import PromptConfig, init_prompts
from tapt.tuning import TuneConfig

CONFIG = TuneConfig(views=4, keep=0.5, lr=0.02)


def toy_panel(toy: Backbone, design: str = "V") -> Panel:
    prompts = init_prompts(toy, PromptConfig(design, 2, 3), seed=1)
    pack = Pack(prompts, None, CONFIG, "toy", base_model(toy))
    defender = make_defender(toy, pack, TOY_CLASSES, template="a drawing of a {}.")
    return Panel(defender, CONFIG, seed=3, draws=2, rescore=5)


def test_batches_are_cut_by_image_and_smaller_where_every_image_is_drawn_often():
    attack = AttackConfig("pgd", 2 / 255, 1)
    conditions = [Condition(None, None, ("clip",)), Condition("adaptive", attack, ("clip",))]
    clean, adapted = (
        [(unit.number, list(unit.images)) for unit in make_units([c], 5, 4, 2)] for c in conditions
    )
    assert clean == [(0, [0, 1, 2, 3]), (1, [4])]
    assert adapted == [(0, [0, 1]), (1, [2, 3]), (2, [4])]
    assert len(make_units(conditions, 5, 4, 2)) == 5


@pytest.mark.parametrize("defense", ["ensemble", "tapt", "random-start"])
@pytest.mark.parametrize("threat", ["square", "adaptive"])
def test_the_draws_that_score_are_neither_the_attacks_nor_its_judges(
    toy: Backbone, monkeypatch: pytest.MonkeyPatch, threat: str, defense: str
):
    """Every model that draws views starts from a seed of its own."""
    drawn: list[tuple[str, int]] = []
    phase = "attack"

    class Noted(Deployed):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **options)
            drawn.append((phase, self.generator.initial_seed()))

    def scoring(*args: object, **options: object) -> torch.Tensor:
        nonlocal phase
        phase = "score"
        assert args[3] == 5
        return adaptive.ask(*args, **options)

    monkeypatch.setattr(adaptive, "Deployed", Noted)
    monkeypatch.setattr(adaptive, "JUDGING_DRAWS", 1)
    monkeypatch.setattr(panel, "ask", scoring)
    attack = AttackConfig("square" if threat == "square" else "pgd", 8 / 255, 1)
    seeds = []
    for unit in make_units([Condition(threat, attack, (defense,))], 2, 1, 1):
        drawn.clear()
        phase = "attack"
        pixels = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)
        (record,) = toy_panel(toy).records(unit, pixels, torch.tensor([0]))
        share = 5 * record["right"][defense]
        assert share == pytest.approx(round(share), abs=1e-5)
        attacking = [seed for when, seed in drawn if when == "attack"]
        (score,) = (seed for when, seed in drawn if when == "score")
        judged = threat == "adaptive" and defense != "ensemble"
        assert len(set(attacking)) == (2 if judged else 1)  # both attacks, then both judged
        assert score not in attacking
        seeds.append(score)
    assert len(set(seeds)) == 2  # another batch, other draws


def test_all_defences_know_the_same_classes_in_the_same_sentence(toy: Backbone):
    one = toy_panel(toy)
    other = one.random_start
    assert other.classes == one.defender.classes
    assert other.template == one.defender.template == "a drawing of a {}."
    assert torch.equal(other.vanilla.tokens, one.defender.vanilla.tokens)
    assert not torch.equal(
        other.pack.prompts.tensors["visual"], one.defender.pack.prompts.tensors["visual"]
    )
