"""Packs on disk: exact round trips, and one sentence for everything that can be wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import folder_files, local_backbone, make_pack
from safetensors.torch import load_file, save_file

from tapt.core.backbone import Backbone
from tapt.core.errors import PackError
from tapt.packs import backbones
from tapt.packs.card import write_pack
from tapt.packs.format import (
    CARD,
    CONFIG,
    PROMPTS,
    STATISTICS,
    default_pack,
    list_packs,
    load_pack,
    save_pack,
    untrained_pack,
)

ROW = {
    "dataset": "CIFAR-10",
    "defense": "tapt",
    "attacked_model": "static",
    "attack": "pgd",
    "epsilon_255": 1,
    "steps": 100,
    "n": 1000,
    "clean_accuracy": 0.7,
    "clean_ci95": [0.67, 0.73],
    "accuracy": 0.5,
    "ci95": [0.47, 0.53],
    "budget": "100 steps",
    "seconds_per_image": 0.2,
    "attack_seconds_per_image": 1.5,
}


@pytest.fixture
def folder(toy: Backbone, tmp_path: Path) -> Path:
    write_pack(make_pack(toy), tmp_path / "mine")
    return tmp_path / "mine"


@pytest.mark.parametrize("design", ["V", "VLI", "VLJ"])
def test_a_round_trip_is_bit_exact(toy_folder: Path, toy: Backbone, tmp_path: Path, design: str):
    pack, folder = make_pack(toy, design, training={"epochs": 3}), tmp_path / "new" / "folder"
    write_pack(pack, folder)
    loaded = load_pack(folder, toy)
    for name in ("test_time", "base_model", "training", "evaluation", "trained"):
        assert getattr(loaded, name) == getattr(pack, name)
    assert loaded.prompts.config == pack.prompts.config
    assert list(loaded.prompts.tensors) == list(pack.prompts.tensors)
    for name, tensor in pack.prompts.tensors.items():
        assert torch.equal(loaded.prompts.tensors[name], tensor)
    for part in ("adversarial", "clean"):
        for key in ("mean", "var"):
            saved, read = (getattr(getattr(p.statistics, part), key) for p in (pack, loaded))
            assert torch.equal(saved, read)
    assert {path.name for path in folder.iterdir()} == {CONFIG, PROMPTS, STATISTICS, CARD}
    exact = load_pack(folder, local_backbone(toy_folder, torch.float64))
    assert {t.dtype for t in exact.prompts.tensors.values()} == {torch.float64}


def refused(folder: Path, backbone: Backbone) -> str:
    with pytest.raises(PackError) as error:
        load_pack(folder, backbone)
    return str(error.value)


def edit_config(folder: Path, change: Callable[[dict], object]) -> None:
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"sha256": "0" * 64}, "has other weights"),
        ({"mean": [0.5, 0.5, 0.5]}, "normalises its images otherwise"),
        ({"architecture": {"text_blocks": 2}}, "has another architecture"),
    ],
)
def test_another_backbone_is_refused_and_the_right_one_named(toy, folder, change, difference):
    def edit(config: dict) -> None:
        base = config["base_model"]
        sizes = base["architecture"] | change.get("architecture", {})
        base.update(change, source="hf-hub:owner/clip", revision="v1", architecture=sizes)

    edit_config(folder, edit)
    ending = f"was made for backbone 'hf-hub:owner/clip@v1'; {toy.name!r} {difference}."
    assert refused(folder, toy).endswith(ending)


@pytest.mark.parametrize("file", [CONFIG, PROMPTS, STATISTICS])
def test_a_missing_file(toy: Backbone, folder: Path, file: str):
    (folder / file).unlink()
    assert refused(folder, toy) == f"Pack {str(folder)!r} has no {file}."


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 100_000, "\xff", '{"format": NaN}', '{"format": "x"} {}'],
    ids=["empty", "open", "deep", "latin-1", "nan", "twice"],
)
def test_broken_json(toy: Backbone, folder: Path, text: str):
    (folder / CONFIG).write_bytes(text.encode("latin-1"))
    assert f"config.json of pack {str(folder)!r} is not valid JSON" in refused(folder, toy)


def test_a_config_that_is_far_too_large(toy: Backbone, folder: Path):
    (folder / CONFIG).write_text(" " * 1_000_001)
    assert "larger than 1 MB" in refused(folder, toy)


def _row(**changes: object) -> Callable[[dict], None]:
    row = {key: value for key, value in {**ROW, **changes}.items() if value != "gone"}
    return lambda config: config.update(evaluation=[ROW, row])


CONFIG_CHANGES = {
    "another-format": (lambda c: c.update(format="lora"), '"format": "tapt-pack"'),
    "another-version": (lambda c: c.update(version=3), "format version 3; this program reads"),
    "version-true": (lambda c: c.update(version=True), "format version True"),
    "settings-of-another-kind": (lambda c: c["test_time"].update(tapt=5), "test_time.tapt must be"),
    "unknown-key": (lambda c: c.update(licence="mit"), "licence is unknown"),
    "unknown-design": (lambda c: c["prompts"].update(design="W"), "design must be one of V"),
    "deeper-than-the-backbone": (
        lambda c: c["prompts"].update(visual_depth=4),
        "visual_depth must be at most 3",
    ),
    "two-colours": (
        lambda c: c["base_model"].update(std=[1.0, 1.0]),
        "base_model.std must be three numbers above 0 and at most 10, got [1.0, 1.0]",
    ),
    "evaluation-of-another-kind": (
        lambda c: c.update(evaluation=[5]),
        "must be an object for each row, got 5",
    ),
    "row-without-a-field": (_row(budget="gone"), "evaluation[1].budget is missing"),
    "row-of-infinite-images": (_row(n=float("inf")), "is not valid JSON"),
    "row-above-all": (_row(accuracy=2), "evaluation[1].accuracy must be a number from 0 to 1"),
    "row-with-one-end": (_row(ci95=[0.5]), "evaluation[1].ci95 must be two numbers from 0 to 1"),
    "row-on-nothing": (_row(attacked_model="me"), "attacked_model must be one of clip, static"),
}


@pytest.mark.parametrize("change", CONFIG_CHANGES)
def test_a_malformed_config(toy: Backbone, folder: Path, change: str):
    edit, expected = CONFIG_CHANGES[change]
    edit_config(folder, edit)
    message = refused(folder, toy)
    assert expected in message
    assert str(folder) in message


def test_version_1_is_read_as_version_2(toy: Backbone, folder: Path):
    def older(config: dict) -> None:
        config.update(version=1, test_time={"views": 8, "keep": 0.2, "lr": 1e-3})
        rows = [
            {**ROW, "threat": "clip", "peak_memory_mb": 900.5},
            {**ROW, "threat": "square", "defense": "random-start"},
            {**ROW, "threat": "adaptive"},
            {**ROW, "threat": "all", "budget": "pgd on adaptive (9 steps); square on square (9)"},
        ]
        config["evaluation"] = [{k: v for k, v in r.items() if k != "attacked_model"} for r in rows]

    edit_config(folder, older)
    pack = load_pack(folder, toy)
    tapt = {"views": 8, "keep": 0.2, "lr": 1e-3}
    assert pack.test_time == {"tapt": tapt, "ensemble": {"views": 8, "keep": 0.2}}
    assert pack.evaluation == [
        {**ROW, "attacked_model": "clip"},
        {**ROW, "attacked_model": "deployed", "settings": {"random_start": True}},
        {**ROW, "attacked_model": "deployed"},
        {
            **ROW,
            "attacked_model": "all",
            "budget": "pgd on deployed (9 steps); square on deployed (9)",
        },
    ]
    save_pack(pack, folder)
    assert json.loads((folder / CONFIG).read_text())["version"] == 2
    assert load_pack(folder, toy).evaluation == pack.evaluation
    edit_config(folder, lambda c: (older(c), c["evaluation"][2].pop("threat")))
    assert "is not a config of version 1" in refused(folder, toy)


def _value(value: float) -> Callable[[dict], None]:
    return lambda tensors: tensors["text"][1, 1, :1].fill_(value)


TENSOR_CHANGES = {
    "missing": (PROMPTS, lambda t: t.pop("text"), "lacks text."),
    "unknown": (PROMPTS, lambda t: t.update(txet=t["text"].clone()), "has unknown txet."),
    "shape": (
        PROMPTS,
        lambda t: t.update(visual=t["visual"][:, :1]),
        "visual must have shape (3, 2, 64), got (3, 1, 64)",
    ),
    "half": (PROMPTS, lambda t: t.update(text=t["text"].half()), "text must be F32, got F16"),
    "nan": (PROMPTS, _value(float("nan")), "text has values that are not finite"),
    "infinite": (PROMPTS, _value(float("inf")), "text has values that are not finite"),
    "tokens": (
        STATISTICS,
        lambda t: t.update({"clean.var": t["clean.var"][:, 2:]}),
        "clean.var must have shape (3, 19, 64), got (3, 17, 64)",
    ),
    "negative": (
        STATISTICS,
        lambda t: t["clean.var"][0, 0, :1].fill_(-1e-3),
        "clean.var has negative values",
    ),
}


@pytest.mark.parametrize("change", TENSOR_CHANGES)
def test_wrong_tensors(toy: Backbone, folder: Path, change: str):
    file, edit, expected = TENSOR_CHANGES[change]
    tensors = load_file(folder / file)
    edit(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / file)
    message = refused(folder, toy)
    assert message.startswith(f"{file} of pack {str(folder)!r}")
    assert expected in message


def header(text: bytes, size: int | None = None) -> bytes:
    return (size or len(text)).to_bytes(8, "little") + text


HUGE = b'{"visual":{"dtype":"F32","shape":[2500000000],"data_offsets":[0,10000000000]}}'
PICKLE = b"\x80\x02c__builtin__\neval\n."


@pytest.mark.parametrize("content", [0, 20, -4, header(b"{}", 10**10), header(HUGE), PICKLE])
def test_what_is_no_whole_safetensors_file(toy: Backbone, folder: Path, content: int | bytes):
    path = folder / PROMPTS
    path.write_bytes(content if isinstance(content, bytes) else path.read_bytes()[:content])
    message = f"{PROMPTS} of pack {str(folder)!r} is not a complete safetensors file."
    assert refused(folder, toy) == message


def test_a_failed_save_leaves_the_old_files(toy: Backbone, folder: Path, monkeypatch):
    before = folder_files(folder)

    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_pack(make_pack(toy, "V"), folder)
    monkeypatch.undo()
    assert folder_files(folder) == before
    assert load_pack(folder, toy).prompts.config.design == "VLI"


def test_prompts_without_statistics_do_not_keep_older_ones(toy: Backbone, folder: Path):
    save_pack(make_pack(toy, statistics=None), folder)
    assert {path.name for path in folder.iterdir()} == {CONFIG, PROMPTS}
    assert f"has no {STATISTICS}" in refused(folder, toy)
    alone = load_pack(folder, toy, statistics=False)
    assert alone.statistics is None
    assert torch.equal(alone.prompts.tensors["text"], make_pack(toy).prompts.tensors["text"])


def test_new_numbers_leave_what_people_wrote_into_the_card(toy: Backbone, folder: Path):
    card = folder / CARD
    card.write_text(card.read_text() + "\n## Notes\n\nThe views defend.\n")
    same_clean = {**ROW, "epsilon_255": 2, "accuracy": 0.3}
    write_pack(make_pack(toy, evaluation=[ROW, same_clean]), folder)
    written = card.read_text()
    assert written.endswith("\n## Notes\n\nThe views defend.\n")
    assert written.count("clean accuracy (tapt)") == 1
    assert "accuracy under pgd-100 2/255 on static (tapt)" in written
    write_pack(make_pack(toy, evaluation=[ROW]), folder)
    assert card.read_text().count("The views defend.") == 1


def test_a_card_that_is_no_text_stops_before_anything_is_written(toy: Backbone, folder: Path):
    (folder / CARD).write_bytes("## Notizen für später".encode("latin-1"))
    before = (folder / PROMPTS).read_bytes()
    with pytest.raises(PackError, match=r"README\.md in 'mine' is not a UTF-8 text"):
        write_pack(make_pack(toy, "V"), folder)
    assert (folder / PROMPTS).read_bytes() == before


def test_embedded_packs(toy: Backbone, folder: Path, tmp_path, monkeypatch: pytest.MonkeyPatch):
    embedded = tmp_path / "embedded"
    tiny = replace(toy, name="tiny")
    (embedded / "tiny" / "backbone").mkdir(parents=True)
    monkeypatch.setattr(backbones, "EMBEDDED", embedded)
    assert list_packs("tiny") == []
    assert not default_pack(tiny).trained
    shutil.copytree(folder, embedded / "tiny" / "v")
    assert default_pack(tiny).name == "tiny/v"
    shutil.copytree(folder, embedded / "tiny" / "vli")
    assert list_packs() == list_packs("tiny") == ["tiny/v", "tiny/vli"]
    assert list_packs("ViT-B-16") == []
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
    assert pack.test_time == {}
    assert pack.base_model["sha256"] == toy.sha256
