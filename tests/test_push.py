"""Publishing against a Hub on this computer: what is sent, what is refused, what is said."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPO, make_pack
from loopback import LoopbackHub
from PIL import Image
from test_pack import ROW

import tapt.packs.client
from tapt.core.backbone import Backbone
from tapt.core.errors import TaptError
from tapt.model import load
from tapt.packs.card import PICTURE, write_pack
from tapt.packs.format import CARD, CONFIG, PROMPTS, STATISTICS
from tapt.packs.publish import publish


@pytest.fixture
def folder(hub_clip: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    write_pack(make_pack(hub_clip, evaluation=[ROW]), tmp_path / "mine")
    (tmp_path / "mine" / "notes.txt").write_text("not for others")
    return tmp_path / "mine"


def refused(folder: Path, repo: str = REPO, **options: object) -> str:
    with pytest.raises(TaptError) as error:
        publish(folder, repo, **options)
    message = str(error.value)
    assert "http" not in message
    assert "hf_" not in message
    return message


def on_hub(hub: LoopbackHub, ref: str = "main") -> dict[str, bytes]:
    repo = hub.repos[REPO]
    return repo.commits[repo.refs[ref]]


def test_push_and_pull_by_tag(hub: LoopbackHub, hub_clip, folder, capsys):
    published = publish(folder, REPO, tag="v1")
    assert capsys.readouterr() == ("", "")
    repo, files = hub.repos[REPO], on_hub(hub)
    assert repo.private
    assert published.private
    assert published.commit == repo.refs["main"] == repo.tags["v1"]
    assert published.url.endswith(f"/owner/pack/commit/{published.commit}")
    assert set(published.files) == set(files) == {CONFIG, PROMPTS, STATISTICS, CARD, PICTURE}
    assert published.bytes == sum(map(len, files.values()))
    assert len(repo.commits) == 2  # the first one is empty: all files came at once
    for name in (CONFIG, PROMPTS, STATISTICS):
        assert files[name] == (folder / name).read_bytes()
    model = load(f"{REPO}@v1", device="cpu", token=None)
    assert (model.backbone.sha256, model.pack.origin.commit) == (hub_clip.sha256, published.commit)
    original = make_pack(hub_clip).prompts.tensors
    assert all(torch.equal(model.pack.prompts.tensors[k], v) for k, v in original.items())
    hub.requests.clear()
    assert "has a version 'v1' already" in refused(folder, tag="v1")
    assert repo.refs["main"] == published.commit
    assert not any("preupload" in request for request in hub.requests)


def test_the_card_of_a_published_pack(hub: LoopbackHub, hub_clip, folder):
    notes = "## Notes\n\nThe views defend.\n\n### Search\n\n8 runs.\n"
    (folder / CARD).write_text(f"{(folder / CARD).read_text()}\n{notes}")
    assert not publish(folder, REPO, public=True).private
    assert not hub.repos[REPO].private
    files = on_hub(hub)
    _, front, text = files[CARD].decode().split("---\n", 2)
    data = yaml.safe_load(front)
    assert (data["base_model"], data["base_model_relation"]) == ("owner/clip", "adapter")
    assert {"tapt", f"tapt-weights-{hub_clip.sha256[:16]}"} <= set(data["tags"])
    metrics = [m for r in data["model-index"][0]["results"] for m in r["metrics"]]
    assert {m["name"]: m["value"] for m in metrics} == {
        "clean accuracy (tapt)": 0.7,
        "accuracy under pgd-100 1/255 on static (tapt)": 0.5,
    }
    assert f"]({PICTURE})" in text
    assert 'tapt.load("owner/pack")' in text
    row = "CIFAR-10 | tapt | static | pgd-100 | 1/255 | 1000 | 70.0 | 67.0-73.0 | 50.0 | 47.0-53.0"
    assert text.endswith(f"| {row} | 0.2000 | 100 steps |\n\n{notes}")
    picture = Image.open(BytesIO(files[PICTURE])).convert("RGB")
    assert picture.width > 600
    assert len(picture.getcolors(1 << 20)) > 10


def test_a_proposal_to_somebody_elses_repo(hub: LoopbackHub, hub_clip, folder, monkeypatch):
    write_pack(make_pack(hub_clip), folder)
    publish(folder, REPO, public=True)
    before = on_hub(hub)
    assert PICTURE not in before  # a pack without numbers
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert refused(folder) == "Your token has no right to do this with owner/pack."
    (folder / CARD).unlink()
    assert "/discussions/1" in publish(folder, REPO, create_pr=True).url
    assert on_hub(hub) == before
    assert CARD in on_hub(hub, "refs/pr/1")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: folder.rename(folder.parent / "away"), "no folder"),
        (lambda folder: (folder / PROMPTS).write_bytes(b"\x00" * 9), "not a complete safetensors"),
        (lambda folder: (folder / CARD).write_bytes(b"\xff"), "is not a UTF-8 text"),
        (lambda folder: reconfigure(folder, "prompts", tokens=3), "must have shape"),
        (lambda folder: reconfigure(folder, "prompts", visual_depth=9), "at most 3"),
        (
            lambda folder: reconfigure(folder, "base_model", source="local-dir:/home/me/clip"),
            "'local-dir', which others cannot load",
        ),
    ],
)
def test_an_invalid_pack_never_leaves_the_machine(hub: LoopbackHub, folder, damage, sentence):
    damage(folder)
    assert sentence in refused(folder)
    assert hub.requests == []


def reconfigure(folder: Path, part: str, **changes: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    config[part].update(changes)
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("options", "repo", "sentence"),
    [
        ({}, "pack", "'pack' is not a repo id; write owner/repo"),
        ({}, "owner/pack/sub", "is not a repo id"),
        ({}, "owner/pack@v1", "is not a repo id"),
        ({"tag": "../x"}, REPO, "tag must be of letters"),
        ({"tag": ""}, REPO, "tag must be of letters"),
        ({"tag": "v1", "create_pr": True}, REPO, "leave it out of a proposal"),
    ],
)
def test_bad_options(hub: LoopbackHub, folder, options, repo, sentence):
    assert sentence in refused(folder, repo, **options)
    assert hub.requests == []


def test_tokens(hub: LoopbackHub, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "does not accept your token" in refused(folder)
    assert hub.repos.keys() == {"owner/clip"}
    monkeypatch.delenv("HF_TOKEN")
    hub.requests.clear()
    assert "There is no Hub token: log in with `hf auth login`" in refused(folder)
    assert hub.requests == []
    (tmp_path / "token").write_text("hf_owner")  # of an earlier login
    assert publish(folder, REPO).private


def test_a_tag_that_fails_after_the_pack_is_there(hub: LoopbackHub, folder):
    hub.fail("POST .*/tag/", "status")
    message = refused(folder, tag="v1")
    commit = hub.repos[REPO].refs["main"]
    sentence = f"The pack is published at commit {commit[:7]}, but not named 'v1': The Hub answers"
    assert message.startswith(sentence)
    hub.faults.clear()
    publish(folder, REPO, tag="v1")
    assert hub.repos[REPO].tags["v1"] == hub.repos[REPO].refs["main"]


@pytest.mark.parametrize(
    ("step", "fault", "sentence"),
    [
        ("POST /api/repos", {"kind": "status"}, "The Hub answers with status 503."),
        ("POST .*preupload", {"kind": "status", "status": 200, "body": b"<html>"}, "not the Hub's"),
        ("POST .*/batch", {"kind": "stall"}, "The Hub does not answer"),
        ("PUT /large", {"kind": "stall"}, "The Hub does not answer"),
        ("POST .*/commit/", {"kind": "status", "status": 412}, "changed by somebody else"),
    ],
)
def test_faults_on_the_way(hub: LoopbackHub, folder, monkeypatch, step, fault, sentence):
    hub.fail(step, **fault)
    with monkeypatch.context() as patch:
        patch.setattr(tapt.packs.client, "PATIENCE", 2)
        assert sentence in refused(folder)
    repo = hub.repos.get(REPO)
    assert repo is None or len(repo.commits) == 1
    hub.faults.clear()
    publish(folder, REPO)
