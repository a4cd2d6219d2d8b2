"""Prompt layouts, their starting values, class sentences, and the errors of each."""

from __future__ import annotations

import pytest
import torch
from conftest import TOY_CLASSES

from tapt.core.backbone import Backbone
from tapt.core.errors import InputError
from tapt.core.prompts import PromptConfig, class_texts, image_logits, init_prompts, logits
from tapt.core.towers import encode_image, encode_text


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"design": "W"}, ["design", "V, VLI, VLJ", "'W'"]),
        ({"tokens": 0}, ["tokens", "from 1 to 1000", "0"]),
        ({"text_depth": 0}, ["text_depth", "whole number", "0"]),
        ({"design": "V", "template": "a cat"}, ["template", "one {}", "'a cat'"]),
        ({"design": "V", "template": "{} and {}"}, ["template", "one {}", "'{} and {}'"]),
        ({"template": None}, ["template", "text", "None"]),
        ({"context": "photo", "tokens": 2}, ["context", "'photo'", "2 prompt tokens"]),
    ],
)
def test_config_errors_name_field_rule_and_value(settings: dict, parts: list[str]):
    with pytest.raises(InputError) as error:
        PromptConfig(**settings)
    assert all(part in str(error.value) for part in parts), str(error.value)


@pytest.mark.parametrize("field", ["visual_depth", "text_depth"])
def test_a_depth_beyond_the_backbone_is_refused(toy: Backbone, field: str):
    config = PromptConfig("VLI", 2, **{"visual_depth": 3, "text_depth": 3, field: 4})
    with pytest.raises(InputError, match=f"{field} must be at most 3 on this backbone, got 4"):
        init_prompts(toy, config)


@pytest.mark.parametrize(
    ("design", "visual_depth", "text_depth"),
    [("V", 2, None), ("VLI", 2, 3), ("VLI", 3, None), ("VLJ", 3, 1), ("VLJ", 1, 3)],
)
def test_shapes_with_different_depths_per_tower(toy: Backbone, design, visual_depth, text_depth):
    image, text = toy.visual_width, toy.text_width  # 64, 32: a swapped tower would show
    prompts = init_prompts(toy, PromptConfig(design, 3, visual_depth, text_depth))
    visual, sets = (visual_depth, 3, image), (text_depth or visual_depth, 3, text)
    expected = {
        "V": {"visual": visual},
        "VLI": {"visual": visual, "text": sets},
        "VLJ": {
            "text": (3, 3, text),
            "projection.weight": (visual_depth, image, text),
            "projection.bias": (visual_depth, image),
        },
    }[design]
    assert {k: tuple(v.shape) for k, v in prompts.tensors.items()} == expected
    assert prompts.visual().shape == visual
    assert prompts.text() is None if design == "V" else prompts.text().shape == sets


def test_joint_visual_prompts_are_linear_maps_of_the_text_prompts(toy: Backbone):
    prompts = init_prompts(toy, PromptConfig("VLJ", 2, 2, 3))
    weight, bias = prompts.tensors["projection.weight"], prompts.tensors["projection.bias"]
    for depth in range(2):
        expected = torch.nn.functional.linear(
            prompts.tensors["text"][depth], weight[depth], bias[depth]
        )
        torch.testing.assert_close(prompts.visual()[depth], expected)
    batch = prompts.batch(2)
    torch.testing.assert_close(batch.visual(), prompts.visual().expand(2, -1, -1, -1))
    assert batch.tensors["text"][1].shape == prompts.tensors["text"].shape


def test_a_batch_holds_independent_copies(toy: Backbone):
    prompts = init_prompts(toy, PromptConfig("V", 2, 1))
    batch = prompts.batch(2)
    batch.tensors["visual"][0] += 1
    assert torch.equal(batch.tensors["visual"][1], prompts.tensors["visual"])
    assert not torch.equal(batch.tensors["visual"][0], prompts.tensors["visual"])


@pytest.mark.parametrize("tokens", [1, 2, 4])
@pytest.mark.parametrize("design", ["VLI", "VLJ"])
def test_the_first_text_vectors_are_word_embeddings(toy: Backbone, design: str, tokens: int):
    config = PromptConfig(design, tokens, 2)
    assert config.context == "a photo of a"
    ids = toy.tokenize(["a photo of a"])[0, 1 : 1 + tokens]
    first = init_prompts(toy, config).tensors["text"][0]
    assert torch.equal(first, toy.text.token_embedding.weight[ids])


def test_word_vectors_in_the_first_set_alone_change_nothing(toy: Backbone):
    """The vectors stand exactly where the words stood."""
    config = PromptConfig("VLI", 2, 1, 1)
    texts = class_texts(toy, TOY_CLASSES, config)
    prompts = init_prompts(toy, config)
    plain = torch.nn.functional.normalize(encode_text(toy, texts.tokens), dim=-1)
    torch.testing.assert_close(texts.features(toy, prompts), plain, atol=1e-6, rtol=0)


def test_more_than_four_tokens_use_placeholders_and_random_vectors(toy: Backbone):
    config = PromptConfig("VLI", 5, 2)
    assert config.sentences(["cat"]) == ["X X X X X cat."]
    ids = toy.tokenize(["X"])[0, 1]
    first = init_prompts(toy, config).tensors["text"][0]
    assert not torch.equal(first[0], toy.text.token_embedding.weight[ids])
    assert 0.015 < float(first.std()) < 0.025


def test_a_seed_decides_the_start_behind_the_words(toy: Backbone):
    config = PromptConfig("VLJ", 2, 3)
    one, same, other = (init_prompts(toy, config, seed=seed) for seed in (1, 1, 2))
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor, same.tensors[name])
        assert not torch.equal(tensor, other.tensors[name])
    assert torch.equal(one.tensors["text"][0], other.tensors["text"][0])
    bound = toy.text_width**-0.5
    for name in ("projection.weight", "projection.bias"):
        assert one.tensors[name].abs().max() <= bound
        assert one.tensors[name].std() > bound / 2.5


def test_sentences():
    names = ["sports_car", "{brace}", "50%"]
    assert PromptConfig("V", template="a photo of a {}, a type of pet.").sentences(names) == [
        "a photo of a sports car, a type of pet.",
        "a photo of a {brace}, a type of pet.",
        "a photo of a 50%, a type of pet.",
    ]
    assert PromptConfig("V", template="{} {0}").sentences(["cat"]) == ["cat {0}"]
    assert PromptConfig("VLI", 2).sentences(names)[0] == "a photo of a sports car."
    assert PromptConfig("VLI", 2, context="an x-ray").sentences(["hand"]) == ["an x-ray hand."]


def test_class_texts_are_fixed_for_v_and_follow_the_prompts_otherwise(toy: Backbone):
    plain = class_texts(toy, TOY_CLASSES)
    fixed = class_texts(toy, TOY_CLASSES, PromptConfig("V", 2, 2))
    assert torch.equal(plain.fixed, fixed.fixed)
    assert torch.equal(fixed.features(toy, init_prompts(toy, PromptConfig("V", 2, 2))), plain.fixed)
    torch.testing.assert_close(plain.fixed.norm(dim=-1), torch.ones(3))
    config = PromptConfig("VLI", 2, 2)
    texts = class_texts(toy, TOY_CLASSES, config)
    assert texts.fixed is None
    one, other = (texts.features(toy, init_prompts(toy, config, seed=s)) for s in (0, 1))
    assert one.shape == (3, 32)
    assert not torch.allclose(one, other)


def test_no_classes_is_refused(toy: Backbone):
    with pytest.raises(InputError, match="at least one class name"):
        class_texts(toy, [])


def test_logits_are_scaled_cosines(toy: Backbone):
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    texts = class_texts(toy, TOY_CLASSES)
    image_features, text_features, scale = toy.model(
        toy.normalize(pixels), toy.tokenize([f"a photo of a {c}." for c in TOY_CLASSES], cut=False)
    )
    expected = scale * image_features @ text_features.T
    torch.testing.assert_close(logits(toy, pixels, texts.fixed), expected, atol=1e-4, rtol=0)


def test_prompts_change_the_logits(toy: Backbone):
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    texts = class_texts(toy, TOY_CLASSES)
    prompts = init_prompts(toy, PromptConfig("V", 2, 3))
    plain, prompted = logits(toy, pixels, texts.fixed), logits(toy, pixels, texts.fixed, prompts)
    assert not torch.allclose(plain, prompted, atol=1e-4)
    features, _ = encode_image(toy, pixels, prompts.visual())
    assert torch.equal(prompted, image_logits(toy, features, texts.fixed))
