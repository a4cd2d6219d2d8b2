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
from test_pack import ROW, make_pack

import tapt.packs.client
from tapt.core.backbone import Backbone
from tapt.core.errors import TaptError
from tapt.model import load
from tapt.packs.backbones import load_backbone
from tapt.packs.card import PICTURE, write_pack
from tapt.packs.format import CARD, CONFIG, PROMPTS, STATISTICS
from tapt.packs.publish import Published, publish


@pytest.fixture
def clip(hub: LoopbackHub, toy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Backbone:
    hub.commit("owner/clip", folder_files(toy_folder))
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    backbone, _ = load_backbone("hf-hub:owner/clip", device="cpu")
    hub.requests.clear()
    return backbone


@pytest.fixture
def folder(clip: Backbone, tmp_path: Path) -> Path:
    write_pack(replace(make_pack(clip), evaluation=[ROW]), tmp_path / "mine")
    (tmp_path / "mine" / "notes.txt").write_text("not for others")
    return tmp_path / "mine"


def push(folder: Path, repo: str = "owner/pack", **options: object) -> Published:
    return publish(folder, repo, **options)


def refused(folder: Path, repo: str = "owner/pack", **options: object) -> str:
    with pytest.raises(TaptError) as error:
        publish(folder, repo, **options)
    message = str(error.value)
    assert "http" not in message
    assert "hf_" not in message.replace("`hf auth login`", "")
    return message


def test_push_and_pull_by_tag(hub: LoopbackHub, clip, folder, capsys):
    published = push(folder, tag="v1")
    assert capsys.readouterr() == ("", "")
    repo = hub.repos["owner/pack"]
    assert published.private
    assert published.commit == repo.refs["main"]
    assert published.url.endswith(f"/owner/pack/commit/{published.commit}")
    assert set(published.files) == {CONFIG, PROMPTS, STATISTICS, CARD, PICTURE}
    assert published.bytes == sum(map(len, repo.commits[published.commit].values()))
    assert repo.private
    assert len(repo.commits) == 2  # the first one is empty: all files came at once
    assert repo.tags["v1"] == repo.refs["main"]
    files = repo.commits[repo.refs["main"]]
    assert set(files) == {CONFIG, PROMPTS, STATISTICS, CARD, PICTURE}
    for name in (CONFIG, PROMPTS, STATISTICS):
        assert files[name] == (folder / name).read_bytes()
    model = load("owner/pack@v1", device="cpu", token=None)
    pack = model.pack
    assert model.backbone.sha256 == clip.sha256
    assert pack.origin.commit == repo.tags["v1"]
    original = make_pack(clip).prompts.tensors
    assert all(torch.equal(pack.prompts.tensors[k], v) for k, v in original.items())


def test_the_card_of_a_published_pack(hub: LoopbackHub, clip, folder):
    assert not push(folder, public=True).private
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
    assert 'tapt.load("owner/pack")' in text
    row = "CIFAR-10 | tapt | static | pgd-100 | 1/255 | 1000 | 70.0 | 67.0-73.0 | 50.0 | 47.0-53.0"
    assert f"| {row} | 0.2000 | 100 steps |" in text
    picture = Image.open(BytesIO(files[PICTURE])).convert("RGB")
    assert picture.width > 600
    assert len(picture.getcolors(1 << 20)) > 10


def test_what_people_wrote_into_the_card_is_published(hub: LoopbackHub, clip, folder):
    card = folder / CARD
    card.write_text(card.read_text() + "\n## Notes\n\nThe views defend.\n\n### Search\n\n8 runs.\n")
    push(folder)
    repo = hub.repos["owner/pack"]
    published = repo.commits[repo.refs["main"]][CARD].decode()
    assert published.endswith("|\n\n## Notes\n\nThe views defend.\n\n### Search\n\n8 runs.\n")


def test_a_pack_without_numbers_has_no_picture(hub: LoopbackHub, clip, folder):
    write_pack(make_pack(clip), folder)
    push(folder)
    repo = hub.repos["owner/pack"]
    assert PICTURE not in repo.commits[repo.refs["main"]]


def test_a_proposal_to_somebody_elses_repo(hub: LoopbackHub, clip, folder, monkeypatch):
    push(folder)
    main_before = hub.repos["owner/pack"].refs["main"]
    hub.repos["owner/pack"].private = False
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert refused(folder) == "Your token has no right to do this with owner/pack."
    (folder / CARD).unlink()
    assert "/discussions/1" in push(folder, create_pr=True).url
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
            "base_model.architecture.text_width must be a whole number",
        ),
        "card": (lambda: (folder / CARD).write_bytes(b"\xff"), "is not a UTF-8 text"),
        "folder-backbone": (
            lambda: config(lambda c: c["base_model"].update(source="local-dir:/home/me/clip")),
            "which others cannot load",
        ),
    }


@pytest.mark.parametrize("case", [*invalid(Path())])
def test_an_invalid_pack_never_leaves_the_machine(hub: LoopbackHub, clip, folder, case):
    damage, sentence = invalid(folder)[case]
    damage()
    assert sentence in (error := refused(folder))
    assert "/home/me" not in error
    assert hub.requests == []


@pytest.mark.parametrize(
    ("options", "repo", "sentence"),
    [
        ({}, "pack", "'pack' is not a repo id; write owner/repo"),
        ({}, "owner/pack/sub", "is not a repo id"),
        ({}, "owner/pack@v1", "is not a repo id"),
        ({"tag": "a b"}, "owner/pack", "tag must be of letters"),
        ({"tag": "../x"}, "owner/pack", "tag must be of letters"),
        ({"tag": ""}, "owner/pack", "tag must be of letters"),
        ({"tag": "v1", "create_pr": True}, "owner/pack", "leave it out of a proposal"),
    ],
)
def test_bad_options(hub: LoopbackHub, folder, options, repo, sentence):
    assert sentence in refused(folder, repo, **options)
    assert hub.requests == []


def test_tokens(hub: LoopbackHub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert "There is no Hub token: log in with `hf auth login`" in refused(folder)
    assert hub.requests == []
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "does not accept your token" in refused(folder)
    assert hub.repos.keys() == {"owner/clip"}


def test_the_token_of_an_earlier_login(hub: LoopbackHub, folder, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text("hf_owner")
    assert push(folder).private


def test_a_tag_that_fails_after_the_pack_is_there(hub: LoopbackHub, folder):
    hub.fail("POST .*/tag/", "status")
    message = refused(folder, tag="v1")
    commit = hub.repos["owner/pack"].refs["main"]
    sentence = f"The pack is published at commit {commit[:7]}, but not named 'v1': The Hub answers"
    assert message.startswith(sentence)
    hub.faults.clear()
    push(folder, tag="v1")
    assert hub.repos["owner/pack"].tags["v1"] == hub.repos["owner/pack"].refs["main"]


def test_a_taken_tag_stops_the_push(hub: LoopbackHub, folder):
    push(folder, tag="v1")
    commit = hub.repos["owner/pack"].refs["main"]
    hub.requests.clear()
    assert "has a version 'v1' already" in refused(folder, tag="v1")
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
def test_faults_on_the_way(hub: LoopbackHub, folder, monkeypatch, fault: str, step: str):
    options, sentence = FAULTS[fault]
    hub.fail(step, **options)
    with monkeypatch.context() as patch:
        patch.setattr(tapt.packs.client, "PATIENCE", 2.5)
        error = refused(folder)
    assert sentence in error or (fault == "race" and "changed" in error)
    repo = hub.repos.get("owner/pack")
    assert repo is None or len(repo.commits) == 1
    hub.faults.clear()
    push(folder)
