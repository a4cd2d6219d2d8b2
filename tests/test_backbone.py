"""Loading, preprocessing and tokenising; nothing here reaches the network."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import numpy as np
import open_clip
import open_clip.factory
import pytest
import torch
from conftest import toy_config, write_backbone
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import QuickGELU
from PIL import Image

from tapt.core.backbone import Backbone
from tapt.core.errors import BackboneError, HubError, InputError
from tapt.files import file_sha256
from tapt.packs import backbones
from tapt.packs.backbones import CONFIG_FILE, OPENAI_NAMES, WEIGHTS_FILE, usable_device
from tapt.packs.hub import HubId, Origin, Snapshot


def load_backbone(name: str, **options: object) -> Backbone:
    return backbones.load_backbone(name, **options)[0]


@pytest.fixture
def copy(toy_folder: Path, tmp_path: Path) -> Path:
    """The toy's folder, to be damaged."""
    return Path(shutil.copytree(toy_folder, tmp_path / "toy"))


@pytest.fixture
def tiny_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip's names and tags with the toy's architecture behind them."""
    for name in (*OPENAI_NAMES, "ViT-B-32-quickgelu"):
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, toy_config())


def reconfigure(folder: Path, tower: str, **changes: object) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["model_cfg"][tower].update(changes)
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def test_a_folder_loads_frozen_and_in_eval_mode(toy: Backbone, toy_folder: Path):
    assert not toy.model.training
    assert not any(m.training for m in toy.model.modules())
    assert not any(p.requires_grad for p in toy.model.parameters())
    assert toy.source == toy.name == f"local-dir:{toy_folder}"
    assert toy.revision is None
    assert toy.sha256 == file_sha256(toy_folder / WEIGHTS_FILE)
    assert toy.device.type == "cpu"
    assert toy.dtype == torch.float32
    assert toy.architecture == {
        "image_size": 32,
        "image_tokens": 17,
        "visual_width": 64,
        "visual_blocks": 3,
        "text_width": 32,
        "text_blocks": 3,
        "context_length": 24,
    }


def test_the_weights_are_the_files_own(toy: Backbone, toy_folder: Path):
    from safetensors.torch import load_file

    for name, tensor in load_file(toy_folder / WEIGHTS_FILE).items():
        assert torch.equal(toy.model.state_dict()[name], tensor), name


def test_another_type(toy_folder: Path):
    backbone = load_backbone(f"local-dir:{toy_folder}", device="cpu", dtype=torch.float64)
    assert backbone.dtype == torch.float64
    assert backbone.normalize(torch.rand(1, 3, 32, 32)).dtype == torch.float64


def test_the_default_device_is_one_that_is_there():
    assert torch.zeros(1, device=usable_device()).sum() == 0


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_missing_file_is_an_error_never_a_random_model(copy: Path, file: str):
    (copy / file).unlink()
    with pytest.raises(BackboneError, match=f"has no {file}"):
        load_backbone(f"local-dir:{copy}")


def test_a_missing_folder(tmp_path: Path):
    with pytest.raises(BackboneError, match=f"has no {CONFIG_FILE}"):
        load_backbone(f"local-dir:{tmp_path / 'nothing'}")


@pytest.mark.parametrize("kept", [0, 7, 1000, -1])
def test_truncated_weights(copy: Path, kept: int):
    weights = copy / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:kept])
    (copy / "open_clip_pytorch_model.bin").write_bytes(b"a pickle that must not be tried")
    with pytest.raises(BackboneError, match=f"{WEIGHTS_FILE} of .* is not a complete safetensors"):
        load_backbone(f"local-dir:{copy}")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"model_cfg": []}', '{"model_cfg": {"vision_cfg": {}}}', "[" * 99999],
)
def test_a_broken_config(copy: Path, text: str):
    (copy / CONFIG_FILE).write_text(text)
    with pytest.raises(BackboneError, match=f"{CONFIG_FILE} of .* does not describe a CLIP"):
        load_backbone(f"local-dir:{copy}")


@pytest.mark.parametrize("change", [{"layers": 4}, {"width": 96}, {"pool_type": "none-such"}])
def test_weights_that_do_not_fit_the_config(copy: Path, change: dict):
    reconfigure(copy, "vision_cfg", **change)
    with pytest.raises(BackboneError, match="do not fit its architecture"):
        load_backbone(f"local-dir:{copy}")


@pytest.mark.parametrize(
    ("tower", "change"),
    [
        ("vision_cfg", {"layers": 10**9}),
        ("vision_cfg", {"layers": 150}),
        ("vision_cfg", {"width": 2**20}),
        ("vision_cfg", {"width": 2**70}),
        ("vision_cfg", {"image_size": 10**9}),
        ("vision_cfg", {"image_size": 2000, "patch_size": 1, "pos_embed_type": "sin_cos_2d"}),
        ("vision_cfg", {"mlp_ratio": 1e300}),
        ("vision_cfg", {"patch_size": 0}),
        ("text_cfg", {"layers": 10**9}),
        ("text_cfg", {"width": 2**20}),
        ("text_cfg", {"context_length": 10**6}),
        ("text_cfg", {"vocab_size": 10**12}),
        ("text_cfg", {"layers": "many"}),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_built(
    copy: Path, tower: str, change: dict, monkeypatch: pytest.MonkeyPatch
):
    reconfigure(copy, tower, **change)
    monkeypatch.setattr(backbones, "pretrained_model", lambda *_: pytest.fail("built"))
    old = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 500_000_000, old[1]))
    try:
        with pytest.raises(BackboneError, match="do not fit its architecture"):
            load_backbone(f"local-dir:{copy}")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


@pytest.mark.parametrize(
    ("preprocess", "text", "sentence"),
    [
        ({"mean": [0.5]}, {}, "preprocess_cfg must have a mean"),
        ({"std": [1, 1, 0]}, {}, "preprocess_cfg must have a mean"),
        ({"resize_mode": "../x"}, {}, "preprocess_cfg must have a mean"),
        ({"mean": "abc"}, {}, "does not describe a CLIP"),
        ({}, {"tokenizer_kwargs": {"bpe_path": "../../secret.gz"}}, "a tokenizer of its own"),
        ({}, {"vocab_size": 100}, "a tokenizer of its own"),
    ],
)
def test_other_bad_parts_of_a_config(copy: Path, preprocess: dict, text: dict, sentence: str):
    reconfigure(copy, "text_cfg", **text)
    config = json.loads((copy / CONFIG_FILE).read_text())
    config["preprocess_cfg"].update(preprocess)
    (copy / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(BackboneError, match=sentence):
        load_backbone(f"local-dir:{copy}")


def test_position_embeddings_of_another_image_size_are_resized(copy: Path):
    reconfigure(copy, "vision_cfg", image_size=48)
    assert load_backbone(f"local-dir:{copy}", device="cpu").image_tokens == 37


@pytest.mark.parametrize("name", ["", "ViT-Z-99", "ViT-B-32:no-such-tag", "tiny-clip", "tiny:x"])
def test_unknown_names_get_the_choices(name: str):
    with pytest.raises(BackboneError, match="is unknown") as error:
        load_backbone(name)
    message = str(error.value)
    assert all(choice in message for choice in ("tiny", *OPENAI_NAMES, "hf-hub:", "local-dir:"))
    if name.startswith("ViT-B-32:"):
        assert "laion2b_s34b_b79k" in message  # the tags that there are


def test_an_unknown_random_architecture():
    with pytest.raises(BackboneError, match="no architecture 'ViT-Z-99'"):
        load_backbone("random:ViT-Z-99")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("random:RN50", ["image tower", "'random:RN50'", "ResNet"]),
        ("RN50:openai", ["image tower", "'RN50:openai'", "ResNet"]),
        ("random:ViT-B-16-SigLIP", ["image tower", "timm", "vit_base_patch16_siglip_224"]),
        ("random:roberta-ViT-B-32", ["text tower", "transformers", "roberta-base"]),
    ],
)
def test_towers_that_prompts_cannot_enter(
    name: str, parts: list[str], monkeypatch: pytest.MonkeyPatch
):
    def fetch(*_: object) -> None:
        raise AssertionError("fetched before the tower was checked")

    monkeypatch.setattr(backbones, "snapshot", fetch)
    monkeypatch.setattr(open_clip, "create_model", fetch)
    with pytest.raises(BackboneError, match="prompts cannot go in") as error:
        load_backbone(name)
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_a_folder_with_a_timm_tower(copy: Path):
    reconfigure(copy, "vision_cfg", timm_model_name="convnext_base")
    with pytest.raises(BackboneError, match=r"image tower .* timm's convnext_base"):
        load_backbone(f"local-dir:{copy}")


@pytest.mark.usefixtures("tiny_architectures")
def test_random_weights_are_the_same_every_time_and_leave_the_global_state():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = load_backbone("random:ViT-B-32", device="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    other = load_backbone("random:ViT-B-32", device="cpu")
    assert one.sha256 is None
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[name]), name


@pytest.mark.usefixtures("tiny_architectures")
@pytest.mark.parametrize(
    ("name", "quick"),
    [*((n, True) for n in OPENAI_NAMES), ("ViT-B-32:laion2b_s34b_b79k", False)],
)
def test_openais_weights_run_with_quick_gelu(
    name: str, quick: bool, toy_folder: Path, monkeypatch: pytest.MonkeyPatch
):
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
    assert not backbone.model.training


@pytest.mark.parametrize("name", ["hf-hub:nobody/not-cached", "ViT-L-14:commonpool_xl_s13b_b90k"])
def test_an_unreachable_hub_with_an_empty_cache(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(HubError, match="not in the local cache, and offline mode is on"):
        load_backbone(name)


def test_a_wrong_hub_id():
    with pytest.raises(BackboneError, match="not a Hub id; write owner/name"):
        load_backbone("hf-hub:one/two/three")


def test_a_long_sentence_is_refused_by_name_and_nothing_is_cut_off(toy: Backbone):
    fits, long = "a photo of a " + "cat " * 18, "a photo of a " + "dog " * 19
    assert toy.tokenize([fits]).shape == (1, 24)
    with pytest.raises(InputError, match="has 23 tokens; this model reads at most 22") as error:
        toy.tokenize(["a photo of a cat.", long, fits])
    assert "dog dog dog" in str(error.value)
    assert "cat" not in str(error.value)
    with pytest.raises(InputError, match="has at least 94 tokens") as error:
        toy.tokenize(["dog " * 5000])
    assert len(str(error.value)) < 200


def test_sentences_end_at_eot_even_behind_a_token_with_id_zero(toy: Backbone):
    sentences = ["a photo of a !%.", "a photo of a !%"]
    whole, cut = toy.tokenize(sentences, cut=False), toy.tokenize(sentences)
    assert 0 in cut[1, : int(cut[1].argmax())]  # the piece "!" has the padding's id
    assert torch.equal(cut, whole[:, : cut.shape[1]])
    assert (whole[:, cut.shape[1] :] == 0).all()
    assert (cut == 49407).sum(1).tolist() == [1, 1]


def test_tokens_are_open_clips_own(toy: Backbone):
    sentences = ["a photo of a cat.", "dog"]
    expected = open_clip.get_tokenizer("ViT-B-32")(sentences, context_length=24)
    assert torch.equal(toy.tokenize(sentences, cut=False), expected)
    assert torch.equal(toy.tokenize(sentences), expected[:, :8])


def noise(width: int, height: int) -> Image.Image:
    values = np.random.RandomState(0).randint(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def own_preprocessing(backbone: Backbone, image: Image.Image) -> torch.Tensor:
    """open_clip's evaluation transform, its normalisation undone, in 1/255."""
    cfg = PreprocessCfg(**backbone.visual.preprocess_cfg)
    normalised = image_transform_v2(cfg, is_train=False)(image)
    mean, std = torch.tensor(cfg.mean)[:, None, None], torch.tensor(cfg.std)[:, None, None]
    return (normalised * std + mean) * 255


@pytest.mark.parametrize(
    "size", [(32, 32), (100, 60), (33, 71), (5, 9), (1, 1), (640, 80), (80, 640)]
)
def test_preprocessing_is_open_clips_own_in_eight_bits(toy: Backbone, size: tuple[int, int]):
    pixels = toy.preprocess(noise(*size))
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, 32, 32)
    expected = own_preprocessing(toy, noise(*size))
    assert torch.equal(pixels, expected.round().to(torch.uint8))
    normalised = toy.normalize(pixels / 255)
    own = image_transform_v2(PreprocessCfg(**toy.visual.preprocess_cfg), is_train=False)
    torch.testing.assert_close(normalised, own(noise(*size)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(2048, 64), (64, 2048)])
def test_a_very_elongated_picture_keeps_its_centre(toy: Backbone, size: tuple[int, int]):
    expected = own_preprocessing(toy, noise(*size)).round().to(torch.uint8)
    assert torch.equal(toy.preprocess(noise(*size)), expected)


def test_an_extreme_picture_stays_small_in_memory(toy: Backbone, monkeypatch):
    largest = []
    resize = Image.Image.resize

    def spy(self, size, *args: object, **options: object):
        largest.append(max(size))
        return resize(self, size, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", spy)
    assert toy.preprocess(Image.new("RGB", (60_000, 1), "red")).float().mean((1, 2))[0] == 255
    assert largest == [8 * 32]  # not 60,000 * 32


def test_squashed_pictures_keep_their_ends(copy: Path):
    config = json.loads((copy / CONFIG_FILE).read_text())
    config["preprocess_cfg"]["resize_mode"] = "squash"
    (copy / CONFIG_FILE).write_text(json.dumps(config))
    backbone = load_backbone(f"local-dir:{copy}", device="cpu")
    image = noise(640, 20)
    expected = own_preprocessing(backbone, image).round().to(torch.uint8)
    assert torch.equal(backbone.preprocess(image), expected)


def test_grey_and_transparent_pictures_preprocess_as_rgb(toy: Backbone):
    for mode in ("L", "RGBA", "P"):
        image = noise(40, 40).convert(mode)
        assert torch.equal(toy.preprocess(image), toy.preprocess(image.convert("RGB")))


def test_normalisation_happens_once_and_inside(toy: Backbone):
    cfg = toy.visual.preprocess_cfg
    grey = torch.full((1, 3, 32, 32), 0.5)
    expected = [(0.5 - m) / s for m, s in zip(cfg["mean"], cfg["std"], strict=True)]
    torch.testing.assert_close(toy.normalize(grey)[0, :, 0, 0], torch.tensor(expected))


def test_embedded_folders_are_found_by_name(monkeypatch, toy_folder: Path, tmp_path: Path):
    shutil.copytree(toy_folder, tmp_path / "tiny" / "backbone")
    monkeypatch.setattr(backbones, "EMBEDDED", tmp_path)
    shutil.copytree(toy_folder, tmp_path / "small" / "backbone")
    assert backbones.embedded_backbones() == ["small", "tiny"]
    for name in ("small", "tiny"):
        backbone = load_backbone(name, device="cpu")
        assert backbone.name == backbone.source == name
        assert backbone.sha256 == file_sha256(toy_folder / WEIGHTS_FILE)
        assert backbones.is_public(name)


def test_a_revision_of_what_has_none(toy_folder: Path):
    for name in ("tiny", f"local-dir:{toy_folder}", "random:ViT-B-32"):
        with pytest.raises(BackboneError, match="does not come from the Hub and has no revision"):
            load_backbone(name, revision="v1")


def test_custom_text_towers_are_found(tmp_path: Path):
    torch.manual_seed(0)
    model = open_clip.CustomTextCLIP(**toy_config())
    weights = {k: v.contiguous() for k, v in model.state_dict().items()}
    folder = write_backbone(tmp_path / "custom", {**toy_config(), "custom_text": True}, weights)
    backbone = load_backbone(f"local-dir:{folder}", device="cpu")
    assert backbone.text is backbone.model.text
    assert (backbone.text_width, backbone.text_blocks, backbone.context_length) == (32, 3, 24)


def test_a_device_that_is_not_there_is_named(toy_folder: Path):
    for device in ("abacus", "cuda:99", "meta", ""):
        with pytest.raises(BackboneError, match=f"no device '{device}'"):
            load_backbone(f"local-dir:{toy_folder}", device=device)
