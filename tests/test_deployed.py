"""Attacks on the deployed defence: what is attacked, with which gradient, and what is scored."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import TOY_CLASSES, local_backbone, prepared, random_pixels, toy_clip
from torch import Tensor

from tapt.core.attacks import Attack, linf_255
from tapt.core.clip import PromptedClip
from tapt.core.errors import Cancelled
from tapt.core.images import to_float
from tapt.core.prompts import logits
from tapt.core.tuning import TuneConfig, tune
from tapt.core.views import generators, make_views
from tapt.defenses import ImageBatch, PreparedDefense
from tapt.defenses.adaptive import Adaptive, Search
from tapt.defenses.deployed import Deployed, ask, attack_deployed

FEW = Adaptive(pool=2, refresh=2, judging=2, draws=2)
ALONE = FEW.updated(starts=False)
SMALL = {"views": 8, "keep": 0.25, "lr": 0.02}
OWN = ["clip", "static", "ensemble", "tapt"]


def model(defense: PreparedDefense, seeds: list[int], **options: object) -> Deployed:
    return Deployed(defense, generators(seeds), **options)


@pytest.fixture(scope="module")
def tuned(clip: PromptedClip) -> PreparedDefense:
    return prepared(clip, "tapt")


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return random_pixels(3)


@pytest.fixture(scope="module")
def labels(tuned: PreparedDefense, pixels: Tensor) -> Tensor:
    return ask(tuned, pixels, [0, 1, 2], "labels", 4).mean(0).argmax(-1)


def gradient(model: Callable, images: Tensor) -> Tensor:
    images = images.clone().requires_grad_()
    return torch.autograd.grad(model(images)[:, 0].sum(), images)[0]


@pytest.mark.parametrize("name", ["ensemble", "tapt", "flips"])
def test_every_pass_draws_anew_and_a_seed_repeats_it(flips, clip, pixels, name):
    images, defense = to_float(pixels), prepared(clip, name)
    with torch.no_grad():
        one, other = model(defense, [4, 5, 6]), model(defense, [4, 5, 6])
        first, second = one(images), one(images)
        assert not torch.equal(first, second)
        assert torch.equal(other(images), first)
        assert not torch.equal(model(defense, [7, 8, 9])(images), first)
        last = model(defense, [4, 5, 6]).rows(torch.tensor([2]))(images[2:])
    torch.testing.assert_close(first.exp().sum(-1), torch.ones(3))
    torch.testing.assert_close(last[0], first[2], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("design", ["V", "VLI", "VLJ"])
def test_the_gradient_holds_the_tuned_prompts_constant(toy_folder, pixels, design):
    clip = toy_clip(local_backbone(toy_folder, torch.float64), design)
    images = to_float(pixels[:1], torch.float64)
    result = gradient(model(prepared(clip, "tapt"), [3]), images)

    seed = int(torch.randint(2**62, (), generator=generators([3])[0]))
    views = make_views(images[0], SMALL["views"], generator=generators([seed])[0])[None]
    config, statistics = TuneConfig(**SMALL), clip.statistics
    step = tune(
        clip.backbone, clip.prompts, views, clip.texts, statistics=statistics, config=config
    )
    leaf = images.clone().requires_grad_()
    features = clip.texts.features(clip.backbone, step.prompts)
    log_p = logits(clip.backbone, leaf, features, step.prompts).log_softmax(-1)
    expected = torch.autograd.grad(log_p[0, 0], leaf)[0]
    torch.testing.assert_close(result, expected, atol=1e-12, rtol=1e-8)


@pytest.mark.parametrize("name", ["tapt", "ensemble"])
def test_gradients_through_the_surrogates_step_and_the_ensembles_views(toy_folder, pixels, name):
    """Against finite differences."""
    clip = toy_clip(local_backbone(toy_folder, torch.float64))
    images, defense = to_float(pixels[:1], torch.float64), prepared(clip, name)
    through = defense.surrogate_logits if defense.surrogate else defense.logits

    def log_p(images: Tensor) -> Tensor:
        return through(ImageBatch(images, [3])).log_softmax(-1)

    result = gradient(log_p, images)
    constant = gradient(model(prepared(clip, "tapt"), [3]), images)
    assert (result - constant).abs().max() > 1e-3 * constant.abs().max()
    generator = torch.Generator().manual_seed(9)
    direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
    step = 1e-6

    def value(offset: float) -> float:
        with torch.no_grad():
            return float(log_p(images + offset * direction)[0, 0])

    slope = (value(step) - value(-step)) / (2 * step)
    assert float((result * direction).sum()) == pytest.approx(slope, rel=1e-4)


def test_eot_averages_over_the_draws_of_each_image(tuned, pixels):
    images, seeds = to_float(pixels), [4, 5, 6]
    with torch.no_grad():
        together = model(tuned, seeds, draws=3)(images)
        for i, seed in enumerate(seeds):
            alone = model(tuned, [seed])
            rows = torch.cat([alone(images[i : i + 1]) for _ in range(3)])
            torch.testing.assert_close(together[i], rows.mean(0), atol=1e-4, rtol=1e-4)


def test_fewer_images_per_pass_give_the_same(clip, pixels):
    defense, images = prepared(clip, "tapt"), to_float(pixels)
    with torch.no_grad():
        whole = model(defense, [1, 2, 3], draws=2)(images)
        defense.images_per_pass = 1
        parts = model(defense, [1, 2, 3], draws=2)(images)
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [*OWN, "tapt-ensemble", "tpt", "ttc"])
def test_a_state_gives_what_the_defence_gives(clip, pixels, name):
    """And the same for a part of the images."""
    defense, images, seeds = prepared(clip, name), to_float(pixels), [4, 5, 6]
    state = defense.freeze(ImageBatch(images, seeds))
    if not defense.randomised:
        assert state is None
        return
    part = {key: value[1:] for key, value in state.items()}
    with torch.no_grad():
        whole = defense.logits(ImageBatch(images, seeds)).log_softmax(-1)
        frozen = defense.frozen_logits(ImageBatch(images[1:], seeds[1:]), part).log_softmax(-1)
    torch.testing.assert_close(frozen, whole[1:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [*OWN, "flips"])
def test_each_defence_faces_its_own_attack(flips, clip, pixels, labels, name):
    """By gradients alone; nothing is replayed."""
    attack, defense = Attack("pgd", 8 / 255, 6), prepared(clip, name)
    attacked = attack_deployed(defense, pixels, labels, attack, adaptive=ALONE)
    assert linf_255(attacked, pixels).max() <= 8
    before, after = (
        ask(defense, x, [7, 8, 9], "score", 4).mean(0).gather(1, labels[:, None])
        for x in (pixels, attacked)
    )
    assert after.mean() < before.mean() - 0.05


def test_states_live_in_the_pool_for_a_while(tuned, pixels, labels, monkeypatch):
    """The last two, one new at every second step, each passed by every gradient."""
    freezes, passed = [], []
    freeze, frozen_logits = tuned.freeze, tuned.frozen_logits

    def frozen(batch: ImageBatch, **options: object) -> dict[str, Tensor]:
        freezes.append(batch.seeds[0])
        return freeze(batch, **options)

    def noted(batch: ImageBatch, state: dict[str, Tensor]) -> Tensor:
        if batch.images.requires_grad:
            passed.append(freezes.index(batch.seeds[0]))
        return frozen_logits(batch, state)

    monkeypatch.setattr(tuned, "freeze", frozen)
    monkeypatch.setattr(tuned, "frozen_logits", noted)
    attack = Attack("pgd", 1 / 255, 5)
    aims = (labels + 1) % len(TOY_CLASSES)  # which no draw gives: nothing is dropped
    attack_deployed(tuned, pixels[:1], labels[:1], attack, adaptive=ALONE, targets=aims[:1])
    numbers = [freezes.index(seed) for seed in dict.fromkeys(freezes[i] for i in passed)]
    order = [numbers.index(i) for i in passed]
    assert order == [0, 0, 0, 1, 1, 2, 1, 2]  # three steps, then two


def test_the_result_is_no_weaker_than_what_was_replayed(tuned, pixels, labels, monkeypatch):
    """The best candidate of each image counts: here only a replay moves the second image."""
    attack = Attack("pgd", 16 / 255, 8)
    strong = attack_deployed(tuned, pixels, labels, attack, adaptive=FEW)

    def replayed(model: object, given: Tensor, *args: object, images: list[int], **_: object):
        return torch.where(torch.tensor(images)[:, None, None, None] == 1, strong[images], given)

    monkeypatch.setattr("tapt.defenses.adaptive.attack_images", replayed)
    monkeypatch.setattr(Search, "_climb", lambda self, *_: self._judge(self.pixels[self.left]))
    found = attack_deployed(tuned, pixels, labels, attack, adaptive=FEW)
    assert torch.equal(found[1], strong[1])
    assert torch.equal(found[[0, 2]], pixels[[0, 2]])


def test_an_image_that_always_fails_is_left_as_it_is(tuned, pixels, labels, monkeypatch):
    climbed = []
    inner = Search._crops

    def noted(self: Search, images: Tensor, step: int):
        climbed.append([self.numbers[row] for row in self.left])
        return inner(self, images, step)

    monkeypatch.setattr(Search, "_crops", noted)
    wrong = torch.where(torch.arange(3) == 1, (labels + 1) % len(TOY_CLASSES), labels)
    attack_deployed(tuned, pixels, wrong, Attack("pgd", 1 / 255, 1), adaptive=FEW)
    assert climbed == [[0, 2]]


@pytest.mark.parametrize("name", ["apgd", "cw", "autoattack"])
def test_other_attacks_run_on_the_deployed_defence(tuned, pixels, labels, name):
    attack = Attack(name, 8 / 255, 1 if name in ("autoattack", "cw") else 3)
    attacked = attack_deployed(tuned, pixels[:1], labels[:1], attack, adaptive=FEW)
    if name != "cw":
        assert 0 < linf_255(attacked, pixels[:1]).max() <= 8


@pytest.mark.parametrize("name", ["pgd", "square"])
def test_an_image_is_attacked_the_same_whatever_batch_it_is_in(tuned, pixels, labels, name):
    attack, numbers = Attack(name, 8 / 255, 3), [6, 0, 3]
    torch.manual_seed(1)
    batch = attack_deployed(tuned, pixels, labels, attack, adaptive=FEW, images=numbers)
    torch.manual_seed(2)  # never read
    for i, number in enumerate(numbers):
        row = pixels[i : i + 1], labels[i : i + 1]
        alone = attack_deployed(tuned, *row, attack, adaptive=FEW, images=[number])
        assert float((alone == batch[i : i + 1]).float().mean()) > 0.97, i  # rounding in the step


def test_a_query_of_square_is_an_average(tuned, pixels, labels, monkeypatch):
    asked, logits = [], tuned.logits

    def noted(batch: ImageBatch, **options: object) -> Tensor:
        asked.append(batch.seeds)
        return logits(batch, **options)

    monkeypatch.setattr(tuned, "logits", noted)
    attack = Attack("square", 8 / 255, 3)
    attack_deployed(tuned, pixels[:1], labels[:1], attack, adaptive=FEW)
    assert [len(seeds) for seeds in asked] == [2] * 4  # the stripes, and three squares
    assert len({seed for seeds in asked for seed in seeds}) == 8


def test_targets_are_approached(tuned, pixels, labels):
    targets = (labels + 1) % len(TOY_CLASSES)
    attack = Attack("pgd", 8 / 255, 6)
    attacked = attack_deployed(tuned, pixels, labels, attack, adaptive=FEW, targets=targets)
    before, after = (
        ask(tuned, x, [7, 8, 9], "score", 4).mean(0).gather(1, targets[:, None])
        for x in (pixels, attacked)
    )
    assert (after > before).all()


def test_progress_counts_to_the_end_and_can_stop(tuned, pixels, labels):
    calls = []
    attack = Attack("pgd", 1 / 255, 5)
    given = tuned, pixels, labels, attack
    attack_deployed(*given, adaptive=FEW, on_progress=lambda *call: calls.append(call))
    done = [done for done, _ in calls]
    assert done == sorted(done)
    # two replays, crops, surrogate, pool, and judging of each (the pool's twice)
    assert {total for _, total in calls} == {5 + 5 + 5 + 1 + 5 + 6 * 2}
    assert done[-1] == calls[0][1]
    assert max(map(done.count, done)) > 2  # within a pass, too

    def stop(done: int, total: int) -> None:
        if done == 16:
            raise Cancelled("Stopped.")

    with pytest.raises(Cancelled):
        attack_deployed(*given, adaptive=FEW, on_progress=stop)
