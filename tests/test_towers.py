"""The prompted towers against open_clip's own passes, and the places where prompts go in."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from conftest import local_backbone, toy_config, write_backbone
from torch import Tensor

from tapt.core import towers
from tapt.core.backbone import Backbone
from tapt.core.towers import encode_image, encode_text

SENTENCES = ["a photo of a cat.", "a photo of a very large sports car.", "dog"]


def _changed(*, vision: dict | None = None, text: dict | None = None, **top: object) -> dict:
    config = toy_config(**(text or {}))
    return {**config, "vision_cfg": {**config["vision_cfg"], **(vision or {})}, **top}


VARIANTS = {
    "plain": _changed(),
    "custom-text": _changed(custom_text=True),
    "quick-gelu": _changed(quick_gelu=True),
    "average-pool": _changed(vision={"pool_type": "avg"}),
    "pool-then-norm": _changed(vision={"pool_type": "avg", "final_ln_after_pool": True}),
    "no-ln-pre": _changed(vision={"no_ln_pre": True}),
    "layer-scale": _changed(vision={"ls_init_value": 0.5}, text={"ls_init_value": 0.5}),
    "qk-norm": _changed(vision={"qk_norm": True}, text={"qk_norm": True}),
    "projection-bias": _changed(text={"proj_bias": True}, custom_text=True),
    "both-directions": _changed(text={"no_causal_mask": True}, custom_text=True),
    "eos-pool": _changed(text={"pool_type": "eos", "eos_id": 49407}),
    "coca": _changed(
        vision={"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        text={"context_length": 23, "embed_cls": True, "output_tokens": True},
        multimodal_cfg={"context_length": 23, "width": 32, "heads": 2, "layers": 1},
        custom_text=True,
    ),
}
UNCUT = ("both-directions", "coca")  # features there depend on the padding or stand at the end


def build(folder: Path, config: dict) -> Backbone:
    """A CLIP of this configuration in which no parameter keeps a neutral initial value."""
    kind = open_clip.CLIP
    if config.get("custom_text"):
        kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP
    torch.manual_seed(0)
    model = kind(**{k: v for k, v in config.items() if k != "custom_text"})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.nan_to_num_(0, 0, 0).clamp_(-1, 1)  # CoCa leaves some as the memory was
            parameter += 0.05 * torch.randn_like(parameter)
    weights = {k: v.contiguous() for k, v in model.state_dict().items()}
    return local_backbone(write_backbone(folder, config, weights))


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, build(folder, VARIANTS[request.param])


def images(count: int) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def random(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(mine: Tensor, theirs: Tensor) -> None:
    """Exactly equal without gradients; with them, where attention has other kernels, nearly."""
    close = 1e-5 if mine.requires_grad else 0
    torch.testing.assert_close(mine, theirs, atol=close, rtol=close)


def own(encode, *arguments: Tensor) -> Tensor:
    """open_clip's features before normalisation; CoCa normalises unless told not to."""
    return encode(*arguments, normalize=False)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad], ids=["no-grad", "grad"])
def test_without_prompts_the_towers_are_open_clips_own(variant, mode):
    name, backbone = variant
    expected_kind = {"coca": open_clip.CoCa, "custom-text": open_clip.CustomTextCLIP}
    assert isinstance(backbone.model, expected_kind.get(name, torch.nn.Module))
    tokens = backbone.tokenize(SENTENCES, cut=False)
    assert tokens.shape == (3, backbone.context_length)
    with mode():
        pixels = images(3).requires_grad_(torch.is_grad_enabled())
        features, hidden = encode_image(backbone, pixels)
        assert hidden == []
        same(features, own(backbone.model.encode_image, backbone.normalize(pixels)))
        same(encode_text(backbone, tokens), own(backbone.model.encode_text, tokens))


def test_the_gradient_for_pixels_is_open_clips_own(variant):
    _, backbone = variant
    mine, theirs = images(2).requires_grad_(), images(2).requires_grad_()
    encode_image(backbone, mine)[0].square().sum().backward()
    own(backbone.model.encode_image, backbone.normalize(theirs)).square().sum().backward()
    largest = theirs.grad.abs().max()
    assert largest > 0
    torch.testing.assert_close(mine.grad, theirs.grad, atol=float(1e-4 * largest), rtol=0)


def test_the_gradient_for_text_prompts_is_that_of_every_attention_kernel(variant, monkeypatch):
    _, backbone = variant
    tokens = backbone.tokenize(SENTENCES)

    def gradient() -> Tensor:
        prompts = random(2, 2, backbone.text_width).requires_grad_()
        encode_text(backbone, tokens, prompts).square().sum().backward()
        return prompts.grad

    in_steps = gradient()
    monkeypatch.setattr(towers, "SHORT", 0)
    fused = gradient()
    largest = fused.abs().max()
    assert largest > 0
    torch.testing.assert_close(in_steps, fused, atol=float(1e-4 * largest), rtol=0)


def test_cut_sentences_have_the_same_features(variant):
    name, backbone = variant
    whole, cut = backbone.tokenize(SENTENCES, cut=False), backbone.tokenize(SENTENCES)
    if name in UNCUT:
        assert torch.equal(whole, cut)
        return
    assert cut.shape[1] == 11  # SOS, nine tokens of the longest sentence, EOT
    for prompts in (None, random(2, 2, backbone.text_width)):
        features = (encode_text(backbone, tokens, prompts) for tokens in (cut, whole))
        torch.testing.assert_close(*features, atol=1e-5, rtol=0)


def test_visual_prompts_stand_behind_the_patches_and_are_replaced_per_block(variant):
    """Every block's input is checked, then the whole pass is repeated from those inputs."""
    _, backbone = variant
    visual, blocks = backbone.visual, backbone.visual.transformer.resblocks
    depth, n = 2, 3
    prompts = random(depth, n, backbone.visual_width)
    pixels = images(2)
    features, hidden = encode_image(backbone, pixels, prompts, hidden=range(len(blocks)))
    assert [t.shape for t in hidden] == [(2, backbone.image_tokens + n, backbone.visual_width)] * 3
    _, some = encode_image(backbone, pixels, prompts, hidden=(0, 2))
    assert [torch.equal(*pair) for pair in zip(some, hidden[::2], strict=True)] == [True, True]

    first = visual.ln_pre(prompts[0]).expand(2, -1, -1)
    embedded = visual._embeds(backbone.normalize(pixels))
    assert torch.equal(hidden[0], torch.cat([embedded, first], dim=1))
    for index, (states, block) in enumerate(zip(hidden, blocks, strict=True)):
        out = block(states)
        if index + 1 < depth:  # the prompts' outputs are dropped, fresh ones take their place
            expected = torch.cat([out[:, :-n], prompts[index + 1].expand(2, -1, -1)], dim=1)
            assert torch.equal(hidden[index + 1], expected)
        elif index + 1 < len(blocks):  # behind the depth they pass through
            assert torch.equal(hidden[index + 1], out)
    pooled, _ = visual._pool(out[:, :-n])
    assert torch.equal(features, pooled @ visual.proj)


def text_inputs(backbone: Backbone, *arguments: Tensor) -> list[Tensor]:
    """The input of every text block."""
    seen: list[Tensor] = []
    hooks = [
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for block in backbone.text.transformer.resblocks
    ]
    encode_text(backbone, *arguments)
    for hook in hooks:
        hook.remove()
    return seen


def test_text_prompts_take_the_places_behind_sos_and_only_the_first_get_positions(variant):
    _, backbone = variant
    depth, n = 2, 2
    prompts = random(depth, n, backbone.text_width)
    tokens = backbone.tokenize(SENTENCES)
    plain, seen = text_inputs(backbone, tokens), text_inputs(backbone, tokens, prompts)
    positions = backbone.text.positional_embedding[1 : 1 + n]
    for item in range(len(SENTENCES)):
        assert torch.equal(seen[0][item, 1 : 1 + n], prompts[0] + positions)
        assert torch.equal(seen[1][item, 1 : 1 + n], prompts[1])
        assert not torch.allclose(seen[2][item, 1 : 1 + n], prompts[1])
    rest = [0, *range(1 + n, seen[0].shape[1])]
    assert torch.equal(seen[0][:, rest], plain[0][:, rest])


def test_image_groups_equal_each_group_alone(variant):
    _, backbone = variant
    prompts = random(2, 2, 3, backbone.visual_width)  # (G, D, n, width)
    pixels = images(6)
    features, hidden = encode_image(backbone, pixels, prompts, hidden=(0, 2))
    for group in range(2):
        run = slice(3 * group, 3 * group + 3)
        alone, alone_hidden = encode_image(backbone, pixels[run], prompts[group], hidden=(0, 2))
        torch.testing.assert_close(features[run], alone, atol=1e-5, rtol=1e-5)
        for states, alone_states in zip(hidden, alone_hidden, strict=True):
            torch.testing.assert_close(states[run], alone_states, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(
        encode_image(backbone, pixels[:3], prompts[1])[0], features[:3], atol=1e-3
    )


def test_text_groups_equal_each_group_alone(variant):
    _, backbone = variant
    prompts = random(2, 2, 2, backbone.text_width)
    tokens = backbone.tokenize(SENTENCES)
    features = encode_text(backbone, tokens, prompts)
    assert features.shape == (2, 3, 32)
    for group in range(2):
        alone = encode_text(backbone, tokens, prompts[group])
        torch.testing.assert_close(features[group], alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(features[0], features[1], atol=1e-3)


def test_prompts_leave_nothing_on_the_model(toy: Backbone):
    tokens = toy.tokenize(SENTENCES)
    before = encode_image(toy, images(2))[0], encode_text(toy, tokens)
    visual = random(3, 2, toy.visual_width).requires_grad_()
    text = random(3, 2, toy.text_width).requires_grad_()
    loss = encode_image(toy, images(2), visual)[0].sum() + encode_text(toy, tokens, text).sum()
    loss.backward()
    assert visual.grad.abs().sum() > 0
    assert text.grad.abs().sum() > 0
    assert all(p.grad is None for p in toy.model.parameters())
    assert torch.equal(encode_image(toy, images(2))[0], before[0])
    assert torch.equal(encode_text(toy, tokens), before[1])
