"""Test-time settings chosen on held-out images, and `tapt make-pack` from nothing to the Hub."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, toy_model, write_noise
from loopback import LoopbackHub

from tapt.__main__ import main
from tapt.core.backbone import Backbone
from tapt.core.errors import InputError
from tapt.data import LabelledImages, load_data
from tapt.defenses import Defense, base, register
from tapt.packs.backbones import load_backbone
from tapt.packs.format import Pack
from tapt.training import choose, make
from tapt.training.batches import TrainConfig
from tapt.training.choose import SEARCH, choose_settings
from tapt.training.make import make_recipe
from tapt.training.prompts import CHECKPOINT

CONFIG = TrainConfig(epsilon=4 / 255, shots=None, validation=0.5)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    classes = ["bird", "cat", "frog"]
    return write_noise(tmp_path_factory.mktemp("data"), classes=classes, count=8)


@pytest.fixture
def searched(flips: Defense) -> Defense:
    return register(replace(flips, search={"flips": (1, 3)}))


def search(toy: Backbone, data: LabelledImages, out: Path, **changes: object) -> Pack:
    """Of two defences, one without anything to choose."""
    made = {"training": {"adversarial": CONFIG.model_dump()}, **changes}
    model = toy_model(toy, **made)
    return choose_settings(model, data, out, defenses=["static", "flips"], images=11, steps=1)


def test_the_best_mean_wins_and_the_default_among_equals(toy: Backbone, searched: Defense):
    model = toy_model(toy)
    every, _ = choose.candidates(model.prepare("cat, dog"), ["static", "flips"])
    assert [(row.name, choice) for row, choice in every] == [
        ("static", {}),
        ("flips", {"flips": 5}),
        ("flips", {"flips": 1}),
        ("flips", {"flips": 3}),
    ]
    attack = choose.Attack("pgd", epsilon=4 / 255, steps=1)
    old = {"flips": {"flips": 3}}
    rows = [{"defense": "flips", "n": 9}, {"defense": "flips", "settings": {"flips": 5}}]
    model = toy_model(toy, evaluation=rows, test_time=old)
    for right, best in (
        ([[9, 0, 0], [3, 2, 1], [2, 2, 2], [2, 2, 2]], 5),
        ([[9, 0, 0], [3, 2, 1], [9, 0, 0], [0, 0, 9]], 1),
    ):
        pack = choose._chosen(model, every, right, 9, attack)
        assert pack.test_time == {"flips": {"flips": best}}
    table = pack.training["test_time_search"]["candidates"]
    assert table["flips"]["flips 1"] == "100.0 / 0.0 / 0.0, mean 33.3"
    # rows of the table keep the settings that they were measured with
    assert [row["settings"] for row in pack.evaluation] == [{"flips": 3}, {"flips": 5}]


def test_a_search_goes_on_and_measures_no_batch_twice(
    toy: Backbone, data: Path, searched: Defense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(choose, "images_per_pass", lambda *_: 4)
    images = load_data(data)
    whole = search(toy, images, tmp_path / "whole")
    assert whole.training["test_time_search"]["images"] == 11
    lines = (tmp_path / "whole" / SEARCH).read_bytes().splitlines(keepends=True)
    assert len(lines) == 3
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / SEARCH).write_bytes(lines[0] + b"{}\n" + lines[1][:40] + b"\n")
    asked, original = [], choose._right

    def counted(*args: object) -> object:
        asked.append(args[4])
        return original(*args)

    monkeypatch.setattr(choose, "_right", counted)
    again = search(toy, images, tmp_path / "part")
    assert (again.test_time, again.training) == (whole.test_time, whole.training)
    assert len(asked) == 2
    none = {"adversarial": CONFIG.updated(validation=0.0).model_dump()}
    with pytest.raises(InputError, match="validation must be above 0"):
        search(toy, images, tmp_path, training=none)


def test_presets_fit_backbone_and_data(toy: Backbone, data: Path):
    images = load_data(data).subset([*range(24)] * 3)  # of few images, none would be held out
    paper = make_recipe("paper", toy, images, {}, {})
    assert paper.training == TrainConfig()
    assert (paper.prompts.tokens, paper.prompts.visual_depth) == (2, 3)
    assert set(paper.defenses) == set(base._REGISTRY)
    quick = make_recipe("quick", toy, images, {"design": "V"}, {"epsilon": 4 / 255})
    assert quick.training.epochs * len(images) == pytest.approx(make.SEEN, rel=0.01)
    assert (quick.prompts.design, quick.training.epsilon) == ("V", 4 / 255)
    tiny, _ = load_backbone("tiny", device="cpu")
    for design in ("V", "VLI", "VLJ"):  # the embedded packs' own prompts are not trained again
        recipe = make_recipe("embedded", tiny, images, {"design": design}, {})
        folder = ROOT / "prompts" / "tiny" / design.lower()
        assert make.made(folder, tiny, recipe.prompts, recipe.training) is not None


@pytest.fixture
def command(hub_clip: Backbone, data: Path, tmp_path: Path, monkeypatch) -> list[str]:
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    options = "--device cpu --epochs 1 --batch-size 6 --validation 0.3 --push owner/pack"
    paths = ["--data", str(data), "--out", str(tmp_path / "pack")]
    return ["make-pack", "--backbone", "hf-hub:owner/clip", *paths, *options.split()]


def test_from_nothing_to_the_hub(command, hub: LoopbackHub, tmp_path, monkeypatch, capsys):
    """Stopped before the statistics and damaged, it makes again what is missing, and nothing
    else."""
    begun: list[str] = []

    def reported(name: str) -> object:
        original = getattr(make, name)

        def stage(*args: object, **options: object) -> object:
            begun.append(Path(args[4]).name)
            if name == "statistics" and len(begun) == 3:
                raise KeyboardInterrupt
            return original(*args, **options)

        return stage

    for name in ("train", "statistics"):
        monkeypatch.setattr(make, name, reported(name))
    assert main(command) == 130
    work = tmp_path / "pack-work"
    (work / "clean" / "prompts.safetensors").write_bytes(b"")
    (work / "clean" / CHECKPOINT).write_bytes(b"")
    assert main(command) == 0
    assert begun == ["adversarial", "clean", "pack", "clean", "pack"]
    out, told = capsys.readouterr()
    assert "owner/pack" in out
    assert re.search(r"About \d+ minutes on cpu: prompts", told)
    repo = hub.repos["owner/pack"]
    files = repo.commits[repo.refs["main"]]
    config = json.loads(files["config.json"])
    assert set(config["test_time"]) == {"tapt", "ensemble"}
    assert config["training"]["test_time_search"]["images"] == 7
    rows = {(row["defense"], row["attacked_model"]) for row in config["evaluation"]}
    assert rows >= {(name, "static") for name in ("clip", "static", "ensemble", "tapt")}
    assert "data" in files["README.md"].decode()
    assert "accuracy.png" in files

    begun.clear()
    (work / "table" / "outcomes.jsonl").write_bytes(b"{}\n")
    assert main(command) == 0
    assert begun == []
    assert main([*command, "--tokens", "1"]) == 2
    assert "'pack' holds a pack of other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--push nowhere", "'nowhere' is not a repo id"),
        ("--backbone random:ViT-B-32", "Others cannot load 'random:ViT-B-32'"),
        ("--depth 9", "visual_depth must be at most 3"),
        ("--validation 0", "No image is held out"),
        ("--out file/x", "a part of its path is a file"),
        ("--work file", "'file' cannot be written"),
    ],
)
def test_what_cannot_end_is_said_first(options, sentence, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert main([*command, *options.split()]) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.glob("pack*"))
