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
from tapt.core.prompts import PromptConfig, class_texts, init_prompts, logits

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


def probabilities(classifier: Classifier, pixels: Tensor, classes: Tensor) -> Tensor:
    with torch.no_grad():
        every = classifier(to_float(pixels)).softmax(-1)
    return every.gather(1, classes[:, None])[:, 0]


@pytest.mark.parametrize("epsilon", [1, 4, 16])
@pytest.mark.parametrize("step_size", [None, 0.5], ids=["default-step", "huge-step"])
def test_the_attacked_image_is_eight_bit_and_inside_the_ball(
    classifier, pixels, labels, epsilon: int, step_size: float | None
):
    config = ATTACK.updated(epsilon=epsilon / 255, step_size=step_size)
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
    ("epsilon", "whole"), [(4.9 / 255, 4), (0.03, 7), (1 / 255, 1), (8 / 255, 8), (1.0, 255)]
)
def test_epsilon_is_rounded_down_to_whole_steps(
    classifier, pixels, labels, epsilon: float, whole: int
):
    attack = Attack(epsilon=epsilon, steps=1)
    assert attack.epsilon_255 == whole
    assert attack.step == pytest.approx(2.5 * whole / 255)
    assert linf_255(attack_images(classifier, pixels, labels, attack), pixels).max() == whole


def test_every_whole_epsilon_is_exact():
    assert [Attack(epsilon=k / 255).epsilon_255 for k in range(1, 256)] == [*range(1, 256)]


def test_a_seed_decides_and_the_global_state_stays(classifier, pixels, labels):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = attack_images(classifier, pixels, labels, ATTACK)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(attack_images(classifier, pixels, labels, ATTACK), one)
    other = attack_images(classifier, pixels, labels, ATTACK.updated(seed=1))
    assert not torch.equal(other, one)
    still = [
        attack_images(classifier, pixels, labels, ATTACK.updated(seed=s, random_start=False))
        for s in (0, 1)
    ]
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


def test_stronger_attacks_do_more(classifier, pixels, labels):
    before = probabilities(classifier, pixels, labels)

    def after(epsilon: int, steps: int) -> Tensor:
        config = Attack(epsilon=epsilon / 255, steps=steps)
        attacked = attack_images(classifier, pixels, labels, config)
        return probabilities(classifier, attacked, labels)

    assert (after(1, 10) < before).all()
    assert (after(8, 10) < after(1, 10)).all()
    assert after(8, 10).mean() < after(8, 1).mean()
    huge = attack_images(classifier, pixels, labels, Attack(epsilon=32 / 255, steps=20))
    assert (classifier(to_float(huge)).argmax(-1) != labels).all()


def test_a_target_is_approached(classifier, pixels, labels):
    targets = (labels + 1) % len(TOY_CLASSES)
    untargeted = attack_images(classifier, pixels, labels, ATTACK)
    targeted = attack_images(classifier, pixels, labels, ATTACK, targets=targets)
    clean = probabilities(classifier, pixels, targets)
    assert (probabilities(classifier, targeted, targets) > clean).all()
    assert (
        probabilities(classifier, targeted, targets)
        >= probabilities(classifier, untargeted, targets) - 1e-6
    ).all()
    third = (labels + 2) % len(TOY_CLASSES)
    other = attack_images(classifier, pixels, labels, ATTACK, targets=third)
    assert (
        probabilities(classifier, other, third) > probabilities(classifier, targeted, third)
    ).all()
    assert linf_255(targeted, pixels).tolist() == [4] * 4


def test_progress_counts_steps(classifier, pixels, labels):
    calls: list[tuple[int, int]] = []
    attack_images(classifier, pixels, labels, ATTACK, on_progress=lambda *call: calls.append(call))
    assert calls == [(0, 5), (1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


def test_the_progress_callback_stops_it_and_leaves_nothing_behind(classifier, pixels, labels):
    expected = attack_images(classifier, pixels, labels, ATTACK)
    state = torch.get_rng_state()
    calls = []

    def report(done: int, total: int) -> None:
        calls.append(done)
        if done == 2:
            raise Cancelled("Stopped.")

    with pytest.raises(Cancelled):
        attack_images(classifier, pixels, labels, ATTACK, on_progress=report)
    assert calls == [0, 1, 2]
    assert torch.equal(torch.get_rng_state(), state)
    assert not classifier.backbone.model.training
    assert torch.equal(attack_images(classifier, pixels, labels, ATTACK), expected)


def test_the_model_stays_in_eval_mode_without_gradients(toy, classifier, pixels, labels):
    attack_images(classifier, pixels, labels, ATTACK)
    assert not any(m.training for m in classifier.modules())
    assert all(p.grad is None and not p.requires_grad for p in toy.model.parameters())


def test_two_threads_at_once_get_what_one_gets(classifier, pixels, labels):
    configs = [ATTACK.updated(seed=seed) for seed in (3, 4)]
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
    expected = attack_images(classifier, pixels, labels, ATTACK)
    with torch.device("meta"), torch.no_grad():
        inside = attack_images(classifier, pixels, labels, ATTACK)
        largest = linf_255(inside, pixels)
    assert largest.tolist() == [4] * 4
    assert float((inside == expected).float().mean()) > 0.999


def test_other_types_than_float32_are_refused(toy_folder: Path, pixels, labels):
    backbone = local_backbone(toy_folder, torch.bfloat16)
    classifier = FixedClassifier(backbone, class_texts(backbone, TOY_CLASSES).fixed)
    with pytest.raises(InputError, match=r"float32: load the backbone with dtype=torch\.float32"):
        attack_images(classifier, pixels, labels, ATTACK)


def test_the_classifier_runs_with_prompts(toy: Backbone, pixels: Tensor):
    config = PromptConfig("VLI", 2, 3)
    prompts = init_prompts(toy, config)
    features = class_texts(toy, TOY_CLASSES, config).features(toy, prompts)
    prompted = FixedClassifier(toy, features, prompts)
    expected = logits(toy, to_float(pixels), features, prompts)
    assert torch.equal(prompted(to_float(pixels)), expected.detach())
    labels = expected.argmax(-1)
    attacked = attack_images(prompted, pixels, labels, ATTACK.updated(epsilon=16 / 255))
    assert (
        probabilities(prompted, attacked, labels) < probabilities(prompted, pixels, labels)
    ).all()


SHORT = {"cw": 25, "square": 40, "autoattack": 2}
EVERY = [Attack(name, 8 / 255, SHORT.get(name, 10)) for name in METHODS]


def margins(classifier: Classifier, pixels: Tensor, labels: Tensor) -> Tensor:
    """Logit of the true class above the best other one; negative where fooled."""
    with torch.no_grad():
        return margin(classifier(to_float(pixels)), labels)


@pytest.fixture(params=EVERY, ids=lambda attack: attack.name)
def attack(request: pytest.FixtureRequest) -> Attack:
    return request.param


def test_every_attack_hurts_inside_its_ball(attack, classifier, pixels, labels):
    """And neither reads nor moves the global random state."""
    state, given = torch.get_rng_state(), pixels.clone()
    attacked = attack_images(classifier, pixels, labels, attack)
    assert attacked.dtype == torch.uint8
    assert torch.equal(pixels, given)
    assert torch.equal(torch.get_rng_state(), state)
    before, after = (margins(classifier, x, labels) for x in (pixels, attacked))
    if attack.name == "cw":  # leaves an image that it cannot fool
        assert (after <= before).all()
        assert (after < 0).any()
    else:
        assert (after < before).all()
    if attack.method.norm == "Linf":
        assert linf_255(attacked, pixels).max() <= 8
    torch.manual_seed(9)
    assert torch.equal(attack_images(classifier, pixels, labels, attack), attacked)


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


def test_another_thread_that_seeds_and_draws_changes_nothing(attack, classifier, pixels, labels):
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
        attacked = attack_images(classifier, pixels, labels, attack)
    finally:
        done.set()
        thread.join(timeout=60)
    assert torch.equal(attacked, expected)


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
    calls: list[tuple[int, int]] = []

    def report(done: int, total: int) -> None:
        calls.append((done, total))
        if stop is not None and done == stop:
            raise Cancelled("Stopped.")

    stop = None
    attack_images(classifier, pixels, labels, attack, on_progress=report)
    done, totals = zip(*calls, strict=True)
    assert len(set(totals)) == 1
    assert list(done) == sorted(done)
    assert done[0] == 0
    assert done[-1] == totals[0]
    calls.clear()
    stop, state = 3, torch.get_rng_state()
    with pytest.raises(Cancelled):
        attack_images(classifier, pixels, labels, attack, on_progress=report)
    assert len(calls) == 4
    assert torch.equal(torch.get_rng_state(), state)


def test_every_attack_runs_inside_no_grad_under_another_default_device(
    attack, classifier, pixels, labels
):
    expected = attack_images(classifier, pixels, labels, attack)
    with torch.device("meta"), torch.no_grad():
        inside = attack_images(classifier, pixels, labels, attack)
    assert float((inside == expected).float().mean()) > 0.999


@pytest.mark.parametrize("count", [2, 3, 4, 10])
def test_autoattack_works_with_few_classes_and_beats_pgd(toy: Backbone, pixels: Tensor, count: int):
    names = [f"class {i}" for i in range(count)]
    classifier = FixedClassifier(toy, class_texts(toy, names).fixed)
    labels = classifier(to_float(pixels)).argmax(-1)
    fooled = {}
    for name in ("pgd", "autoattack"):
        attacked = attack_images(classifier, pixels, labels, Attack(name, 3 / 255, 3))
        fooled[name] = margins(classifier, attacked, labels) < 0
        assert linf_255(attacked, pixels).max() <= 3
    assert fooled["autoattack"].sum() >= fooled["pgd"].sum()


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
    built: list[tuple[str, int, int | None]] = []
    for name in ("APGD", "APGDT", "FAB"):
        original = getattr(algorithms.torchattacks, name)

        def spy(model, *args, name=name, original=original, **options):
            built.append((name, options["steps"], None))
            return original(model, *args, **options)

        monkeypatch.setattr(algorithms.torchattacks, name, spy)
    model = AttackedModel(classifier, lambda: None, Draws([], torch.Generator()))
    for classes in (10, 1000):
        model.classes = classes
        stages = AutoAttack(model, **Attack("autoattack").options).stages()
        made = [build(model) for build in stages]
        assert [name for name, *_ in built] == ["APGD"] + ["APGDT"] * 9 + ["FAB"] * 9
        assert {steps for _, steps, _ in built} == {100}
        assert made[-1].steps == 5000
        built.clear()
    model.randomised = True
    for build in AutoAttack(model, **Attack("autoattack").options).stages():
        build(model)
    assert [name for name, *_ in built] == ["APGD", "APGD"]


def test_cw_reports_its_own_size(classifier, pixels, labels):
    attack = Attack("cw", steps=40)
    assert attack.epsilon_255 is None
    assert attack.to_dict()["epsilon"] is None
    attacked = attack_images(classifier, pixels, labels, attack)
    assert (margins(classifier, attacked, labels) < 0).all()
    assert (l2_norm(attacked, pixels) > 0).all()
    whole_ball = attack_images(classifier, pixels, labels, Attack(epsilon=8 / 255))
    assert (l2_norm(attacked, pixels) < l2_norm(whole_ball, pixels)).all()


def test_cw_moves_black_and_white(classifier, pixels, labels):
    """Exact 0 and 1 are at infinity in the tanh space of the original attack."""
    white = torch.full_like(pixels, 255)
    labels = classifier(to_float(white)).argmax(-1)
    attacked = attack_images(classifier, white, labels, Attack("cw", steps=40))
    assert (margins(classifier, attacked, labels) < 0).all()


def test_l2_by_hand():
    one, other = (torch.zeros(1, 3, 2, 2, dtype=torch.uint8) for _ in range(2))
    one[0, 0, 0, 0], other[0, 1, 0, 0] = 255, 51
    assert l2_norm(one, other).tolist() == pytest.approx([(1 + 0.04) ** 0.5])


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
        attack = Attack(name)
        assert attack.budget_steps == method.steps
        assert attack.budget.startswith(str(method.steps))
        assert "\n" not in method.about
        assert method.about.endswith(".")
    assert {name for name, row in METHODS.items() if row.norm == "L2"} == {"cw"}
    assert {name for name, row in METHODS.items() if not row.gradients} == {"square"}
    assert Attack("square").budget == "500 queries"
    assert Attack("autoattack", steps=10).budget == "10 steps each, 500 queries"
    used = Attack("pgd", 4.5 / 255, 10).to_dict()
    assert used["step_size"] == pytest.approx(2.5 * 4 / 255 / 10)
    assert Attack(step_size=0.01).to_dict()["step_size"] == 0.01
    assert Attack("apgd").to_dict()["step_size"] is None
