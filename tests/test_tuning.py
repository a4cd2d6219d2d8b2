"""The test-time step: what it computes, what it leaves alone, and what it refuses."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TOY_CLASSES, local_backbone, some_statistics
from torch import Tensor

import tapt.core.tuning
from tapt.core.backbone import Backbone
from tapt.core.errors import Cancelled, InputError
from tapt.core.losses import (
    Statistics,
    TokenStatistics,
    alignment,
    entropy,
    multi_view_entropy,
    view_statistics,
)
from tapt.core.prompts import PromptConfig, Prompts, class_texts, image_logits, init_prompts
from tapt.core.towers import encode_image
from tapt.core.tuning import TuneConfig, Tuned, encode_views, tune
from tapt.core.views import make_views

DESIGNS = ("V", "VLI", "VLJ")
CONFIG = TuneConfig(views=12, keep=0.25)


@pytest.fixture(scope="module")
def exact(toy_folder: Path) -> Backbone:
    """The toy in float64, where batching and threads only differ in the last digits."""
    return local_backbone(toy_folder, torch.float64)


def some_views(backbone: Backbone, images: int, count: int = CONFIG.views) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    pictures = torch.rand(images, 3, 32, 32, generator=generator, dtype=backbone.dtype)
    return torch.stack([make_views(p, count, generator=generator) for p in pictures])


class Setup:
    """A design on the toy, ready to tune."""

    def __init__(self, backbone: Backbone, design: str, depth: int = 3) -> None:
        self.backbone = backbone
        config = PromptConfig(design, 2, depth)
        self.prompts = init_prompts(backbone, config, seed=1)
        self.texts = class_texts(backbone, TOY_CLASSES, config)
        self.statistics = some_statistics(backbone, config)

    def tune(self, views: Tensor, config: TuneConfig = CONFIG, **options: object) -> Tuned:
        options.setdefault("statistics", self.statistics)
        return tune(self.backbone, self.prompts, views, self.texts, config=config, **options)


@pytest.fixture(params=DESIGNS)
def setup(request: pytest.FixtureRequest, exact: Backbone) -> Setup:
    return Setup(exact, request.param)


def assert_same(one: Tuned, other: Tuned, tolerance: float = 1e-8) -> None:
    for name, tensor in one.prompts.tensors.items():
        torch.testing.assert_close(tensor, other.prompts.tensors[name], atol=tolerance, rtol=0)
    torch.testing.assert_close(one.logits, other.logits, atol=tolerance, rtol=0)
    assert torch.equal(one.kept, other.kept)


def image_of(tuned: Tuned, index: int) -> dict[str, Tensor]:
    return {
        **tuned.prompts.map(lambda t: t[index]).tensors,
        "logits": tuned.logits[index],
    }


def straightforward(setup: Setup, views: Tensor, config: TuneConfig) -> tuple[Prompts, Tensor]:
    """Section 3 of the paper for one image, written down once more without any speed-up."""
    backbone, design = setup.backbone, setup.prompts.config
    tuned = setup.prompts.map(lambda t: t.clone().requires_grad_())
    optimizer = torch.optim.AdamW(tuned.tensors.values(), lr=config.lr, weight_decay=0.01)
    blocks = range(design.visual_depth - 1)

    def logits_and_inputs(chosen: Tensor) -> tuple[Tensor, list[Tensor]]:
        features, hidden = encode_image(backbone, chosen, tuned.visual(), hidden=blocks)
        return image_logits(backbone, features, setup.texts.features(backbone, tuned)), hidden

    kept = entropy(logits_and_inputs(views)[0]).argsort()[: int(len(views) * config.keep)]
    for _ in range(config.steps):
        logits, hidden = logits_and_inputs(views[kept])
        loss = multi_view_entropy(logits)
        for target in (setup.statistics.adversarial, setup.statistics.clean):
            for block, states in zip(blocks, hidden, strict=True):
                for observed, wanted in (
                    (states.mean(0), target.mean[block]),
                    (states.var(0, unbiased=False), target.var[block]),
                ):
                    distance = 0.5 * (observed - wanted.to(observed.dtype)).abs().mean()
                    loss = loss + 100 / design.visual_depth * 0.5 * distance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return tuned, logits_and_inputs(views[:1])[0][0]


@pytest.mark.parametrize("steps", [1, 3])
def test_a_batch_equals_the_straightforward_computation_of_each_image(setup: Setup, steps: int):
    config = CONFIG.updated(steps=steps)
    views = some_views(setup.backbone, 2)
    batch = setup.tune(views, config)
    assert not torch.allclose(batch.logits[0], batch.logits[1], atol=1e-3)
    for index in range(2):
        prompts, logits = straightforward(setup, views[index], config)
        torch.testing.assert_close(batch.logits[index], logits, atol=1e-8, rtol=0)
        for name, tensor in prompts.tensors.items():
            torch.testing.assert_close(batch.prompts.tensors[name][index], tensor.detach())


def test_a_batch_equals_one_by_one(setup: Setup):
    views = some_views(setup.backbone, 3)
    batch = setup.tune(views)
    for index in range(3):
        alone = setup.tune(views[index : index + 1])
        for name, tensor in image_of(alone, 0).items():
            torch.testing.assert_close(image_of(batch, index)[name], tensor, atol=1e-8, rtol=0)
        for name in ("view_logits", "entropies", "kept"):
            torch.testing.assert_close(getattr(batch, name)[index], getattr(alone, name)[0])
        torch.testing.assert_close(batch.before.total[index], alone.before.total[0])


@pytest.mark.parametrize("design", DESIGNS)
def test_a_float32_batch_equals_one_by_one_within_the_reference_tolerances(
    toy: Backbone, design: str
):
    setup, lr = Setup(toy, design), CONFIG.lr
    views = some_views(toy, 3)
    batch = setup.tune(views)
    for index in range(3):
        alone = setup.tune(views[index : index + 1])
        torch.testing.assert_close(batch.logits[index], alone.logits[0], atol=2e-2, rtol=0)
        for name, tensors in alone.prompts.tensors.items():
            difference = (batch.prompts.tensors[name][index] - tensors[0]).abs()
            assert float(difference.max()) <= 2.1 * lr  # a step is lr * sign(gradient)
            assert float((difference < 0.05 * lr).float().mean()) > 0.98


def test_every_image_starts_from_the_given_prompts(setup: Setup):
    views = some_views(setup.backbone, 2)
    first = setup.tune(views[1:])
    setup.tune(views[:1])
    assert_same(setup.tune(views[1:]), first, 0)


def test_what_is_there_already_is_not_computed_again(setup: Setup):
    """Several defences share the logits of the views."""
    views, calls = some_views(setup.backbone, 2), []
    text = setup.texts.features(setup.backbone, setup.prompts)
    every = encode_views(setup.backbone, setup.prompts, views, text)
    given = {"text_features": text, "view_logits": every}
    tuned = setup.tune(views, **given, on_progress=lambda done, total: calls.append(done))
    assert_same(tuned, setup.tune(views), 0)
    assert tuned.view_logits is every
    assert calls == [0, 24, 30, 32]
    kept = setup.tune(views, **{**given, "view_logits": every.flip(1)}).kept
    assert not torch.equal(kept, tuned.kept)


def test_what_it_was_given_stays_as_it_was(setup: Setup):
    views = some_views(setup.backbone, 2)
    model = {k: v.clone() for k, v in setup.backbone.model.state_dict().items()}
    prompts = {k: v.clone() for k, v in setup.prompts.tensors.items()}
    given, target = views.clone(), setup.statistics.clean.var.clone()
    tuned = setup.tune(views, CONFIG.updated(steps=2), after=True)
    assert torch.equal(views, given)
    assert torch.equal(setup.statistics.clean.var, target)
    assert all(torch.equal(prompts[k], v) for k, v in setup.prompts.tensors.items())
    assert not any(t.requires_grad for t in setup.prompts.tensors.values())
    for name, value in setup.backbone.model.state_dict().items():
        assert torch.equal(model[name], value)
    assert all(p.grad is None and not p.requires_grad for p in setup.backbone.model.parameters())
    assert not setup.backbone.model.training
    results = [tuned.logits, tuned.view_logits, *tuned.prompts.tensors.values()]
    results += [*vars(tuned.before).values()]
    assert not any(t.requires_grad for t in results)


def test_every_parameter_is_tuned_and_none_moves_further_than_a_step(setup: Setup):
    tuned = setup.tune(some_views(setup.backbone, 1))
    for name, start in setup.prompts.tensors.items():
        moved = (tuned.prompts.tensors[name][0] - start).abs()
        limit = CONFIG.lr * (1 + CONFIG.weight_decay * start.abs())
        assert bool((moved <= limit + 1e-12).all()), name
        assert float((moved > 0.5 * CONFIG.lr).double().mean()) > 0.5, name


def test_parameters_that_nothing_uses_do_not_move(exact: Backbone):
    """A joint design whose visual depth is larger has text sets without a text block."""
    config = PromptConfig("VLJ", 2, 1, 3)
    setup = Setup(exact, "VLJ")
    setup.prompts = init_prompts(exact, config)
    setup.texts = class_texts(exact, TOY_CLASSES, config)
    tuned = setup.tune(some_views(exact, 1), statistics=None)
    assert tuned.prompts.visual().shape == (1, 1, 2, 64)
    assert tuned.prompts.text().shape == (1, 3, 2, 32)
    deep = Setup(exact, "VLJ")
    config = PromptConfig("VLJ", 2, 3, 1)
    deep.prompts, deep.texts = init_prompts(exact, config), class_texts(exact, TOY_CLASSES, config)
    moved = (
        deep.tune(some_views(exact, 1)).prompts.tensors["text"][0] - deep.prompts.tensors["text"]
    )
    assert (moved.abs().amax((1, 2)) > 0).all()  # through the projections


def test_two_threads_on_one_model_get_what_one_gets(exact: Backbone):
    setups = [Setup(exact, "VLI"), Setup(exact, "V")]
    views = some_views(exact, 2)
    expected = [s.tune(views[i : i + 1]) for i, s in enumerate(setups)]
    results: list[Tuned | None] = [None, None]
    barrier = threading.Barrier(2)

    def work(index: int) -> None:
        for _ in range(3):
            barrier.wait(timeout=60)
            results[index] = setups[index].tune(views[index : index + 1])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for result, wanted in zip(results, expected, strict=True):
        assert_same(result, wanted)


def test_it_works_inside_no_grad_and_under_another_default_device(setup: Setup):
    """A tensor that is made without naming its device would be a meta tensor here."""
    views = some_views(setup.backbone, 2)
    config = CONFIG.updated(steps=2)
    expected = setup.tune(views, config, after=True)
    with torch.device("meta"), torch.no_grad():
        inside = setup.tune(views, config, after=True)
        features, _ = encode_image(setup.backbone, views[0], setup.prompts.visual())
        texts = class_texts(setup.backbone, TOY_CLASSES, setup.prompts.config)
        assert_same(inside, expected)
    logits = image_logits(setup.backbone, features, texts.features(setup.backbone, setup.prompts))
    torch.testing.assert_close(logits, expected.view_logits[0])


def test_steps_keep_the_selection_of_the_first(setup: Setup, monkeypatch: pytest.MonkeyPatch):
    passes = []
    original = tapt.core.tuning.encode_image

    def spy(backbone, images, *args, **options):
        passes.append(images)
        return original(backbone, images, *args, **options)

    monkeypatch.setattr(tapt.core.tuning, "encode_image", spy)
    views = some_views(setup.backbone, 1)
    tuned = setup.tune(views, CONFIG.updated(steps=3, lr=0.5))  # the order may well change
    kept = views[0][tuned.kept[0]]
    assert tuned.kept.shape == (1, 3)
    steps = [p for p in passes if len(p) == 3]
    assert len(steps) == 3
    assert all(torch.equal(step, kept) for step in steps)


def test_the_most_confident_views_are_kept_in_order(setup: Setup):
    tuned = setup.tune(some_views(setup.backbone, 2))
    torch.testing.assert_close(tuned.entropies, entropy(tuned.view_logits))
    for image in range(2):
        order = tuned.entropies[image].argsort()
        assert tuned.kept[image].tolist() == order[:3].tolist()


@pytest.mark.parametrize(("views", "keep", "count"), [(10, 0.0, 1), (10, 0.39, 3), (4, 1.0, 4)])
def test_how_many_views_are_kept(exact: Backbone, views: int, keep: float, count: int):
    config = TuneConfig(views=views, keep=keep)
    tuned = Setup(exact, "V").tune(some_views(exact, 1, views), config)
    assert tuned.kept.shape == (1, count)


def test_no_steps_leave_the_prompts_and_predict_with_them(setup: Setup):
    views = some_views(setup.backbone, 2)
    tuned = setup.tune(views, CONFIG.updated(steps=0))
    for name, start in setup.prompts.tensors.items():
        assert torch.equal(tuned.prompts.tensors[name], start.expand(2, *start.shape))
    torch.testing.assert_close(tuned.logits, tuned.view_logits[:, 0])
    assert tuned.before.total.shape == (2,)


def test_without_statistics_the_loss_is_the_entropy(setup: Setup):
    views = some_views(setup.backbone, 1)
    tuned = setup.tune(views, statistics=None, after=True)
    losses = tuned.before
    expected = multi_view_entropy(tuned.view_logits[0][tuned.kept[0]])
    torch.testing.assert_close(losses.total[0], expected)
    assert torch.equal(losses.total, losses.entropy)
    assert losses.adversarial is losses.clean is losses.per_block_clean is None
    assert tuned.after.total < losses.total
    aligned = setup.tune(views)
    assert not torch.allclose(aligned.logits, tuned.logits, atol=1e-6)


def test_a_step_lowers_the_loss_and_its_terms_add_up(setup: Setup):
    tuned = setup.tune(some_views(setup.backbone, 2), after=True)
    depth = setup.prompts.config.visual_depth
    for losses in (tuned.before, tuned.after):
        assert losses.per_block_clean.shape == (depth - 1, 2)
        torch.testing.assert_close(losses.adversarial, losses.per_block_adversarial.sum(0))
        torch.testing.assert_close(losses.clean, losses.per_block_clean.sum(0))
        mixed = 0.5 * losses.adversarial + 0.5 * losses.clean
        torch.testing.assert_close(losses.total, losses.entropy + 100 / depth * mixed)
    assert (tuned.after.total < tuned.before.total).all()
    assert setup.tune(some_views(setup.backbone, 1)).after is None


def test_alpha_chooses_between_the_two_statistics(exact: Backbone):
    setup, views = Setup(exact, "V"), some_views(exact, 1)
    only_clean = setup.tune(views, CONFIG.updated(alpha=0.0))
    target = setup.statistics.clean
    setup.statistics = Statistics(TokenStatistics(target.mean + 9, target.var + 9), target)
    assert_same(setup.tune(views, CONFIG.updated(alpha=0.0)), only_clean, 0)
    losses = setup.tune(views, CONFIG.updated(alpha=1.0)).before
    torch.testing.assert_close(losses.total, losses.entropy + 100 / 3 * losses.adversarial)


def test_aligned_blocks(exact: Backbone):
    assert TuneConfig().aligned_blocks(9) == range(8)
    assert TuneConfig(align_from=2, align_to=5).aligned_blocks(9) == range(2, 5)
    setup, views = Setup(exact, "V"), some_views(exact, 1)
    tuned = setup.tune(views, CONFIG.updated(align_from=1, align_to=3))
    _, hidden = encode_image(exact, views[0][tuned.kept[0]], setup.prompts.visual(), hidden=(1, 2))
    target = setup.statistics.clean.to(exact.device, exact.dtype)
    expected = alignment(view_statistics(hidden, 1), target, (1, 2))
    torch.testing.assert_close(tuned.before.per_block_clean, expected)
    shallow = Setup(exact, "VLI", depth=1).tune(views, after=True)  # D - 1 = 0 blocks
    assert shallow.before.adversarial is None
    with pytest.raises(InputError, match="align_to must be at most 3 on this backbone, got 4"):
        setup.tune(views, CONFIG.updated(align_to=4))


def test_progress_counts_up_to_the_total(setup: Setup):
    calls: list[tuple[int, int]] = []
    for steps in (0, 2):
        calls.clear()
        setup.tune(
            some_views(setup.backbone, 2),
            CONFIG.updated(steps=steps),
            after=True,
            on_progress=lambda done, total: calls.append((done, total)),
        )
        done, totals = zip(*calls, strict=True)
        assert set(totals) == {2 * (12 + 3 * (steps + 1) + 1)}
        assert list(done) == sorted(done)
        assert (done[0], done[-1]) == (0, totals[0])
        assert len(calls) >= 3 + steps


@pytest.mark.parametrize("after_calls", [1, 2, 4])
def test_the_progress_callback_stops_it(exact: Backbone, after_calls: int):
    setup, views, calls = Setup(exact, "VLI"), some_views(exact, 1), []
    expected = setup.tune(views)

    def report(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == after_calls:
            raise Cancelled("Stopped.")

    with pytest.raises(Cancelled):
        setup.tune(views, on_progress=report)
    assert len(calls) == after_calls
    assert_same(setup.tune(views), expected, 0)


def test_the_selection_runs_in_passes_of_bounded_size(exact: Backbone, monkeypatch):
    setup, views = Setup(exact, "VLI"), some_views(exact, 2)
    expected = setup.tune(views)
    monkeypatch.setattr(tapt.core.tuning, "views_per_pass", lambda _: 5)
    calls: list[int] = []
    assert_same(setup.tune(views, on_progress=lambda done, _: calls.append(done)), expected)
    assert calls[:6] == [0, 5, 10, 15, 20, 24]


@pytest.mark.parametrize("part", ["adversarial.mean", "clean.var"])
def test_statistics_of_another_shape_are_refused(exact: Backbone, part: str):
    setup = Setup(exact, "V")
    group, name = part.split(".")
    old = getattr(setup.statistics, group)
    wrong = replace(setup.statistics, **{group: replace(old, **{name: torch.zeros(3, 17, 64)})})
    with pytest.raises(InputError) as error:
        setup.tune(some_views(exact, 1), statistics=wrong)
    message = f"statistics {part} must have shape (3, 19, 64), got (3, 17, 64)."
    assert str(error.value) == message
