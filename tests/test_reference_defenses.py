"""Five papers' published code (tests/reference/README.md), met to its tolerances.

`TAPT_REFERENCE_DEFENSES=/path/prefix` reads `prefix.json` and `prefix.safetensors` instead.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import reference_backbone
from safetensors.torch import load_file
from torch import Tensor

from tapt.core.backbone import Backbone
from tapt.core.clip import PromptedClip
from tapt.core.losses import entropy
from tapt.core.prompts import class_texts, image_logits, init_prompts
from tapt.core.towers import encode_image
from tapt.defenses import base, context, dbd, text_prompts, ttc

HERE = Path(__file__).parent / "reference" / "defenses"
PREFIX = os.environ.get("TAPT_REFERENCE_DEFENSES") or str(HERE)
SPEC = json.loads(Path(PREFIX + ".json").read_text())
DEFENSES = ("tpt", "rtpt", "sstpt", "ttc", "dbd")


def entries(*names: str) -> list[str]:
    return [k for k, v in SPEC.items() if isinstance(v, dict) and v.get("defense") in names]


@pytest.mark.parametrize("name", DEFENSES)
def test_there_are_entries(name: str):
    assert entries(name), f"{PREFIX}.json has no entry whose defense is {name}"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return reference_backbone(tmp_path_factory.mktemp("reference"), SPEC)


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return load_file(PREFIX + ".safetensors")


class Case:
    """One entry; `met` compares one tensor of it, and no tensor of it may stay unmet."""

    def __init__(self, prefix: str, backbone: Backbone, tensors: dict[str, Tensor]) -> None:
        self.spec, self.backbone = SPEC[prefix], backbone
        self.name = self.spec["defense"]
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        self.expected = own
        row = base.find_defense(self.name)
        fields = {k: v for k, v in self.spec.items() if k in row.settings.model_fields}
        self.settings = row.settings(**fields)
        classes, template = tuple(self.spec["classes"]), self.spec["template"]
        prompts = init_prompts(backbone, context.CONTEXT)
        self.clip = PromptedClip(backbone, prompts, None, classes, template)
        self.prepared = row.prepare(self.clip, self.settings)
        if "context" in self.spec:
            words, count = self.spec["context"], self.spec["context_tokens"]
            config = context.CONTEXT.updated(context=words, tokens=count)
            self.prepared.start = context.start_context(backbone, config)
            self.prepared.texts = class_texts(backbone, classes, config)
        self.unmet = set(own) - {"views", "images", "changed_views", "delta0"}

    def met(self, name: str, actual: Tensor, absolute=0.0, relative=0.0, largest=0.0) -> None:
        expected = self.expected[name]
        absolute = max(absolute, largest * expected.abs().max().item())
        actual = actual.detach().reshape(expected.shape).to(expected.dtype)
        torch.testing.assert_close(
            actual, expected, atol=absolute, rtol=relative, msg=lambda m: f"{name}: {m}"
        )
        self.unmet.discard(name)

    def met_set(self, name: str, actual: Tensor) -> None:
        assert set(actual.flatten().tolist()) == set(self.expected[name].tolist()), name
        self.unmet.discard(name)

    def ranked(self, name: str, kept: Tensor) -> Tensor:
        """Places in `kept` of the expected views, in the order of the reference."""
        order = kept.flatten().tolist()
        return torch.tensor([order.index(view) for view in self.expected[name].tolist()])


@pytest.fixture
def case(request: pytest.FixtureRequest, backbone, tensors) -> Case:
    return Case(request.param, backbone, tensors)


def cases(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", entries(*names), indirect=True)


@cases(*DEFENSES)
def test_sentences(case: Case):
    """Texts are those of the reference, to the last token."""
    texts = case.clip.vanilla_texts.tokens
    if case.name in ("tpt", "rtpt", "sstpt"):
        texts = case.prepared.texts.tokens
    expected = case.backbone.tokenize(case.spec["texts"])
    assert torch.equal(texts, expected)


def views_met(case: Case, text: Tensor) -> tuple[Tensor, Tensor]:
    """Features (1, V, E) and logits (1, V, C) of the views before tuning."""
    views = case.expected["views"][None]
    batch = base.ImageBatch(views[:, 0], [0])
    features = text_prompts.view_features(batch, case.backbone, views)
    logits = text_prompts.similarity(case.backbone, features, text)
    case.met("image_features", features, 1e-5)
    case.met("text_features", text, 1e-5)
    case.met("logits", logits, 1e-4)
    case.met("entropies", entropy(logits), 2e-5)
    return features, logits


def batch_of(views: Tensor) -> base.ImageBatch:
    """An image that already has its views."""
    batch = base.ImageBatch(views[None, 0], [0])
    batch.shared(("views", len(views)), lambda: views[None])
    return batch


@cases("tpt", "rtpt", "sstpt")
def test_text_prompts(case: Case, monkeypatch: pytest.MonkeyPatch):
    backbone, settings, expected = case.backbone, case.settings, case.expected
    features, _ = views_met(case, case.prepared.text_features)
    assert torch.equal(case.prepared.start.tensors["text"][0], expected["context"])
    case.unmet.discard("context")

    tuned = {}
    inner = context.tune_context

    def spied(*args, **options):
        tuned["text"], tuned["steps"] = inner(*args, **options)
        return tuned["text"], tuned["steps"]

    monkeypatch.setattr(text_prompts, "tune_context", spied)
    changed = expected.get("changed_views")
    monkeypatch.setattr(text_prompts, "slight_change", lambda views, generator: changed)
    trace = case.prepared.predict(batch_of(expected["views"])).trace
    batch = batch_of(expected["views"])
    answer = case.prepared.frozen_logits(batch, case.prepared.freeze(batch))
    case.met("final_logits", answer, 2e-4 if case.name == "sstpt" else 1e-4)
    case.met_set("selected", trace["kept"])
    assert len(tuned["steps"]) == settings.steps
    for number, step in enumerate(tuned["steps"], 1):
        case.met(f"context_grad.{number}", step.gradient, largest=1e-4)
        case.met(f"tuned_context.{number}", step.context, 5e-6)
    case.met("loss", trace["loss"], relative=2e-5)
    if case.name != "tpt":
        case.met("tuned_logits", text_prompts.similarity(backbone, features, tuned["text"]), 1e-4)
        case.met("weights", trace["weights"], relative=3e-4 if case.name == "rtpt" else 3e-3)
    if case.name == "rtpt":
        case.met("reliability", trace["reliability"], 1e-5)
    if case.name == "sstpt":
        changed_features = text_prompts.encode_unit(backbone, changed[None])
        text = case.prepared.text_features
        case.met("changed_logits", text_prompts.similarity(backbone, changed_features, text), 1e-4)
        for name in ("divergence", "stability"):
            case.met(name, trace[name], relative=1.5e-3)
        case.met("suitability", trace["suitability"], relative=2e-5)
        weights = trace["kept_weights"][0, case.ranked("selected", trace["kept"])]
        case.met("selected_weights", weights, relative=3e-3)
        case.met("entropy_loss", trace["entropy_loss"], relative=2e-5)
        case.met("consistency_loss", trace["consistency_loss"], relative=7e-4)
    assert not case.unmet


@cases("ttc")
def test_ttc(case: Case, monkeypatch: pytest.MonkeyPatch):
    backbone, expected = case.backbone, case.expected
    images, noise = expected["images"], expected["delta0"]
    text = case.clip.vanilla.text_features
    features, _ = encode_image(backbone, images)
    case.met("features", features, largest=1e-5)
    case.met("text_features", text, 1e-5)
    case.met("logits", image_logits(backbone, features, text), 1e-4)

    found = ttc.counterattack(backbone, images, noise, case.settings)
    case.met("tau", found.tau, relative=1.5e-4)
    case.met("weights", found.weights, 1e-5)
    case.met("loss", found.losses.sum(0), relative=1e-4)
    case.met("grad.1", found.gradients[0], largest=3e-4)
    for name, actual in (("deltas", found.deltas), ("delta", found.delta)):
        share = ((actual - expected[name]).abs() <= 1e-6).float().mean()
        assert share >= 0.995, (name, share)
        case.unmet.discard(name)

    monkeypatch.setattr(ttc, "draw_noise", lambda batch, epsilon: noise)
    batch = base.ImageBatch(images, range(len(images)))
    case.met("final_logits", case.prepared.logits(batch), 1e-4)
    torch.testing.assert_close(case.prepared.predict(batch).trace["tau"], found.tau)
    assert not case.unmet


@cases("dbd")
def test_dbd(case: Case, monkeypatch: pytest.MonkeyPatch):
    backbone, expected, spec = case.backbone, case.expected, case.spec
    described = spec.get("descriptions")
    text = dbd.class_features(backbone, spec["classes"], spec["template"], described)
    features, logits = views_met(case, text)
    found = dbd.direction(features, logits, case.settings)
    case.met_set("reference_views", found.references)
    order = case.ranked("reference_views", found.references)
    case.met("directions", found.directions[0, order], largest=1e-4)
    case.met("direction", found.direction, largest=1e-4)
    case.met("similarities", found.similarities[0, order], 1e-4)
    case.met("bias_score", found.score, 2e-5)
    assert found.factor.item() == spec["factor"]
    case.met("final_features", found.features, largest=1e-5)

    views = expected["views"]
    monkeypatch.setattr(dbd, "changed_views", lambda image, generator: views[1:])
    case.clip.vanilla.text_features = text
    case.met("final_logits", case.prepared.logits(base.ImageBatch(views[:1], [0])), 1e-4)
    assert not case.unmet
