"""Loading, preprocessing and tokenising; nothing here reaches the network."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from conftest import toy_config, write_backbone
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import QuickGELU
from PIL import Image
from safetensors.torch import load_file

from tapt.core.backbone import Backbone
from tapt.core.errors import BackboneError, InputError
from tapt.files import file_sha256
from tapt.packs import backbones
from tapt.packs.backbones import CONFIG_FILE, OPENAI_NAMES, WEIGHTS_FILE, usable_device
from tapt.packs.hub import HubId, Origin, Snapshot


def load_backbone(name: str, **options: object) -> Backbone:
    return backbones.load_backbone(name, **options)[0]


def load_folder(folder: Path, **options: object) -> Backbone:
    return load_backbone(f"local-dir:{folder}", device="cpu", **options)


def refused(folder: Path) -> str:
    with pytest.raises(BackboneError) as error:
        load_folder(folder)
    return str(error.value)


@pytest.fixture
def copy(toy_folder: Path, tmp_path: Path) -> Path:
    """The toy's folder, to be damaged."""
    return Path(shutil.copytree(toy_folder, tmp_path / "toy"))


@pytest.fixture
def tiny_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip's names and tags with the toy's architecture behind them."""
    for name in (*OPENAI_NAMES, "ViT-B-32-quickgelu"):
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, toy_config())


def reconfigure(folder: Path, part: str, **changes: object) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (config if part == "preprocess_cfg" else config["model_cfg"])[part].update(changes)
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def test_a_folder_loads_frozen_and_in_eval_mode(toy: Backbone, toy_folder: Path):
    assert not any(m.training for m in toy.model.modules())
    assert not any(p.requires_grad for p in toy.model.parameters())
    assert toy.source == toy.name == f"local-dir:{toy_folder}"
    assert (toy.revision, toy.sha256) == (None, file_sha256(toy_folder / WEIGHTS_FILE))
    assert (toy.device.type, toy.dtype) == ("cpu", torch.float32)
    visual = {"image_size": 32, "image_tokens": 17, "visual_width": 64, "visual_blocks": 3}
    assert toy.architecture == {**visual, "text_width": 32, "text_blocks": 3, "context_length": 24}
    for name, tensor in load_file(toy_folder / WEIGHTS_FILE).items():
        assert torch.equal(toy.model.state_dict()[name], tensor), name
    exact = load_folder(toy_folder, dtype=torch.float64)
    assert exact.normalize(torch.rand(1, 3, 32, 32)).dtype == exact.dtype == torch.float64


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_missing_file_is_an_error_never_a_random_model(copy: Path, file: str):
    (copy / file).unlink()
    assert f"has no {file}" in refused(copy)


@pytest.mark.parametrize("kept", [0, 1000, -1])
def test_truncated_weights(copy: Path, kept: int):
    weights = copy / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:kept])
    (copy / "open_clip_pytorch_model.bin").write_bytes(b"a pickle that must not be tried")
    assert "is not a complete safetensors file" in refused(copy)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"model_cfg": []}', '{"model_cfg": {"vision_cfg": {}}}', "[" * 99999]
)
def test_a_broken_config(copy: Path, text: str):
    (copy / CONFIG_FILE).write_text(text)
    assert "does not describe a CLIP that can be used" in refused(copy)


CONFIGS = [
    ("vision_cfg", {"layers": 4}, "do not fit its architecture"),
    ("vision_cfg", {"width": 96}, "do not fit its architecture"),
    ("vision_cfg", {"pool_type": "none-such"}, "do not fit its architecture"),
    ("vision_cfg", {"layers": 10**9}, "vision_cfg.layers must be a whole number from 1 to 200"),
    ("vision_cfg", {"layers": 150}, "far larger than they"),
    ("vision_cfg", {"width": 99_999}, "do not fit its architecture"),
    ("vision_cfg", {"width": 2**70}, "vision_cfg.width must be a whole number from 1 to"),
    ("vision_cfg", {"image_size": 10**9}, "image_size must be a whole number from 1 to 2048"),
    ("vision_cfg", {"image_size": [32, 10**9]}, "image_size must be a whole number"),
    ("vision_cfg", {"image_size": 2000, "patch_size": 1, "pos_embed_type": "sin_cos_2d"}, "far"),
    ("vision_cfg", {"mlp_ratio": 1e300}, "do not fit its architecture"),
    ("vision_cfg", {"patch_size": 0}, "patch_size must be a whole number from 1"),
    ("vision_cfg", {"timm_model_name": "convnext_base"}, "image tower"),
    ("text_cfg", {"layers": 10**9}, "text_cfg.layers must be a whole number from 1 to 200"),
    ("text_cfg", {"layers": "many"}, "text_cfg.layers must be a whole number from 1 to 200"),
    ("text_cfg", {"width": 2**20}, "far larger than they"),
    ("text_cfg", {"context_length": 10**6}, "far larger than they"),
    ("text_cfg", {"vocab_size": 10**12}, "do not fit its architecture"),
    ("text_cfg", {"vocab_size": 100}, "vocab_size must be a whole number of at least 49408"),
    ("text_cfg", {"tokenizer_kwargs": {"bpe_path": "../x.gz"}}, "bpe_path is unknown"),
    ("preprocess_cfg", {"mean": [0.5]}, "mean must be three numbers from -10 to 10"),
    ("preprocess_cfg", {"mean": "abc"}, "mean must be three numbers from -10 to 10"),
    ("preprocess_cfg", {"std": [1, 1, 0]}, "std must be three numbers above 0"),
    ("preprocess_cfg", {"resize_mode": "../x"}, "resize_mode must be one of shortest"),
]


@pytest.mark.parametrize(("part", "change", "sentence"), CONFIGS)
def test_a_config_that_does_not_fit_is_refused_before_the_build(copy, part, change, sentence):
    reconfigure(copy, part, **change)
    old = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 500_000_000, old[1]))
    try:
        assert sentence in refused(copy)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def test_position_embeddings_of_another_image_size_are_resized(copy: Path):
    reconfigure(copy, "vision_cfg", image_size=48)
    assert load_folder(copy).image_tokens == 37


@pytest.mark.parametrize("name", ["", "ViT-Z-99", "ViT-B-32:no-such-tag", "tiny:x"])
def test_unknown_names_get_the_choices(name: str):
    with pytest.raises(BackboneError, match="is unknown") as error:
        load_backbone(name)
    message = str(error.value)
    assert all(choice in message for choice in ("tiny", *OPENAI_NAMES, "hf-hub:", "local-dir:"))
    assert name != "ViT-B-32:no-such-tag" or "laion2b_s34b_b79k" in message  # a tag that there is


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("random:ViT-Z-99", {}, "no architecture 'ViT-Z-99'"),
        ("hf-hub:one/two/three", {}, "not a Hub id; write owner/name"),
        *((n, {"revision": "v1"}, "has no revision") for n in ("tiny", "local-dir:x", "random:x")),
        *(("tiny", {"device": d}, f"no device '{d}'") for d in ("abacus", "cuda:99", "meta", "")),
        ("random:RN50", {}, "image tower of 'random:RN50' is a ResNet"),
        ("RN50:openai", {}, "image tower of 'RN50:openai' is a ResNet"),
        ("random:ViT-B-16-SigLIP", {}, "is timm's vit_base_patch16_siglip_224"),
        ("random:roberta-ViT-B-32", {}, "text tower of .* is transformers' roberta-base"),
    ],
)
def test_what_cannot_be_loaded_is_refused_before_a_fetch(name, options, sentence, monkeypatch):
    monkeypatch.setattr(backbones, "snapshot", lambda *_: pytest.fail("fetched"))
    monkeypatch.setattr(open_clip, "create_model", lambda *_: pytest.fail("built"))
    with pytest.raises(BackboneError, match=sentence):
        load_backbone(name, **options)


@pytest.mark.usefixtures("tiny_architectures")
def test_random_weights_are_the_same_every_time_and_leave_the_global_state():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = load_backbone("random:ViT-B-32")
    assert torch.equal(torch.get_rng_state(), state)
    assert (one.device, one.sha256) == (usable_device(), None)
    torch.manual_seed(6)
    other = load_backbone("random:ViT-B-32")
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[name]), name


@pytest.mark.usefixtures("tiny_architectures")
@pytest.mark.parametrize(
    ("name", "quick"),
    [*((n, True) for n in OPENAI_NAMES), ("ViT-B-32:laion2b_s34b_b79k", False)],
)
def test_openais_weights_run_with_quick_gelu(name, quick, toy_folder, monkeypatch):
    asked = []

    def snapshot(where: HubId, files: dict[str, int], **_: object) -> Snapshot:
        asked.append((where, list(files)))
        return Snapshot(toy_folder, Origin(where.repo, "c0ffee", 1, False), {WEIGHTS_FILE: ""})

    monkeypatch.setattr(backbones, "snapshot", snapshot)
    backbone = load_backbone(name, revision="main", device="cpu")
    architecture, _, tag = name.partition(":")
    pretrained = open_clip.get_pretrained_cfg(architecture, tag or "openai")
    assert asked == [((pretrained["hf_hub"].strip("/"), "", "main"), [WEIGHTS_FILE])]
    for tower in (backbone.visual, backbone.text):
        assert isinstance(tower.transformer.resblocks[0].mlp.gelu, QuickGELU) == quick
    assert backbone.revision == "c0ffee"
    assert backbone.sha256 == file_sha256(toy_folder / WEIGHTS_FILE)
    assert tuple(backbone.visual.preprocess_cfg["mean"]) == tuple(pretrained["mean"])


def test_embedded_folders_are_found_by_name(monkeypatch, toy_folder: Path, tmp_path: Path):
    monkeypatch.setattr(backbones, "EMBEDDED", tmp_path)
    for name in ("tiny", "small"):
        shutil.copytree(toy_folder, tmp_path / name / "backbone")
    assert backbones.embedded_backbones() == ["small", "tiny"]
    backbone = load_backbone("small", device="cpu")
    assert backbone.name == backbone.source == "small"
    assert backbones.is_public("small")


def test_custom_text_towers_are_found(tmp_path: Path):
    model = open_clip.CustomTextCLIP(**toy_config())
    weights = {k: v.contiguous() for k, v in model.state_dict().items()}
    folder = write_backbone(tmp_path / "custom", {**toy_config(), "custom_text": True}, weights)
    backbone = load_folder(folder)
    assert backbone.text is backbone.model.text
    assert (backbone.text_width, backbone.text_blocks, backbone.context_length) == (32, 3, 24)


def test_a_long_sentence_is_refused_by_name_and_nothing_is_cut_off(toy: Backbone):
    fits, long = "a photo of a " + "cat " * 18, "a photo of a " + "dog " * 19
    assert toy.tokenize([fits]).shape == (1, 24)
    with pytest.raises(InputError, match=r'^"a photo of a dog dog.* has 23 tokens; .* at most 22'):
        toy.tokenize(["a photo of a cat.", long, fits])
    with pytest.raises(InputError, match="has at least 94 tokens") as error:
        toy.tokenize(["dog " * 5000])
    assert len(str(error.value)) < 200


def test_tokens_are_open_clips_own_up_to_eot(toy: Backbone):
    # the piece "!" has the padding's id, 0
    sentences = ["a photo of a !%.", "a photo of a !%", "dog"]
    whole, cut = toy.tokenize(sentences, cut=False), toy.tokenize(sentences)
    assert torch.equal(whole, open_clip.get_tokenizer("ViT-B-32")(sentences, context_length=24))
    assert 0 in cut[1, : int(cut[1].argmax())]
    assert torch.equal(cut, whole[:, : cut.shape[1]])
    assert (whole[:, cut.shape[1] :] == 0).all()
    assert (cut == 49407).sum(1).tolist() == [1, 1, 1]


def noise(width: int, height: int) -> Image.Image:
    values = np.random.RandomState(0).randint(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize(
    ("size", "mode"),
    [
        *((size, "shortest") for size in ((32, 32), (100, 60), (33, 71), (5, 9), (1, 1))),
        *((size, "shortest") for size in ((640, 80), (2048, 64), (64, 2048))),
        ((640, 20), "squash"),  # which keeps its ends
    ],
)
def test_preprocessing_is_open_clips_own_in_eight_bits(copy: Path, size: tuple, mode: str):
    reconfigure(copy, "preprocess_cfg", resize_mode=mode)
    config = json.loads((copy / CONFIG_FILE).read_text())["preprocess_cfg"]
    backbone = load_folder(copy)
    pixels = backbone.preprocess(noise(*size))
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, 32, 32))
    cfg = PreprocessCfg(**{**backbone.visual.preprocess_cfg, **config})
    normalised = image_transform_v2(cfg, is_train=False)(noise(*size))
    mean, std = torch.tensor(cfg.mean)[:, None, None], torch.tensor(cfg.std)[:, None, None]
    assert torch.equal(pixels, ((normalised * std + mean) * 255).round().to(torch.uint8))
    torch.testing.assert_close(backbone.normalize(pixels / 255), normalised, atol=1e-5, rtol=0)


def test_an_extreme_picture_stays_small_in_memory(toy: Backbone, monkeypatch):
    largest, resize = [], Image.Image.resize

    def spy(self, size, *args: object, **options: object):
        largest.append(max(size))
        return resize(self, size, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", spy)
    assert toy.preprocess(Image.new("RGB", (60_000, 1), "red")).float().mean((1, 2))[0] == 255
    assert largest == [8 * 32]  # not 60,000 * 32


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_pictures_of_any_mode_preprocess_as_rgb(toy: Backbone, mode: str):
    image = noise(40, 40).convert(mode)
    assert torch.equal(toy.preprocess(image), toy.preprocess(image.convert("RGB")))
