"""Attacks: the ball in integers, determinism, targets, progress, and what is refused."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchattacks
from conftest import TOY_CLASSES
from torch import Tensor, nn
from torchattacks.attack import Attack as TorchAttack

from tapt.attacks import (
    ATTACKS,
    AttackConfig,
    Classifier,
    _Rounded,
    _Watched,
    attack_images,
    l2_norm,
    linf_255,
)
from tapt.backbone import Backbone, load_backbone
from tapt.errors import Cancelled, InputError
from tapt.images import to_float
from tapt.prompts import PromptConfig, class_texts, init_prompts, logits

CONFIG = AttackConfig(epsilon=4 / 255, steps=5)


@pytest.fixture(scope="module")
def classifier(toy: Backbone) -> Classifier:
    return Classifier(toy, class_texts(toy, TOY_CLASSES).fixed)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    """Noise with a black and a white border, where the ball leaves the 8-bit range."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator)
    noise[:, :, :4], noise[:, :, -4:] = 0, 255
    return noise


@pytest.fixture(scope="module")
def labels(classifier: Classifier, pixels: Tensor) -> Tensor:
    return classifier(to_float(pixels)).argmax(-1)


def probabilities(classifier: Classifier, pixels: Tensor, classes: Tensor) -> Tensor:
    with torch.no_grad():
        every = classifier(to_float(pixels)).softmax(-1)
    return every.gather(1, classes[:, None])[:, 0]


@pytest.mark.parametrize("epsilon", [1, 4, 16])
@pytest.mark.parametrize("step_size", [None, 0.5], ids=["default-step", "huge-step"])
def test_the_attacked_image_is_eight_bit_and_inside_the_ball(
    classifier, pixels, labels, epsilon: int, step_size: float | None
):
    config = replace(CONFIG, epsilon=epsilon / 255, step_size=step_size)
    given = pixels.clone()
    attacked = attack_images(classifier, pixels, labels, config)
    assert attacked.dtype == torch.uint8
    assert attacked.shape == pixels.shape
    assert attacked.device == pixels.device
    assert linf_255(attacked, pixels).tolist() == [epsilon] * 4
    assert torch.equal(pixels, given)


def test_linf_counts_both_directions():
    one, other = torch.zeros(2, 3, 2, 2, dtype=torch.uint8), torch.zeros(2, 3, 2, 2).byte()
    one[0, 1, 0, 0], other[1, 2, 1, 1] = 255, 7
    assert linf_255(one, other).tolist() == linf_255(other, one).tolist() == [255, 7]


@pytest.mark.parametrize(
    ("epsilon", "whole"),
    [(4.9 / 255, 4), (0.03, 7), (1 / 255, 1), (8 / 255, 8), (0.0039, None), (1.0, 255)],
)
def test_epsilon_is_rounded_down_to_whole_steps(
    classifier, pixels, labels, epsilon: float, whole: int | None
):
    if whole is None:
        with pytest.raises(
            InputError, match=r"epsilon must be a number from 1/255 to 1, got 0\.0039"
        ):
            AttackConfig(epsilon=epsilon)
        return
    config = AttackConfig(epsilon=epsilon, steps=1)
    assert config.epsilon_255 == whole
    assert config.step == pytest.approx(2.5 * whole / 255)
    assert linf_255(attack_images(classifier, pixels, labels, config), pixels).max() == whole


def test_every_whole_epsilon_is_exact():
    assert [AttackConfig(epsilon=k / 255).epsilon_255 for k in range(1, 256)] == [*range(1, 256)]


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"name": "no-such"}, ["attack", "one of pgd", "'no-such'"]),
        ({"epsilon": 0}, ["epsilon", "from 1/255 to 1", "0"]),
        ({"epsilon": 2}, ["epsilon", "from 1/255 to 1", "2"]),
        ({"epsilon": float("nan")}, ["epsilon", "number", "nan"]),
        ({"epsilon": "4"}, ["epsilon", "number", "'4'"]),
        ({"epsilon": 10**400}, ["epsilon", "number"]),
        ({"steps": 0}, ["steps", "from 1 to 10000", "0"]),
        ({"steps": 10_001}, ["steps", "from 1 to 10000", "10001"]),
        ({"steps": 1.5}, ["steps", "whole number", "1.5"]),
        ({"steps": True}, ["steps", "whole number", "True"]),
        ({"step_size": 0.0}, ["step_size", "above 0", "0.0"]),
        ({"step_size": float("inf")}, ["step_size", "at most 1", "inf"]),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, parts: list[str]):
    with pytest.raises(InputError) as error:
        AttackConfig(**settings)
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_a_seed_decides_and_the_global_state_stays(classifier, pixels, labels):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = attack_images(classifier, pixels, labels, CONFIG)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(attack_images(classifier, pixels, labels, CONFIG), one)
    other = attack_images(classifier, pixels, labels, replace(CONFIG, seed=1))
    assert not torch.equal(other, one)
    still = [
        attack_images(classifier, pixels, labels, replace(CONFIG, seed=s, random_start=False))
        for s in (0, 1)
    ]
    assert torch.equal(*still)


def test_it_is_projected_gradient_ascent(classifier, pixels, labels):
    """Two steps without a random start, written down once more."""
    config = AttackConfig(epsilon=4 / 255, steps=2, step_size=3 / 255, random_start=False)
    images, current = to_float(pixels), to_float(pixels)
    for _ in range(2):
        current = current.detach().requires_grad_()
        loss = torch.nn.functional.cross_entropy(classifier(current), labels)
        gradient = torch.autograd.grad(loss, current)[0]
        moved = current + 3 / 255 * gradient.sign()
        current = torch.clamp(moved, images - 4 / 255, images + 4 / 255).clamp(0, 1)
    expected = (current * 255).round().to(torch.uint8)
    attacked = attack_images(classifier, pixels, labels, config)
    assert float((attacked == expected).float().mean()) > 0.999  # a gradient may be about 0


def test_stronger_attacks_do_more(classifier, pixels, labels):
    before = probabilities(classifier, pixels, labels)

    def after(epsilon: int, steps: int) -> Tensor:
        config = AttackConfig(epsilon=epsilon / 255, steps=steps)
        attacked = attack_images(classifier, pixels, labels, config)
        return probabilities(classifier, attacked, labels)

    assert (after(1, 10) < before).all()
    assert (after(8, 10) < after(1, 10)).all()
    assert after(8, 10).mean() < after(8, 1).mean()
    huge = attack_images(classifier, pixels, labels, AttackConfig(epsilon=32 / 255, steps=20))
    assert (classifier(to_float(huge)).argmax(-1) != labels).all()


def test_a_target_is_approached(classifier, pixels, labels):
    targets = (labels + 1) % len(TOY_CLASSES)
    untargeted = attack_images(classifier, pixels, labels, CONFIG)
    targeted = attack_images(classifier, pixels, labels, CONFIG, targets=targets)
    clean = probabilities(classifier, pixels, targets)
    assert (probabilities(classifier, targeted, targets) > clean).all()
    assert (
        probabilities(classifier, targeted, targets)
        >= probabilities(classifier, untargeted, targets) - 1e-6
    ).all()
    third = (labels + 2) % len(TOY_CLASSES)
    other = attack_images(classifier, pixels, labels, CONFIG, targets=third)
    assert (
        probabilities(classifier, other, third) > probabilities(classifier, targeted, third)
    ).all()
    assert linf_255(targeted, pixels).tolist() == [4] * 4


def test_progress_counts_steps(classifier, pixels, labels):
    calls: list[tuple[int, int]] = []
    attack_images(classifier, pixels, labels, CONFIG, on_progress=lambda *call: calls.append(call))
    assert calls == [(0, 5), (1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


def test_the_progress_callback_stops_it_and_leaves_nothing_behind(classifier, pixels, labels):
    expected = attack_images(classifier, pixels, labels, CONFIG)
    state = torch.get_rng_state()
    calls = []

    def report(done: int, total: int) -> None:
        calls.append(done)
        if done == 2:
            raise Cancelled("Stopped.")

    with pytest.raises(Cancelled):
        attack_images(classifier, pixels, labels, CONFIG, on_progress=report)
    assert calls == [0, 1, 2]
    assert torch.equal(torch.get_rng_state(), state)
    assert not classifier.backbone.model.training
    assert torch.equal(attack_images(classifier, pixels, labels, CONFIG), expected)


def test_the_model_stays_in_eval_mode_without_gradients(toy, classifier, pixels, labels):
    attack_images(classifier, pixels, labels, CONFIG)
    assert not any(m.training for m in classifier.modules())
    assert all(p.grad is None and not p.requires_grad for p in toy.model.parameters())


def test_two_threads_at_once_get_what_one_gets(classifier, pixels, labels):
    configs = [replace(CONFIG, seed=seed) for seed in (3, 4)]
    expected = [attack_images(classifier, pixels, labels, c) for c in configs]
    results: list[Tensor | None] = [None, None]
    barrier = threading.Barrier(2)

    def work(index: int) -> None:
        barrier.wait(timeout=60)
        results[index] = attack_images(classifier, pixels, labels, configs[index])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for result, wanted in zip(results, expected, strict=True):
        same = (result == wanted).float().mean()
        assert float(same) > 0.999  # a thread may add in another order


def test_it_works_inside_no_grad_and_under_another_default_device(classifier, pixels, labels):
    expected = attack_images(classifier, pixels, labels, CONFIG)
    with torch.device("meta"), torch.no_grad():
        inside = attack_images(classifier, pixels, labels, CONFIG)
        largest = linf_255(inside, pixels)
    assert largest.tolist() == [4] * 4
    assert float((inside == expected).float().mean()) > 0.999


def test_other_types_than_float32_are_refused(toy_folder: Path, pixels, labels):
    backbone = load_backbone(f"local-dir:{toy_folder}", device="cpu", dtype=torch.bfloat16)
    classifier = Classifier(backbone, class_texts(backbone, TOY_CLASSES).fixed)
    with pytest.raises(InputError, match=r"float32: load the backbone with dtype=torch\.float32"):
        attack_images(classifier, pixels, labels, CONFIG)


def test_the_classifier_runs_with_prompts(toy: Backbone, pixels: Tensor):
    config = PromptConfig("VLI", 2, 3)
    prompts = init_prompts(toy, config)
    features = class_texts(toy, TOY_CLASSES, config).features(toy, prompts)
    prompted = Classifier(toy, features, prompts)
    expected = logits(toy, to_float(pixels), features, prompts)
    assert torch.equal(prompted(to_float(pixels)), expected.detach())
    labels = expected.argmax(-1)
    attacked = attack_images(prompted, pixels, labels, replace(CONFIG, epsilon=16 / 255))
    assert (
        probabilities(prompted, attacked, labels) < probabilities(prompted, pixels, labels)
    ).all()


def test_the_config_names_its_step_size():
    config = AttackConfig(epsilon=4.5 / 255, steps=10)
    assert config.to_dict()["step_size"] == pytest.approx(2.5 * 4 / 255 / 10)
    assert AttackConfig(step_size=0.01).to_dict()["step_size"] == 0.01


SHORT = {"cw": 25, "square": 60, "autoattack": 3}
EVERY = [AttackConfig(name, 8 / 255, SHORT.get(name, 10)) for name in ATTACKS]


def margins(classifier: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
    """Logit of the true class above the best other one; negative where fooled."""
    with torch.no_grad():
        values = classifier(to_float(pixels))
    true = values.gather(1, labels[:, None])[:, 0]
    others = values.scatter(1, labels[:, None], -torch.inf).amax(1)
    return true - others


@pytest.fixture(params=EVERY, ids=lambda config: config.name)
def config(request: pytest.FixtureRequest) -> AttackConfig:
    return request.param


def test_every_attack_hurts_inside_its_ball(config, classifier, pixels, labels):
    state, given = torch.get_rng_state(), pixels.clone()
    attacked = attack_images(classifier, pixels, labels, config)
    assert attacked.dtype == torch.uint8
    assert torch.equal(pixels, given)
    assert torch.equal(torch.get_rng_state(), state)
    before, after = (margins(classifier, x, labels) for x in (pixels, attacked))
    if config.name in ("cw", "autoattack"):  # they leave an image that they cannot fool
        assert (after <= before).all()
        assert (after < 0).any()
    else:
        assert (after < before).all()
    if config.attack.norm == "Linf":
        assert linf_255(attacked, pixels).max() <= 8
    assert torch.equal(attack_images(classifier, pixels, labels, config), attacked)


def test_every_attack_aims_at_a_class_or_says_that_it_cannot(config, classifier, pixels, labels):
    targets = (labels + 1) % len(TOY_CLASSES)
    if not config.attack.targeted:
        with pytest.raises(InputError, match=f"{config.attack.title} cannot aim at a class"):
            attack_images(classifier, pixels, labels, config, targets=targets)
        return
    attacked = attack_images(classifier, pixels, labels, config, targets=targets)
    before, after = (margins(classifier, x, targets) for x in (pixels, attacked))
    assert (after >= before).all()
    assert after.mean() > before.mean()


def test_every_attack_counts_up_and_stops_at_once(config, classifier, pixels, labels):
    calls: list[tuple[int, int]] = []

    def report(done: int, total: int) -> None:
        calls.append((done, total))
        if stop is not None and done == stop:
            raise Cancelled("Stopped.")

    stop = None
    attack_images(classifier, pixels, labels, config, on_progress=report)
    done, totals = zip(*calls, strict=True)
    assert len(set(totals)) == 1
    assert list(done) == sorted(done)
    assert done[0] == 0
    assert done[-1] == totals[0]
    calls.clear()
    stop, state = 3, torch.get_rng_state()
    with pytest.raises(Cancelled):
        attack_images(classifier, pixels, labels, config, on_progress=report)
    assert len(calls) == 4
    assert torch.equal(torch.get_rng_state(), state)


def test_every_attack_runs_inside_no_grad_under_another_default_device(
    config, classifier, pixels, labels
):
    expected = attack_images(classifier, pixels, labels, config)
    with torch.device("meta"), torch.no_grad():
        inside = attack_images(classifier, pixels, labels, config)
    assert float((inside == expected).float().mean()) > 0.999


@pytest.mark.parametrize("count", [2, 3, 4, 10])
def test_autoattack_works_with_few_classes_and_beats_pgd(toy: Backbone, pixels: Tensor, count: int):
    names = [f"class {i}" for i in range(count)]
    classifier = Classifier(toy, class_texts(toy, names).fixed)
    labels = classifier(to_float(pixels)).argmax(-1)
    fooled = {}
    for name in ("pgd", "autoattack"):
        config = AttackConfig(name, 3 / 255, 5)
        attacked = attack_images(classifier, pixels, labels, config)
        fooled[name] = margins(classifier, attacked, labels) < 0
        assert linf_255(attacked, pixels).max() <= 3
    assert fooled["autoattack"].sum() >= fooled["pgd"].sum()


def test_autoattack_has_full_budgets(classifier):
    """torchattacks' own AutoAttack stops after 10 steps, whatever it is told."""
    watched = _Watched(classifier, lambda done: None)
    watched.classes = 10
    whole = ATTACKS["autoattack"].build(watched, AttackConfig("autoattack"))
    apgd, targeted, fab, square = (rounded.inner for rounded in whole.attacks)
    assert (apgd.steps, targeted.steps, fab.steps, square.n_queries) == (100, 100, 100, 5000)
    assert targeted.n_target_classes == fab.n_target_classes == 9
    assert fab.multi_targeted
    watched.classes = 1000
    whole = ATTACKS["autoattack"].build(watched, AttackConfig("autoattack"))
    assert whole.attacks[1].inner.n_target_classes == 9


def test_autoattack_goes_on_where_rounding_saves_an_image(toy: Backbone):
    """The first attack moves by less than half a grey level: nothing is left after rounding."""

    class Bright(nn.Module):
        """Answers 1 where the picture is brighter than it was."""

        backbone, classes = toy, 2

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1000.0))

        def forward(self, images: Tensor) -> Tensor:
            excess = self.scale * (images.mean((1, 2, 3)) - 0.5 - 0.1 / 255)
            return torch.stack([-excess, excess], 1)

    pixels = torch.full((1, 3, 32, 32), 127, dtype=torch.uint8)
    pixels[:, :, ::2] = 128  # mean 127.5
    model, labels = Bright(), torch.tensor([0])
    watched = _Watched(model, lambda done: None)

    class Faint(TorchAttack):
        def forward(self, images: Tensor, labels: Tensor) -> Tensor:
            return images + 0.3 / 255

    rest = ATTACKS["pgd"].build(watched, AttackConfig(epsilon=1 / 255, steps=2))
    both = torchattacks.MultiAttack([_Rounded(Faint("faint", watched)), _Rounded(rest)])
    assert model(to_float(pixels) + 0.3 / 255).argmax(1) == 1
    assert model(both(to_float(pixels), labels)).argmax(1) == 1


def test_cw_reports_its_own_size(classifier, pixels, labels):
    config = AttackConfig("cw", steps=40)
    assert config.epsilon_255 is None
    assert config.to_dict()["epsilon"] is None
    attacked = attack_images(classifier, pixels, labels, config)
    fooled = margins(classifier, attacked, labels) < 0
    assert fooled.all()
    assert (l2_norm(attacked, pixels) > 0).all()
    whole_ball = attack_images(classifier, pixels, labels, AttackConfig(epsilon=8 / 255))
    assert (l2_norm(attacked, pixels) < l2_norm(whole_ball, pixels)).all()


def test_cw_moves_black_and_white(classifier, pixels, labels):
    """Exact 0 and 1 are at infinity in the tanh space of the original attack."""
    white = torch.full_like(pixels, 255)
    labels = classifier(to_float(white)).argmax(-1)
    attacked = attack_images(classifier, white, labels, AttackConfig("cw", steps=100))
    assert (margins(classifier, attacked, labels) < 0).all()


def test_l2_by_hand():
    one, other = (torch.zeros(1, 3, 2, 2, dtype=torch.uint8) for _ in range(2))
    one[0, 0, 0, 0], other[0, 1, 0, 0] = 255, 51
    assert l2_norm(one, other).tolist() == pytest.approx([(1 + 0.04) ** 0.5])


def test_square_asks_for_answers_only(classifier, pixels, labels):
    class NoGradients(nn.Module):
        backbone, classes = classifier.backbone, classifier.classes

        def __init__(self) -> None:
            super().__init__()
            self.inner = classifier

        @torch.no_grad()
        def forward(self, images: Tensor) -> Tensor:
            return self.inner(images)

    config = AttackConfig("square", 8 / 255, 30)
    expected = attack_images(classifier, pixels, labels, config)
    assert torch.equal(attack_images(NoGradients(), pixels, labels, config), expected)


def test_a_vanished_gradient_leaves_the_image(toy: Backbone, pixels: Tensor):
    """DI and TI would divide 0 by 0."""

    class Constant(nn.Module):
        backbone, classes = toy, 3

        def __init__(self) -> None:
            super().__init__()
            self.answer = nn.Parameter(torch.tensor([200.0, 0.0, 0.0]))

        def forward(self, images: Tensor) -> Tensor:
            return self.answer + 0 * images.sum((1, 2, 3))[:, None]

    labels = torch.zeros(4, dtype=torch.long)
    for name in ("di", "ti"):
        config = AttackConfig(name, random_start=False)
        assert torch.equal(attack_images(Constant(), pixels, labels, config), pixels)


def test_every_row_explains_itself():
    for name, attack in ATTACKS.items():
        config = AttackConfig(name)
        assert config.steps == attack.steps
        assert config.budget.startswith(str(attack.steps))
        assert "\n" not in attack.about
        assert attack.about.endswith(".")
    assert {name for name, row in ATTACKS.items() if row.norm == "L2"} == {"cw"}
