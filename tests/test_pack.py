"""Packs on disk: exact round trips, and one sentence for everything that can be wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from conftest import TOY_CLASSES, toy_config, write_backbone
from safetensors.torch import load_file, save_file

import tapt.pack
from tapt.backbone import Backbone, load_backbone
from tapt.errors import PackError
from tapt.losses import Statistics, TokenStatistics
from tapt.pack import (
    CARD,
    CONFIG,
    PROMPTS,
    STATISTICS,
    Pack,
    base_model,
    default_pack,
    embedded_packs,
    load_pack,
    save_pack,
    statistics_shapes,
    untrained_pack,
)
from tapt.prompts import PromptConfig, class_texts, init_prompts
from tapt.tuning import TuneConfig, tune


def make_pack(backbone: Backbone, design: str = "VLI") -> Pack:
    prompts = init_prompts(backbone, PromptConfig(design, 2, 3), seed=1)
    generator = torch.Generator().manual_seed(2)
    values = [
        torch.rand(shape, generator=generator)
        for shape in statistics_shapes(backbone, prompts.config).values()
    ]
    return Pack(
        prompts,
        Statistics(TokenStatistics(*values[:2]), TokenStatistics(*values[2:])),
        TuneConfig(views=8, steps=2, lr=1e-3, align_to=2),
        "mine",
        base_model(backbone),
        {"epochs": 3},
    )


@pytest.fixture
def folder(toy: Backbone, tmp_path: Path) -> Path:
    save_pack(make_pack(toy), tmp_path / "mine")
    return tmp_path / "mine"


@pytest.mark.parametrize("design", ["V", "VLI", "VLJ"])
def test_a_round_trip_is_bit_exact(toy: Backbone, tmp_path: Path, design: str):
    pack = make_pack(toy, design)
    save_pack(pack, tmp_path / "new" / "folder")
    loaded = load_pack(tmp_path / "new" / "folder", toy)
    assert loaded.prompts.config == pack.prompts.config
    assert loaded.test_time == pack.test_time
    assert (loaded.base_model, loaded.training, loaded.evaluation) == (
        pack.base_model,
        pack.training,
        pack.evaluation,
    )
    assert loaded.trained
    assert list(loaded.prompts.tensors) == list(pack.prompts.tensors)
    for name, tensor in pack.prompts.tensors.items():
        assert torch.equal(loaded.prompts.tensors[name], tensor)
    for part in ("adversarial", "clean"):
        for key in ("mean", "var"):
            saved, read = (getattr(getattr(p.statistics, part), key) for p in (pack, loaded))
            assert torch.equal(saved, read)
    files = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert files == {CONFIG, PROMPTS, STATISTICS, CARD}


def test_a_loaded_pack_tunes_as_the_one_that_was_saved(toy: Backbone, folder: Path):
    views = torch.rand(1, 8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    logits = []
    for pack in (make_pack(toy), load_pack(folder, toy)):
        texts = class_texts(toy, TOY_CLASSES, pack.prompts.config)
        tuned = tune(
            toy, pack.prompts, views, texts, statistics=pack.statistics, config=pack.test_time
        )
        logits.append(tuned.logits)
    assert torch.equal(*logits)


def test_prompts_take_the_backbones_type(toy_folder: Path, folder: Path):
    exact = load_backbone(f"local-dir:{toy_folder}", device="cpu", dtype=torch.float64)
    loaded = load_pack(folder, exact)
    assert {t.dtype for t in loaded.prompts.tensors.values()} == {torch.float64}


def refused(folder: Path, backbone: Backbone) -> str:
    with pytest.raises(PackError) as error:
        load_pack(folder, backbone)
    return str(error.value)


def edit_config(folder: Path, change: Callable[[dict], object]) -> None:
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def edit_tensors(path: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)


def test_another_architecture(toy: Backbone, folder: Path, tmp_path: Path):
    config = toy_config(layers=2)
    torch.manual_seed(0)
    model = open_clip.CLIP(**config)
    write_backbone(tmp_path / "other", config, dict(model.state_dict()))
    other = load_backbone(f"local-dir:{tmp_path / 'other'}", device="cpu")
    message = refused(folder, other)
    assert repr(toy.name) in message
    assert f"{other.name!r} has another architecture" in message


def test_other_weights(toy: Backbone, folder: Path):
    other = replace(toy, name="local-dir:other", sha256="0" * 64)
    message = refused(folder, other)
    assert repr(toy.name) in message
    assert "the weights of 'local-dir:other' are different ones" in message


def test_another_normalisation(toy_folder: Path, folder: Path, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(toy_folder, other)
    config = json.loads((other / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["mean"] = [0.5, 0.5, 0.5]
    (other / "open_clip_config.json").write_text(json.dumps(config))
    message = refused(folder, load_backbone(f"local-dir:{other}", device="cpu"))
    assert "normalises its images otherwise" in message


@pytest.mark.parametrize("file", [CONFIG, PROMPTS, STATISTICS])
def test_a_missing_file(toy: Backbone, folder: Path, file: str):
    (folder / file).unlink()
    assert refused(folder, toy) == f"Pack {str(folder)!r} has no {file}."


def test_no_such_pack(toy: Backbone, tmp_path: Path):
    message = refused(tmp_path / "nothing", toy)
    assert "There is no pack" in message
    assert "nothing" in message


@pytest.mark.parametrize(
    "text", ["", "{", '{"format": "tapt-pack",', "[" * 100_000, "\xff"], ids=str.__len__
)
def test_broken_json(toy: Backbone, folder: Path, text: str):
    (folder / CONFIG).write_bytes(text.encode("latin-1"))
    assert "config.json" in refused(folder, toy)
    assert "is not valid JSON" in refused(folder, toy)


def test_a_config_that_is_far_too_large(toy: Backbone, folder: Path):
    (folder / CONFIG).write_text(" " * 1_000_001)
    assert "larger than 1 MB" in refused(folder, toy)


CONFIG_CHANGES = {
    "another-format": (lambda c: c.update(format="lora"), '"format": "tapt-pack"'),
    "another-version": (lambda c: c.update(version=2), "format version 2; this program reads"),
    "no-version": (lambda c: c.pop("version"), "format version None"),
    "no-base-model": (lambda c: c.pop("base_model"), "lacks 'base_model'"),
    "no-prompts": (lambda c: c.pop("prompts"), "lacks 'prompts'"),
    "prompts-of-another-kind": (lambda c: c.update(prompts=[1]), "lacks 'prompts'"),
    "no-test-time": (lambda c: c.pop("test_time"), "lacks 'test_time'"),
    "unknown-prompt-key": (lambda c: c["prompts"].update(depth=9), "depth"),
    "unknown-test-time-key": (lambda c: c["test_time"].update(momentum=1), "['momentum']"),
    "unknown-design": (lambda c: c["prompts"].update(design="W"), "design must be one of V"),
    "context-of-another-kind": (lambda c: c["prompts"].update(context=5), "context must be text"),
    "deeper-than-the-backbone": (
        lambda c: c["prompts"].update(visual_depth=4),
        "visual_depth must be at most 3",
    ),
    "no-normalisation": (lambda c: c["base_model"].pop("std"), "mean and std of three numbers"),
    "evaluation-of-another-kind": (lambda c: c.update(evaluation=[5]), "row that is none: 5"),
    "evaluation-without-numbers": (
        lambda c: c.update(evaluation=[{"defense": "tapt", "accuracy": 2}]),
        "evaluation row that is none",
    ),
    "nan": (lambda c: c["test_time"].update(lr=float("nan")), "lr must be a number"),
    "betas": (lambda c: c["test_time"].update(betas=1), "betas must be two numbers"),
    "text-for-a-number": (lambda c: c["test_time"].update(views="64"), "views must be a whole"),
}


@pytest.mark.parametrize("change", CONFIG_CHANGES)
def test_a_malformed_config(toy: Backbone, folder: Path, change: str):
    edit, expected = CONFIG_CHANGES[change]
    edit_config(folder, edit)
    message = refused(folder, toy)
    assert expected in message
    assert str(folder) in message


def _shape(tensors: dict) -> None:
    tensors["visual"] = tensors["visual"][:, :1]


def _value(value: float) -> Callable[[dict], None]:
    def change(tensors: dict) -> None:
        tensors["text"][1, 1, 1] = value

    return change


TENSOR_CHANGES = {
    "missing": (lambda t: t.pop("text"), "lacks text."),
    "unknown": (lambda t: t.update(txet=t["text"].clone()), "has unknown txet."),
    "renamed": (lambda t: t.update(txet=t.pop("text")), "lacks text."),
    "shape": (_shape, "visual must have shape (3, 2, 64), got (3, 1, 64)"),
    "half": (lambda t: t.update(text=t["text"].half()), "text must be F32, got F16"),
    "nan": (_value(float("nan")), "text has values that are not finite"),
    "infinite": (_value(float("inf")), "text has values that are not finite"),
}


@pytest.mark.parametrize("change", TENSOR_CHANGES)
def test_wrong_prompt_tensors(toy: Backbone, folder: Path, change: str):
    edit, expected = TENSOR_CHANGES[change]
    edit_tensors(folder / PROMPTS, edit)
    message = refused(folder, toy)
    assert expected in message
    assert PROMPTS in message
    assert str(folder) in message


def test_wrong_statistics(toy: Backbone, folder: Path):
    def change(tensors: dict) -> None:
        tensors["clean.var"] = tensors["clean.var"][:, 2:]

    edit_tensors(folder / STATISTICS, change)
    message = refused(folder, toy)
    assert "clean.var must have shape (3, 19, 64), got (3, 17, 64)" in message
    assert STATISTICS in message


@pytest.mark.parametrize("file", [PROMPTS, STATISTICS])
@pytest.mark.parametrize("kept", [0, 20, -4])
def test_truncated_safetensors(toy: Backbone, folder: Path, file: str, kept: int):
    path = folder / file
    path.write_bytes(path.read_bytes()[:kept])
    assert f"{file} of pack" in refused(folder, toy)
    assert "is not a complete safetensors file" in refused(folder, toy)


def test_a_failed_save_leaves_the_old_files(
    toy: Backbone, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="No space left"):
        save_pack(make_pack(toy, "V"), folder)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert load_pack(folder, toy).prompts.config.design == "VLI"


def test_prompts_without_statistics_do_not_keep_older_ones(toy: Backbone, folder: Path):
    save_pack(replace(make_pack(toy), statistics=None), folder)
    assert {path.name for path in folder.iterdir()} == {CONFIG, PROMPTS}
    assert f"has no {STATISTICS}" in refused(folder, toy)
    alone = load_pack(folder, toy, statistics=False)
    assert alone.statistics is None
    assert torch.equal(alone.prompts.tensors["text"], make_pack(toy).prompts.tensors["text"])


def test_the_card_names_backbone_and_design(toy: Backbone, folder: Path):
    card = (folder / CARD).read_text()
    assert card.startswith("---\n")
    assert "library_name: tapt" in card
    assert "TAPT-VLI" in card
    assert toy.source in card


def test_new_numbers_leave_what_people_wrote_into_the_card(toy: Backbone, folder: Path):
    card = folder / CARD
    card.write_text(card.read_text() + "\n## Notes\n\nThe views defend.\n")
    row = {"defense": "tapt", "threat": "static", "attack": "pgd", "epsilon_255": 1, "steps": 20}
    row |= {"n": 10, "clean_accuracy": 0.7, "accuracy": 0.5, "ci95": [0.2, 0.8]}
    same_clean = {**row, "epsilon_255": 2, "accuracy": 0.3}
    save_pack(replace(make_pack(toy), evaluation=[row, same_clean]), folder)
    written = card.read_text()
    assert written.endswith("\n## Notes\n\nThe views defend.\n")
    assert written.count("clean accuracy (tapt)") == 1
    assert "accuracy under pgd-20 2/255 on static (tapt)" in written
    save_pack(replace(make_pack(toy), evaluation=[row]), folder)
    assert card.read_text().count("The views defend.") == 1


def test_embedded_packs(toy: Backbone, folder: Path, tmp_path, monkeypatch: pytest.MonkeyPatch):
    embedded = tmp_path / "embedded"
    tiny = replace(toy, name="tiny")
    (embedded / "tiny" / "backbone").mkdir(parents=True)
    monkeypatch.setattr(tapt.pack, "EMBEDDED", embedded)
    assert embedded_packs("tiny") == []
    assert not default_pack(tiny).trained
    shutil.copytree(folder, embedded / "tiny" / "v")
    assert default_pack(tiny).name == "tiny/v"
    shutil.copytree(folder, embedded / "tiny" / "vli")
    assert embedded_packs("tiny") == ["tiny/v", "tiny/vli"]
    assert embedded_packs("ViT-B-16") == []
    assert default_pack(tiny).name == "tiny/vli"
    (tmp_path / "tiny" / "v").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert load_pack("tiny/v", tiny).prompts.config.design == "VLI"  # not that empty folder
    with pytest.raises(PackError, match="use tiny/v, tiny/vli, a folder, or a Hub id"):
        load_pack("tiny/vlj", tiny)


@pytest.mark.parametrize("design", ["V", "VLI", "VLJ"])
def test_untrained_prompts_fit_any_backbone(toy: Backbone, design: str):
    pack = untrained_pack(toy, design)
    assert not pack.trained
    assert pack.statistics is None
    assert (pack.prompts.config.tokens, pack.prompts.config.visual_depth) == (2, 3)
    assert pack.test_time == TuneConfig()
    assert pack.base_model["sha256"] == toy.sha256
