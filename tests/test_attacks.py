"""Attacks: the ball in integers, determinism, targets, progress, and what is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TOY_CLASSES, local_backbone
from torch import Tensor

from tapt.core import algorithms
from tapt.core.algorithms import AttackedModel, AutoAttack, Draws, margin
from tapt.core.attacks import METHODS, Attack, attack_images, l2_norm, linf_255, list_attacks
from tapt.core.backbone import Backbone
from tapt.core.clip import Classifier, FixedClassifier
from tapt.core.errors import Cancelled, InputError
from tapt.core.images import to_float
from tapt.core.prompts import class_texts

ATTACK = Attack("pgd", 4 / 255, 5)


class Made(Classifier):
    """A classifier made of a function."""

    classes = 3

    def __init__(self, backbone: Backbone, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.backbone, self.function = backbone, function
        self.place = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images) + 0 * self.place


@pytest.fixture(scope="module")
def classifier(toy: Backbone) -> FixedClassifier:
    return FixedClassifier(toy, class_texts(toy, TOY_CLASSES).fixed)


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


def margins(classifier: Classifier, pixels: Tensor, labels: Tensor) -> Tensor:
    """Logit of the true class above the best other one; negative where fooled."""
    with torch.no_grad():
        return margin(classifier(to_float(pixels)), labels)


@pytest.mark.parametrize("epsilon", [1, 4.9, 16])
@pytest.mark.parametrize("step_size", [None, 0.5], ids=["default-step", "huge-step"])
def test_the_attacked_image_fills_its_ball(classifier, pixels, labels, epsilon, step_size):
    config = ATTACK.updated(epsilon=epsilon / 255, step_size=step_size)
    attacked = attack_images(classifier, pixels, labels, config)
    assert linf_255(attacked, pixels).tolist() == [int(epsilon)] * 4


def test_sizes_by_hand():
    one, other = (torch.zeros(2, 3, 2, 2, dtype=torch.uint8) for _ in range(2))
    one[0, 1, 0, 0], other[1, 2, 1, 1], other[1, 0, 0, 0] = 255, 51, 51
    assert linf_255(one, other).tolist() == linf_255(other, one).tolist() == [255, 51]
    assert l2_norm(one, other).tolist() == pytest.approx([1, 0.08**0.5])


def test_epsilon_is_rounded_down_to_whole_steps():
    assert [Attack(epsilon=k / 255).epsilon_255 for k in range(1, 256)] == [*range(1, 256)]
    attack = Attack(epsilon=0.03, steps=1)
    assert attack.epsilon_255 == 7
    assert attack.step == pytest.approx(2.5 * 7 / 255)


def test_a_seed_decides(classifier, pixels, labels):
    def attacked(**changes: object) -> Tensor:
        return attack_images(classifier, pixels, labels, ATTACK.updated(**changes))

    assert not torch.equal(attacked(seed=1), attacked(seed=0))
    still = [attacked(seed=seed, random_start=False) for seed in (0, 1)]
    assert torch.equal(*still)


def test_it_is_projected_gradient_ascent(classifier, pixels, labels):
    """Two steps without a random start, written down once more."""
    config = Attack(epsilon=4 / 255, steps=2, step_size=3 / 255, random_start=False)
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


def test_other_types_than_float32_are_refused(toy_folder: Path, pixels, labels):
    backbone = local_backbone(toy_folder, torch.bfloat16)
    classifier = FixedClassifier(backbone, class_texts(backbone, TOY_CLASSES).fixed)
    with pytest.raises(InputError, match=r"float32: load the backbone with dtype=torch\.float32"):
        attack_images(classifier, pixels, labels, ATTACK)


SHORT = {"cw": 25, "square": 40, "autoattack": 2}
EVERY = [Attack(name, 8 / 255, SHORT.get(name, 10)) for name in METHODS]


@pytest.fixture(params=EVERY, ids=lambda attack: attack.name)
def attack(request: pytest.FixtureRequest) -> Attack:
    return request.param


def test_every_attack_hurts_inside_its_ball(attack, classifier, pixels, labels):
    """And leaves model, images and the global random state alone."""
    state, given = torch.get_rng_state(), pixels.clone()
    attacked = attack_images(classifier, pixels, labels, attack)
    assert (attacked.dtype, attacked.shape) == (torch.uint8, pixels.shape)
    assert torch.equal(pixels, given)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m.training for m in classifier.modules())
    assert all(p.grad is None and not p.requires_grad for p in classifier.parameters())
    before, after = (margins(classifier, x, labels) for x in (pixels, attacked))
    if attack.name == "cw":  # leaves an image that it cannot fool
        assert (after <= before).all()
        assert (after < 0).any()
    else:
        assert (after < before).all()
    if attack.method.norm == "Linf":
        assert linf_255(attacked, pixels).max() <= 8


def test_an_image_is_attacked_the_same_whatever_batch_it_is_in(attack, classifier, pixels, labels):
    """Randomness belongs to the seed and the image's number."""
    attack = attack.updated(steps=min(attack.budget_steps, 8))
    five, numbers = torch.cat([pixels, pixels[:1]]), [3, 0, 8, 5, 4]
    wanted = torch.cat([labels, labels[:1]])
    batch = attack_images(classifier, five, wanted, attack, images=numbers)
    for i, number in enumerate(numbers):
        row = slice(i, i + 1)
        alone = attack_images(classifier, five[row], wanted[row], attack, images=[number])
        assert float((alone == batch[row]).float().mean()) > 0.99, i  # sums round differently
    if attack.name in ("pgd", "apgd", "square"):
        assert not torch.equal(batch[0], batch[4])


def test_nothing_outside_changes_an_attack(attack, classifier, pixels, labels):
    """Neither another seed, `no_grad` and default device, nor a thread that seeds and draws."""
    attack = attack.updated(steps=min(attack.budget_steps, 5))
    expected = attack_images(classifier, pixels, labels, attack)
    done = threading.Event()

    def disturb() -> None:
        while not done.is_set():
            torch.manual_seed(0)
            torch.rand(10)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        with torch.device("meta"), torch.no_grad():
            attacked = attack_images(classifier, pixels, labels, attack)
    finally:
        done.set()
        thread.join(timeout=60)
    assert float((attacked == expected).float().mean()) > 0.999  # sums may round differently


def test_every_attack_aims_at_a_class_or_says_that_it_cannot(attack, classifier, pixels, labels):
    targets = (labels + 1) % len(TOY_CLASSES)
    if not attack.method.targeted:
        with pytest.raises(InputError, match=f"{attack.method.title} cannot aim at a class"):
            attack_images(classifier, pixels, labels, attack, targets=targets)
        return
    attacked = attack_images(classifier, pixels, labels, attack, targets=targets)
    before, after = (margins(classifier, x, targets) for x in (pixels, attacked))
    assert (after >= before).all()
    assert after.mean() > before.mean()


def test_every_attack_counts_up_and_stops_at_once(attack, classifier, pixels, labels):
    attack = attack.updated(steps=min(attack.budget_steps, 5))
    calls: list[tuple[int, int]] = []

    def report(done: int, total: int) -> None:
        calls.append((done, total))
        if done == stop:
            raise Cancelled("Stopped.")

    stop = -1
    attack_images(classifier, pixels, labels, attack, on_progress=report)
    done, totals = zip(*calls, strict=True)
    assert len(set(totals)) == 1
    assert list(done) == sorted(done)
    assert (done[0], done[-1]) == (0, totals[0])
    calls.clear()
    stop, state = 3, torch.get_rng_state()
    with pytest.raises(Cancelled):
        attack_images(classifier, pixels, labels, attack, on_progress=report)
    assert len(calls) == 4
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("count", [2, 10])
def test_autoattack_works_with_few_classes(toy: Backbone, pixels: Tensor, count: int):
    names = [f"class {i}" for i in range(count)]
    classifier = FixedClassifier(toy, class_texts(toy, names).fixed)
    labels = classifier(to_float(pixels)).argmax(-1)
    attacked = attack_images(classifier, pixels, labels, Attack("autoattack", 3 / 255, 3))
    assert (margins(classifier, attacked, labels) < margins(classifier, pixels, labels)).all()
    assert linf_255(attacked, pixels).max() <= 3


def test_autoattack_never_returns_the_clean_image(toy: Backbone, pixels: Tensor):
    """Neither of a picture that resists, nor of one that was answered wrongly from the start: to
    another model each may be an attack all the same."""
    signs = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(1)).sign()

    def linear(images: Tensor) -> Tensor:
        score = (images * signs).flatten(1).mean(1)
        return torch.stack([torch.full_like(score, 5), score, -score, -score - 1], 1)

    model = Made(toy, linear)
    model.classes = 4
    attack = Attack("autoattack", 2 / 255, 3)
    for wanted in (0, 3):  # the answer, and the last one in the order
        labels = torch.full((4,), wanted)
        attacked = attack_images(model, pixels, labels, attack)
        assert linf_255(attacked, pixels).tolist() == [2] * 4
        if wanted == 0:
            assert (margins(model, attacked, labels) < margins(model, pixels, labels)).all()


def test_autoattack_returns_the_candidate_of_the_lowest_margin(toy: Backbone, monkeypatch):
    """And goes on where rounding to 8 bits saves an image."""
    model = Made(toy, lambda x: torch.stack([1 - x.mean((1, 2, 3)), x.mean((1, 2, 3)) - 1], 1))
    candidates, calls = [1, 3, 2, 0.3, 0], []

    def stages(self: AutoAttack) -> list:
        def build(model: AttackedModel, by: float) -> Callable[..., Tensor]:
            calls.append(by)
            return lambda images, labels: images + by / 255

        return [lambda model, by=by: build(model, by) for by in candidates]

    monkeypatch.setattr(AutoAttack, "stages", stages)
    pixels, labels = torch.full((2, 3, 32, 32), 100, dtype=torch.uint8), torch.tensor([0, 0])
    attacked = attack_images(model, pixels, labels, Attack("autoattack", 4 / 255))
    assert attacked.unique().tolist() == [103]
    assert calls == candidates
    candidates[:] = [0.3, 0, 2]
    assert attack_images(model, pixels, labels, Attack("autoattack")).unique().tolist() == [102]


def test_autoattack_has_full_budgets(classifier, monkeypatch):
    """torchattacks' own AutoAttack stops after 10 steps, whatever it is told."""
    built: list[tuple[str, int]] = []
    for name in ("APGD", "APGDT", "FAB"):
        original = getattr(algorithms.torchattacks, name)

        def spy(model, *args, name=name, original=original, **options):
            built.append((name, options["steps"]))
            return original(model, *args, **options)

        monkeypatch.setattr(algorithms.torchattacks, name, spy)
    model = AttackedModel(classifier, lambda: None, Draws([], torch.Generator()))
    for classes in (10, 1000):
        model.classes = classes
        stages = AutoAttack(model, **Attack("autoattack").options).stages()
        made = [build(model) for build in stages]
        assert [name for name, _ in built] == ["APGD"] + ["APGDT"] * 9 + ["FAB"] * 9
        assert {steps for _, steps in built} == {100}
        assert made[-1].steps == 5000
        built.clear()
    model.randomised = True
    for build in AutoAttack(model, **Attack("autoattack").options).stages():
        build(model)
    assert [name for name, _ in built] == ["APGD", "APGD"]


def test_cw_reports_its_own_size(classifier, pixels, labels):
    """And moves white, which is at infinity in the tanh space of the original attack."""
    attack = Attack("cw", steps=40)
    assert attack.epsilon_255 is None
    assert attack.to_dict()["epsilon"] is None
    attacked = attack_images(classifier, pixels, labels, attack)
    assert (margins(classifier, attacked, labels) < 0).all()
    assert (l2_norm(attacked, pixels) > 0).all()
    whole_ball = attack_images(classifier, pixels, labels, Attack(epsilon=8 / 255))
    assert (l2_norm(attacked, pixels) < l2_norm(whole_ball, pixels)).all()
    white = torch.full_like(pixels[:1], 255)
    labels = classifier(to_float(white)).argmax(-1)
    attacked = attack_images(classifier, white, labels, attack)
    assert (margins(classifier, attacked, labels) < 0).all()


def test_square_asks_for_answers_only(classifier, pixels, labels):
    attack = Attack("square", 8 / 255, 30)
    expected = attack_images(classifier, pixels, labels, attack)
    blind = Made(classifier.backbone, torch.no_grad()(classifier))
    assert torch.equal(attack_images(blind, pixels, labels, attack), expected)


@pytest.mark.parametrize("randomised", [False, True])
def test_square_does_not_stop_at_a_lucky_answer_of_a_randomised_model(toy, pixels, randomised):
    asked: list[int] = []

    def lucky(images: Tensor) -> Tensor:
        """Every third answer is wrong, whatever the images."""
        asked.append(len(images))
        sure = 1.0 if len(asked) % 3 else -1.0
        return torch.tensor([sure, 0.0, -5.0]).expand(len(images), -1)

    model = Made(toy, lucky)
    model.randomised = randomised
    attack_images(model, pixels, torch.zeros(4, dtype=torch.long), Attack("square", steps=20))
    assert asked == [4] * (21 if randomised else 3)


def test_a_vanished_gradient_leaves_the_image(toy: Backbone, pixels: Tensor):
    """DI and TI would divide 0 by 0."""
    answer = torch.tensor([200.0, 0.0, 0.0])
    model = Made(toy, lambda images: answer + 0 * images.sum((1, 2, 3))[:, None])
    labels = torch.zeros(4, dtype=torch.long)
    for name in ("di", "ti"):
        attacked = attack_images(model, pixels, labels, Attack(name, random_start=False))
        assert torch.equal(attacked, pixels)


def test_every_row_explains_itself():
    assert list_attacks() == list(METHODS)
    for name, method in METHODS.items():
        assert Attack(name).budget.startswith(str(method.steps))
        assert method.about.endswith(".")
    assert Attack("square").budget == "500 queries"
    assert Attack("autoattack", steps=10).budget == "10 steps each, 500 queries"
    used = Attack("pgd", 4.5 / 255, 10).to_dict()
    assert used["step_size"] == pytest.approx(2.5 * 4 / 255 / 10)
    assert Attack(step_size=0.01).to_dict()["step_size"] == 0.01
    assert Attack("apgd").to_dict()["step_size"] is None
