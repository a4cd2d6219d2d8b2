"""The registry, the protocol that every defence keeps, and what each one answers."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from conftest import TOY_CLASSES, prepared, random_pixels, toy_clip
from torch import Tensor

from tapt.core.errors import Cancelled, InputError
from tapt.core.losses import entropy
from tapt.core.prompts import init_prompts
from tapt.core.tuning import TuneConfig, tune
from tapt.core.views import generators, make_views
from tapt.defenses import (
    ImageBatch,
    Prediction,
    PreparedDefense,
    base,
    find_defenses,
    list_defenses,
)

SMALL = {"views": 8, "keep": 0.25, "lr": 0.02}
SEEDS = [5, 9, 2]


@pytest.fixture(scope="module")
def images() -> Tensor:
    return random_pixels(3) / 255


def answer(defense: PreparedDefense, images: Tensor, seeds: list[int] = SEEDS) -> Prediction:
    return defense.predict(ImageBatch(images, seeds))


def views(images: Tensor) -> Tensor:
    pairs = zip(images, generators(SEEDS), strict=True)
    return torch.stack([make_views(x, SMALL["views"], generator=g) for x, g in pairs])


def test_defences_are_listed_in_the_order_that_is_shown():
    names = list_defenses()
    assert names[0] == "clip"
    default = [name for name in names if name in ("clip", "static", "ensemble", "tapt")]
    assert default == ["clip", "static", "ensemble", "tapt"]
    assert [d.name for d in find_defenses()] == default
    assert [d.name for d in find_defenses(["tapt", "clip", "tapt"])] == ["tapt", "clip"]
    with pytest.raises(InputError, match=r"Defence 'tpt2' is unknown; choose from clip, static"):
        find_defenses(["clip", "tpt2"])
    with pytest.raises(InputError, match="Choose at least one defence of clip, static"):
        find_defenses([])


def test_another_defence_is_registered_once(flips, clip, images):
    assert list_defenses()[-1] == "flips"
    base.register(flips)
    assert list_defenses().count("flips") == 1
    found = answer(prepared(clip, "flips", flips=1), images).probabilities
    both = [clip.static(x).softmax(-1) for x in (images, images.flip(-1))]
    for i in range(3):
        assert any(torch.allclose(found[i], one[i], atol=1e-5) for one in both)


@pytest.mark.parametrize("name", [*list_defenses(), "flips"])
def test_every_defence_keeps_the_protocol(flips, clip, images, name):
    defense, given = prepared(clip, name), images.clone()
    state, weights = torch.get_rng_state(), copy.deepcopy(clip.backbone.model.state_dict())
    prompts = {key: value.clone() for key, value in clip.prompts.tensors.items()}
    with torch.enable_grad():  # it needs no care of the caller
        prediction = answer(defense, images)
    probabilities = prediction.probabilities
    assert probabilities.shape == (3, len(TOY_CLASSES))
    assert probabilities.device.type == "cpu"
    assert not probabilities.requires_grad
    if name != "flips":  # a median of probabilities does not sum to one
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(3))
    assert torch.equal(answer(defense, images).probabilities, probabilities)
    for i in range(3):  # whatever batch it is in
        alone = answer(defense, images[i : i + 1], SEEDS[i : i + 1])
        torch.testing.assert_close(alone.probabilities[0], probabilities[i], atol=1e-3, rtol=0)
        for key, value in alone.trace.items():
            if isinstance(value, Tensor):
                assert value[0].shape == prediction.trace[key][i].shape, key
    other = answer(defense, images, [7, 8, 4]).probabilities
    assert torch.equal(other, probabilities) is not defense.randomised
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(images, given)
    after = clip.backbone.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in weights.items())
    assert all(torch.equal(clip.prompts.tensors[key], value) for key, value in prompts.items())


@pytest.mark.parametrize("name", [*list_defenses(), "flips"])
def test_every_defence_has_a_gradient_and_its_surrogates_too(flips, clip, images, name):
    defense = prepared(clip, name)
    for logits_of in (defense.logits, defense.surrogate_logits)[: 1 + bool(defense.surrogate)]:
        leaf = images.clone().requires_grad_()
        logits = logits_of(ImageBatch(leaf, SEEDS))
        assert logits.shape == (3, len(TOY_CLASSES))
        gradient = torch.autograd.grad(logits[:, 0].sum(), leaf)[0]
        assert gradient.isfinite().all()
        assert (gradient.flatten(1).abs().amax(1) > 0).all()
    assert all(p.grad is None for p in clip.backbone.model.parameters())


@pytest.mark.parametrize("name", list_defenses())
def test_what_is_attacked_is_what_answers(clip, images, name):
    defense = prepared(clip, name)
    logits = defense.logits(ImageBatch(images.clone().requires_grad_(), SEEDS)).detach()
    expected = answer(defense, images).probabilities
    torch.testing.assert_close(logits.softmax(-1), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("design", ["V", "VLI", "VLJ"])
def test_clip_static_and_tapt_answer_as_the_method_says(toy, images, design):
    clip = toy_clip(toy, design)
    plain = clip.vanilla(images).softmax(-1)
    torch.testing.assert_close(answer(prepared(clip, "clip"), images).probabilities, plain)
    static = clip.static(images).softmax(-1)
    torch.testing.assert_close(answer(prepared(clip, "static"), images).probabilities, static)
    given = toy, clip.prompts, views(images), clip.texts
    tuned = tune(*given, statistics=clip.statistics, config=TuneConfig(**SMALL), after=True)
    prediction = answer(prepared(clip, "tapt"), images)
    torch.testing.assert_close(prediction.probabilities, tuned.logits.softmax(-1))
    trace = prediction.trace
    assert torch.equal(trace["kept"], tuned.kept)
    torch.testing.assert_close(trace["entropies"], tuned.entropies)
    for when in ("before", "after"):
        assert {len(value) for value in trace[when].values()} == {3}  # images first
        torch.testing.assert_close(trace[when]["total"], getattr(tuned, when).total)


def test_the_ensemble_is_the_mean_probability_of_the_kept_views(clip, images):
    logits = clip.static(views(images).flatten(0, 1)).view(3, 8, -1)
    kept = entropy(logits).argsort(-1)[:, :2]
    rows = torch.arange(3)[:, None]
    expected = logits[rows, kept].softmax(-1).mean(1)
    prediction = answer(prepared(clip, "ensemble"), images)
    torch.testing.assert_close(prediction.probabilities, expected)
    assert torch.equal(prediction.trace["kept"], kept)


def test_a_random_start_is_that_of_the_published_code(clip, images):
    random, own = (prepared(clip, "tapt", random_start=flag) for flag in (True, False))
    start = init_prompts(clip.backbone, clip.prompts.config)
    for name, tensor in start.tensors.items():
        assert torch.equal(random.clip.prompts.tensors[name], tensor)
    assert own.clip is clip
    one, other = (answer(d, images).probabilities for d in (random, own))
    assert not torch.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize("design", ["V", "VLI", "VLJ"])
def test_any_design_without_statistics(toy, clip, images, design):
    """Those that use no prompts answer the same whatever they are."""
    bare = replace(toy_clip(toy, design), statistics=None)
    for row in find_defenses(list_defenses()):
        one, other = (answer(prepared(c, row.name), images) for c in (bare, clip))
        assert one.probabilities.isfinite().all()
        assert row.uses_prompts or torch.equal(one.probabilities, other.probabilities)
        assert row.name != "tapt" or one.trace["before"]["clean"] is None


def test_only_selection_is_done_by_the_selection_model(toy, images):
    """In bfloat16; the answers of every defence are float32."""
    exact, fast = toy_clip(toy), toy_clip(toy, selection_model=toy.in_bfloat16())
    for name in ("clip", "static"):
        one, other = (answer(prepared(c, name), images).probabilities for c in (exact, fast))
        assert torch.equal(one, other)
    prediction = answer(prepared(fast, "ensemble"), images)
    kept, rows = prediction.trace["kept"], torch.arange(3)[:, None]
    logits = exact.static(views(images).flatten(0, 1)).view(3, 8, -1)
    assert not torch.allclose(prediction.trace["entropies"], entropy(logits), atol=1e-6)
    expected = logits[rows, kept].softmax(-1).mean(1)
    torch.testing.assert_close(prediction.probabilities, expected, atol=1e-6, rtol=0)


def test_what_several_defences_need_is_computed_once(clip, images, monkeypatch):
    passes, inner = [], base.encode_views
    monkeypatch.setattr(base, "encode_views", lambda *a, **k: passes.append(a) or inner(*a, **k))
    batch = ImageBatch(images, SEEDS)
    alone = answer(prepared(clip, "tapt"), images).probabilities
    assert len(passes) == 1
    prepared(clip, "ensemble").predict(batch)
    assert len(passes) == 2
    assert batch.reused == 0
    shared = prepared(clip, "tapt").predict(batch).probabilities
    assert len(passes) == 2
    assert batch.reused > 0  # seconds that its own time does not hold
    assert torch.equal(shared, alone)


@pytest.mark.parametrize("name", list_defenses()[2:])
def test_progress_ends_and_may_stop_a_prediction(clip, images, name):
    calls: list[tuple[int, int]] = []
    defense = prepared(clip, name)
    defense.predict(ImageBatch(images, SEEDS), on_progress=lambda *done: calls.append(done))
    assert calls[-1][0] == calls[-1][1]

    def stop(done: int, total: int) -> None:
        raise Cancelled("Stopped.")

    with pytest.raises(Cancelled):
        defense.predict(ImageBatch(images, SEEDS), on_progress=stop)
