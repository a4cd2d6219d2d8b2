"""The test-time step: what it computes, what it leaves alone, and what it refuses."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TOY_CLASSES, local_backbone, some_statistics
from torch import Tensor

import tapt.core.tuning
from tapt.core.backbone import Backbone
from tapt.core.clip import PromptedClip
from tapt.core.errors import InputError
from tapt.core.losses import Statistics, alignment, multi_view_entropy, view_statistics
from tapt.core.prompts import PromptConfig, class_texts, image_logits, init_prompts
from tapt.core.towers import encode_image
from tapt.core.tuning import TuneConfig, Tuned, encode_views, tune
from tapt.core.views import make_views
from tapt.evaluation.plain import plain_tune

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

    def __init__(self, backbone: Backbone, design: str, *depths: int) -> None:
        config = PromptConfig(design, 2, *(depths or (3,)))
        prompts, made = init_prompts(backbone, config, seed=1), some_statistics(backbone, config)
        place = backbone.device, backbone.dtype
        statistics = Statistics(made.adversarial.to(*place), made.clean.to(*place))
        self.backbone, self.prompts, self.statistics = backbone, prompts, statistics
        self.clip = PromptedClip(backbone, prompts, statistics, tuple(TOY_CLASSES))
        self.texts = self.clip.texts

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


def test_a_batch_equals_the_straightforward_computation_of_each_image(setup: Setup):
    """Several steps, so that AdamW's moments count; large ones, after which other views would be
    the most confident ones."""
    config = CONFIG.updated(steps=3, lr=0.05, alpha=0.3, weight_decay=0.1)
    views = some_views(setup.backbone, 2)
    batch, untuned = setup.tune(views, config), setup.tune(views, config.updated(steps=0))
    assert (batch.logits - untuned.logits).abs().amax(1).min() > 0.01
    assert not torch.allclose(batch.logits[0], batch.logits[1], atol=1e-3)
    for index in range(2):
        plain, _ = plain_tune(setup.clip, views[index : index + 1], config)
        torch.testing.assert_close(batch.logits[index], plain, atol=1e-8, rtol=0)
        alone = setup.tune(views[index : index + 1], config)
        for name, tensor in alone.prompts.tensors.items():
            torch.testing.assert_close(batch.prompts.tensors[name][index], tensor[0])
        for name in ("view_logits", "entropies", "kept"):
            torch.testing.assert_close(getattr(batch, name)[index], getattr(alone, name)[0])
        torch.testing.assert_close(batch.before.total[index], alone.before.total[0])


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
    """Backbone and prompts too: see the protocol in test_defenses.py."""
    views = some_views(setup.backbone, 2)
    given, target = views.clone(), setup.statistics.clean.var.clone()
    tuned = setup.tune(views, CONFIG.updated(steps=2), after=True)
    assert torch.equal(views, given)
    assert torch.equal(setup.statistics.clean.var, target)
    assert not any(t.requires_grad for t in setup.prompts.tensors.values())
    results = [tuned.logits, tuned.view_logits, *tuned.prompts.tensors.values()]
    results += [*vars(tuned.before).values()]
    assert not any(t.requires_grad for t in results)


def test_a_joint_design_of_two_depths(exact: Backbone):
    """Where the visual depth is larger, text sets without a text block are there, and move through
    their projections."""
    tuned = Setup(exact, "VLJ", 1, 3).tune(some_views(exact, 1))
    assert tuned.prompts.visual().shape == (1, 1, 2, 64)
    assert tuned.prompts.text().shape == (1, 3, 2, 32)
    deep = Setup(exact, "VLJ", 3, 1)
    after = deep.tune(some_views(exact, 1)).prompts.tensors["text"][0]
    assert ((after - deep.prompts.tensors["text"]).abs().amax((1, 2)) > 0).all()


def test_two_threads_on_one_model_get_what_one_gets(exact: Backbone):
    setups, views = [Setup(exact, "VLI"), Setup(exact, "V")], some_views(exact, 2)
    expected = [s.tune(views[i : i + 1]) for i, s in enumerate(setups)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            work = [pool.submit(s.tune, views[i : i + 1]) for i, s in enumerate(setups)]
            for result, wanted in zip(work, expected, strict=True):
                assert_same(result.result(), wanted)


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


def test_aligned_blocks(exact: Backbone):
    assert TuneConfig().aligned_blocks(9) == range(8)
    assert TuneConfig(align_from=2, align_to=5).aligned_blocks(9) == range(2, 5)
    setup, views = Setup(exact, "V"), some_views(exact, 1)
    tuned = setup.tune(views, CONFIG.updated(align_from=1, align_to=3))
    _, hidden = encode_image(exact, views[0][tuned.kept[0]], setup.prompts.visual(), hidden=(1, 2))
    target = setup.statistics.clean.to(exact.device, exact.dtype)
    expected = alignment(view_statistics(hidden, 1), target, (1, 2))
    torch.testing.assert_close(tuned.before.per_block_clean, expected)
    shallow = Setup(exact, "VLI", 1).tune(views, after=True)  # D - 1 = 0 blocks
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
    with pytest.raises(InputError, match=rf"statistics {part} must have shape \(3, 19, 64\)"):
        setup.tune(some_views(exact, 1), statistics=wrong)
