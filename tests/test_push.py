"""Publishing against a Hub on this computer: what is sent, what is refused, what is said."""

from __future__ import annotations

import json
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
import torch
import yaml
from conftest import folder_files
from loopback import LoopbackHub
from PIL import Image
from test_pack import make_pack

import tapt.watch
from tapt.__main__ import main
from tapt.backbone import Backbone, load_backbone
from tapt.card import PICTURE
from tapt.pack import CARD, CONFIG, PROMPTS, STATISTICS, load_model, save_pack

ROW = {
    "dataset": "CIFAR-10",
    "defense": "tapt",
    "threat": "static",
    "attack": "pgd",
    "epsilon_255": 1,
    "steps": 100,
    "n": 1000,
    "clean_accuracy": 0.7,
    "clean_ci95": [0.67, 0.73],
    "accuracy": 0.5,
    "ci95": [0.47, 0.53],
}


@pytest.fixture
def clip(hub: LoopbackHub, toy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Backbone:
    hub.commit("owner/clip", folder_files(toy_folder))
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    backbone = load_backbone("hf-hub:owner/clip", device="cpu")
    hub.requests.clear()
    return backbone


@pytest.fixture
def folder(clip: Backbone, tmp_path: Path) -> Path:
    save_pack(replace(make_pack(clip), evaluation=[ROW]), tmp_path / "mine")
    (tmp_path / "mine" / "notes.txt").write_text("not for others")
    return tmp_path / "mine"


def push(folder: Path, *options: str, repo: str = "owner/pack") -> int:
    return main(["push", str(folder), repo, *options])


def test_push_and_pull_by_tag(hub: LoopbackHub, clip, folder, capsys):
    assert push(folder, "--tag", "v1") == 0
    told = capsys.readouterr()
    assert "The repo is private" in told.out
    assert "--pack owner/pack@v1" in told.out
    assert "hf_owner" not in told.out + told.err
    repo = hub.repos["owner/pack"]
    assert repo.private
    assert len(repo.commits) == 2  # the first one is empty: all files came at once
    assert repo.tags["v1"] == repo.refs["main"]
    files = repo.commits[repo.refs["main"]]
    assert set(files) == {CONFIG, PROMPTS, STATISTICS, CARD, PICTURE}
    for name in (CONFIG, PROMPTS, STATISTICS):
        assert files[name] == (folder / name).read_bytes()
    backbone, pack = load_model(None, "owner/pack@v1", device="cpu", token=None)
    assert backbone.sha256 == clip.sha256
    assert pack.origin.commit == repo.tags["v1"]
    original = make_pack(clip).prompts.tensors
    assert all(torch.equal(pack.prompts.tensors[k], v) for k, v in original.items())


def test_the_card_of_a_published_pack(hub: LoopbackHub, clip, folder):
    assert push(folder, "--public") == 0
    repo = hub.repos["owner/pack"]
    assert not repo.private
    files = repo.commits[repo.refs["main"]]
    _, front, text = files[CARD].decode().split("---\n", 2)
    data = yaml.safe_load(front)
    assert data["base_model"] == "owner/clip"
    assert data["base_model_relation"] == "adapter"
    assert {"tapt", f"tapt-weights-{clip.sha256[:16]}"} <= set(data["tags"])
    metrics = [m for r in data["model-index"][0]["results"] for m in r["metrics"]]
    assert {m["name"]: m["value"] for m in metrics} == {
        "clean accuracy (tapt)": 0.7,
        "accuracy under pgd-100 1/255 on static (tapt)": 0.5,
    }
    assert f"]({PICTURE})" in text
    assert 'load_model(pack="owner/pack")' in text
    assert "| CIFAR-10 | tapt | static | pgd-100, 1/255 | 1000 | 70.0 | 50.0 | 47.0-53.0 |" in text
    picture = Image.open(BytesIO(files[PICTURE])).convert("RGB")
    assert picture.width > 600
    assert len(picture.getcolors(1 << 20)) > 10


def test_what_people_wrote_into_the_card_is_published(hub: LoopbackHub, clip, folder):
    card = folder / CARD
    card.write_text(card.read_text() + "\n## Notes\n\nThe views defend.\n\n### Search\n\n8 runs.\n")
    assert push(folder) == 0
    repo = hub.repos["owner/pack"]
    published = repo.commits[repo.refs["main"]][CARD].decode()
    assert published.endswith("|\n\n## Notes\n\nThe views defend.\n\n### Search\n\n8 runs.\n")


def test_a_pack_without_numbers_has_no_picture(hub: LoopbackHub, clip, folder):
    save_pack(make_pack(clip), folder)
    assert push(folder) == 0
    repo = hub.repos["owner/pack"]
    assert PICTURE not in repo.commits[repo.refs["main"]]


def test_a_proposal_to_somebody_elses_repo(hub: LoopbackHub, clip, folder, monkeypatch, capsys):
    assert push(folder) == 0
    main_before = hub.repos["owner/pack"].refs["main"]
    hub.repos["owner/pack"].private = False
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert push(folder) == 2
    assert "Your token has no right to do this with owner/pack." in capsys.readouterr().err
    (folder / CARD).unlink()
    assert push(folder, "--create-pr") == 0
    assert "/discussions/1" in capsys.readouterr().out
    repo = hub.repos["owner/pack"]
    assert repo.refs["main"] == main_before
    assert CARD in repo.commits[repo.refs["refs/pr/1"]]


def invalid(folder: Path) -> dict:
    def config(change) -> None:
        values = json.loads((folder / CONFIG).read_text())
        change(values)
        (folder / CONFIG).write_text(json.dumps(values))

    return {
        "no-folder": (lambda: folder.rename(folder.parent / "away"), "no folder"),
        "no-statistics": (lambda: (folder / STATISTICS).unlink(), f"has no {STATISTICS}"),
        "cut": (lambda: (folder / PROMPTS).write_bytes(b"\x00" * 9), "not a complete safetensors"),
        "no-config": (lambda: (folder / CONFIG).write_text("{}"), '"format": "tapt-pack"'),
        "shape": (lambda: config(lambda c: c["prompts"].update(tokens=3)), "must have shape"),
        "depth": (lambda: config(lambda c: c["prompts"].update(visual_depth=9)), "at most 3"),
        "sizes": (
            lambda: config(lambda c: c["base_model"]["architecture"].update(text_width="x")),
            "base_model must have source",
        ),
        "folder-backbone": (
            lambda: config(lambda c: c["base_model"].update(source="local-dir:/home/me/clip")),
            "which others cannot load",
        ),
    }


@pytest.mark.parametrize("case", [*invalid(Path())])
def test_an_invalid_pack_never_leaves_the_machine(hub: LoopbackHub, clip, folder, capsys, case):
    damage, sentence = invalid(folder)[case]
    damage()
    assert push(folder) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "/home/me" not in error
    assert hub.requests == []


@pytest.mark.parametrize(
    ("options", "repo", "sentence"),
    [
        ([], "pack", "'pack' is not a repo id; write owner/repo"),
        ([], "owner/pack/sub", "is not a repo id"),
        ([], "owner/pack@v1", "is not a repo id"),
        (["--tag", "a b"], "owner/pack", "--tag must be of letters"),
        (["--tag", "../x"], "owner/pack", "--tag must be of letters"),
        (["--tag", "v1", "--create-pr"], "owner/pack", "leave it out with --create-pr"),
    ],
)
def test_bad_options(hub: LoopbackHub, folder, capsys, options, repo, sentence):
    assert push(folder, *options, repo=repo) == 2
    assert sentence in capsys.readouterr().err
    assert hub.requests == []


def test_tokens(hub: LoopbackHub, folder, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    assert push(folder) == 2
    assert "There is no Hub token: log in with `hf auth login`" in capsys.readouterr().err
    assert hub.requests == []
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert push(folder) == 2
    error = capsys.readouterr().err
    assert "does not accept your token" in error
    assert "hf_wrong" not in error
    assert hub.repos.keys() == {"owner/clip"}


def test_the_token_of_an_earlier_login(hub: LoopbackHub, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text("hf_owner")
    assert push(folder) == 0
    told = capsys.readouterr()
    assert "hf_owner" not in told.out + told.err


def test_a_tag_that_fails_after_the_pack_is_there(hub: LoopbackHub, folder, capsys):
    hub.fail("POST .*/tag/", "status")
    assert push(folder, "--tag", "v1") == 2
    commit = hub.repos["owner/pack"].refs["main"]
    sentence = f"The pack is published at commit {commit[:7]}, but not named 'v1': The Hub answers"
    assert sentence in capsys.readouterr().err
    hub.faults.clear()
    assert push(folder, "--tag", "v1") == 0
    assert hub.repos["owner/pack"].tags["v1"] == hub.repos["owner/pack"].refs["main"]


def test_a_taken_tag_stops_the_push(hub: LoopbackHub, folder, capsys):
    assert push(folder, "--tag", "v1") == 0
    commit = hub.repos["owner/pack"].refs["main"]
    hub.requests.clear()
    assert push(folder, "--tag", "v1") == 2
    assert "has a version 'v1' already" in capsys.readouterr().err
    assert hub.repos["owner/pack"].refs["main"] == commit
    assert not any("preupload" in request for request in hub.requests)


FAULTS = {
    "race": ({"kind": "status", "status": 412}, "changed by somebody else in this moment"),
    "503": ({"kind": "status"}, "The Hub answers with status 503."),
    "stall": ({"kind": "stall"}, "The Hub does not answer"),
    "login-page": ({"kind": "status", "status": 200, "body": b"<html>"}, "answer is not the Hub's"),
}


STEPS = ["POST /api/repos", "POST .*preupload", "POST .*/batch", "POST .*/commit/"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_on_the_way(hub: LoopbackHub, folder, monkeypatch, capsys, fault: str, step: str):
    options, sentence = FAULTS[fault]
    hub.fail(step, **options)
    with monkeypatch.context() as patch:
        patch.setattr(tapt.watch, "PATIENCE", 2.5)
        assert push(folder) == 2
    error = capsys.readouterr().err
    assert sentence in error or (fault == "race" and "changed" in error)
    assert "Traceback" not in error
    assert "http" not in error
    repo = hub.repos.get("owner/pack")
    assert repo is None or len(repo.commits) == 1
    hub.faults.clear()
    assert push(folder) == 0
