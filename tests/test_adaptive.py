"""Attacks on the deployed defence: what is attacked, with which gradient, and what is scored."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import TOY_CLASSES
from torch import Tensor

from tapt import adaptive
from tapt.adaptive import Deployed, ask, attack_deployed, attack_seconds
from tapt.attacks import ATTACKS, AttackConfig, attack_images, linf_255
from tapt.backbone import Backbone, load_backbone
from tapt.compare import compare
from tapt.defense import Defender, make_defender
from tapt.errors import Cancelled, InputError
from tapt.images import to_float, to_picture
from tapt.losses import Statistics, TokenStatistics
from tapt.pack import Pack, base_model, statistics_shapes
from tapt.prompts import DESIGNS, PromptConfig, init_prompts, logits
from tapt.tuning import TuneConfig, tune
from tapt.views import make_views

CONFIG = TuneConfig(views=8, keep=0.25, lr=0.02)


def toy_defender(backbone: Backbone, design: str = "VLI") -> Defender:
    prompts = init_prompts(backbone, PromptConfig(design, 2, 3), seed=1)
    generator = torch.Generator().manual_seed(2)
    shapes = statistics_shapes(backbone, prompts.config).values()
    values = [torch.rand(shape, generator=generator) for shape in shapes]
    targets = Statistics(TokenStatistics(*values[:2]), TokenStatistics(*values[2:]))
    pack = Pack(prompts, targets, CONFIG, "toy", base_model(backbone))
    return make_defender(backbone, pack, TOY_CLASSES)


@pytest.fixture(scope="module")
def defender(toy: Backbone) -> Defender:
    return toy_defender(toy)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def labels(defender: Defender, pixels: Tensor) -> Tensor:
    return ask(defender, "tapt", pixels, 4, 0).mean(0).argmax(-1)


def gradient(model: Deployed, images: Tensor) -> Tensor:
    images = images.clone().requires_grad_()
    return torch.autograd.grad(model(images)[:, 0].sum(), images)[0]


@pytest.mark.parametrize("defense", ["ensemble", "tapt"])
def test_every_pass_draws_fresh_views_and_a_seed_repeats_them(defender, pixels, defense):
    images = to_float(pixels)
    with torch.no_grad():
        one, other = Deployed(defender, defense), Deployed(defender, defense)
        first, second = one(images), one(images)
        assert not torch.equal(first, second)
        assert torch.equal(other(images), first)
        assert not torch.equal(Deployed(defender, defense, seed=1)(images), first)
    torch.testing.assert_close(first.exp().sum(-1), torch.ones(3))


@pytest.mark.parametrize("defense", ["clip", "static", "ensemble", "tapt"])
def test_the_model_answers_as_the_defence_does(defender, pixels, defense):
    """With the same views."""
    model = Deployed(defender, defense, seed=5)
    with torch.no_grad():
        got = model(to_float(pixels[:1])).exp()
    if defense == "clip":
        expected = defender.clip(pixels[:1])
    else:
        expected = defender.defend(pixels[:1], seeds=[5]).probabilities[defense]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("design", DESIGNS)
def test_the_gradient_holds_the_tuned_prompts_constant(toy_folder, pixels, design):
    backbone = load_backbone(f"local-dir:{toy_folder}", device="cpu", dtype=torch.float64)
    defender = toy_defender(backbone, design)
    images = to_float(pixels[:1], torch.float64)
    got = gradient(Deployed(defender, "tapt", seed=3), images)

    views = make_views(images[0], CONFIG.views, generator=torch.Generator().manual_seed(3))[None]
    pack = defender.pack
    tuned = tune(
        backbone,
        pack.prompts,
        views,
        defender.prompted,
        statistics=pack.statistics,
        config=CONFIG,
    )
    leaf = images.clone().requires_grad_()
    features = defender.prompted.features(backbone, tuned.prompts)
    log_p = logits(backbone, leaf, features, tuned.prompts).log_softmax(-1)
    expected = torch.autograd.grad(log_p[0, 0], leaf)[0]
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-8)


@pytest.mark.parametrize("defense", ["tapt", "ensemble"])
def test_gradients_through_the_surrogates_step_and_the_ensembles_views(toy_folder, pixels, defense):
    """Against finite differences."""
    backbone = load_backbone(f"local-dir:{toy_folder}", device="cpu", dtype=torch.float64)
    defender, smooth = toy_defender(backbone), defense == "tapt"
    images = to_float(pixels[:1], torch.float64)
    got = gradient(Deployed(defender, defense, smooth=smooth, seed=3), images)
    held = gradient(Deployed(defender, "tapt", seed=3), images)
    assert (got - held).abs().max() > 1e-3 * held.abs().max()
    generator = torch.Generator().manual_seed(9)
    direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
    step = 1e-6

    def value(offset: float) -> float:
        model = Deployed(defender, defense, smooth=smooth, seed=3)
        with torch.no_grad():
            return float(model(images + offset * direction)[0, 0])

    slope = (value(step) - value(-step)) / (2 * step)
    assert float((got * direction).sum()) == pytest.approx(slope, rel=1e-4)


def test_eot_averages_over_the_draws(defender, pixels):
    images = to_float(pixels)
    several = Deployed(defender, "tapt", draws=3, seed=4)
    with torch.no_grad():
        together = several(images)
        single = Deployed(defender, "tapt", seed=4)
        apart = [[single(x[None])[0] for _ in range(3)] for x in images]
    expected = torch.stack([torch.stack(rows).mean(0) for rows in apart])
    torch.testing.assert_close(together, expected, atol=1e-4, rtol=1e-4)


def test_fewer_images_per_pass_give_the_same(defender, pixels, monkeypatch):
    with torch.no_grad():
        whole = Deployed(defender, "tapt", draws=2)(to_float(pixels))
        monkeypatch.setattr(adaptive, "images_per_pass", lambda *_: 1)
        parts = Deployed(defender, "tapt", draws=2)(to_float(pixels))
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("defense", ["clip", "static", "ensemble", "tapt"])
def test_each_defence_faces_its_own_attack(defender, pixels, labels, defense):
    attack = AttackConfig("pgd", 8 / 255, 6)
    attacked = attack_deployed(defender, defense, pixels, labels, attack, draws=2)
    assert linf_255(attacked, pixels).max() <= 8
    before, after = (
        ask(defender, defense, x, 4, 1).mean(0).gather(1, labels[:, None])
        for x in (pixels, attacked)
    )
    assert (after < before).all()
    if defense in ("clip", "static"):
        alone = attack_images(defender.classifier(defense), pixels, labels, attack)
        assert float((alone == attacked).float().mean()) > 0.999


@pytest.mark.parametrize("name", list(ATTACKS))
def test_every_attack_runs_on_the_deployed_defence(defender, pixels, labels, name):
    attack = AttackConfig(name, 8 / 255, 1 if name in ("autoattack", "cw") else 3)
    attacked = attack_deployed(defender, "tapt", pixels[:1], labels[:1], attack, draws=1)
    if name == "pgd":
        again = attack_deployed(defender, "tapt", pixels[:1], labels[:1], attack, draws=1)
        assert torch.equal(attacked, again)
    if name != "cw":
        assert linf_255(attacked, pixels[:1]).max() <= 8


def test_the_stronger_image_counts(defender, pixels, labels, monkeypatch):
    """One attack gives strong images for even places, the other for odd ones."""
    strong = attack_deployed(
        defender, "tapt", pixels, labels, AttackConfig("pgd", 16 / 255, 8), draws=2
    )
    even = (torch.arange(3) % 2 == 0)[:, None, None, None]

    def found(model: Deployed, *args: object, **options: object) -> Tensor:
        return torch.where(even ^ model.smooth, strong, pixels)

    monkeypatch.setattr(adaptive, "attack_images", found)
    chosen = attack_deployed(defender, "tapt", pixels, labels, AttackConfig(), draws=2)
    assert torch.equal(chosen, strong)


def test_targets_are_approached(defender, pixels, labels):
    targets = (labels + 1) % len(TOY_CLASSES)
    attack = AttackConfig("pgd", 8 / 255, 6)
    attacked = attack_deployed(defender, "tapt", pixels, labels, attack, draws=2, targets=targets)
    before, after = (
        ask(defender, "tapt", x, 4, 1).mean(0).gather(1, targets[:, None])
        for x in (pixels, attacked)
    )
    assert (after > before).all()


def test_progress_covers_both_attacks_and_can_stop(defender, pixels, labels):
    calls = []

    def report(done: int, total: int) -> None:
        calls.append((done, total))
        if done == 4:
            raise Cancelled("Stopped.")

    with pytest.raises(Cancelled):
        attack_deployed(
            defender, "tapt", pixels, labels, AttackConfig(steps=3), draws=1, on_progress=report
        )
    done = [done for done, _ in calls]
    assert sorted(set(done)) == [0, 1, 2, 3, 4]
    assert done == sorted(done)
    assert done.count(1) > 2  # within a pass, too
    assert {total for _, total in calls} == {6}


def test_the_estimate_grows_with_the_work(defender):
    few, many = (
        attack_seconds(defender, "tapt", AttackConfig(steps=steps), draws=1) for steps in (1, 200)
    )
    assert many > 5 * few > 0


def test_compare_attacks_the_deployed_defence(defender, pixels):
    attack = AttackConfig("pgd", 8 / 255, 4)
    image = to_picture(pixels[0])
    result = compare(defender, image, attack=attack, threat="adaptive", draws=2)
    labels = torch.tensor([result.label])
    expected = attack_deployed(defender, "tapt", pixels[:1], labels, attack, draws=2)
    assert torch.equal(result.attacked, expected[0])
    assert result.settings["threat"] == "adaptive"
    assert result.settings["draws"] == 2
    with pytest.raises(InputError, match="square needs the attack square"):
        compare(defender, image, attack=attack, threat="square")
    square = replace(attack, name="square")
    assert compare(defender, image, attack=square, threat="square").linf_255 <= 8
