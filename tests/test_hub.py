"""Packs and backbones from a Hub on this computer: what is fetched, and what is refused."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading

import open_clip
import pytest
import torch
from conftest import REPO, ROOT, changed, folder_files, make_pack, refused_pack, toy_config
from huggingface_hub import constants, get_session
from open_clip.transformer import QuickGELU
from safetensors.torch import load, save

import tapt.packs.hub
from tapt.__main__ import main
from tapt.core.errors import BackboneError, HubError, PackError
from tapt.model import load as load_model
from tapt.packs.backbones import CONFIG_FILE, WEIGHTS_FILE, load_backbone
from tapt.packs.card import write_pack
from tapt.packs.format import CONFIG, PROMPTS, STATISTICS, hub_packs, load_pack
from tapt.packs.hub import HubId, parse_id
from tapt.ui.service import Service


def host_settings() -> tuple:
    hooks = {kind: list(each) for kind, each in get_session().event_hooks.items()}
    level = logging.getLogger("huggingface_hub").level
    return get_session(), hooks, constants.DOWNLOAD_CHUNK_SIZE, level, constants.ENDPOINT


def test_the_programs_own_use_of_the_client_is_left_alone(hub, hub_clip, published, monkeypatch):
    # first of all: a job that a later test leaves hanging keeps the client's settings changed
    before, during, real = host_settings(), [], tapt.packs.hub.hf_hub_download

    def spy(*args: object, **options: object) -> str:
        during.append(host_settings())
        return real(*args, **options)

    monkeypatch.setattr(tapt.packs.hub, "hf_hub_download", spy)
    load_pack(REPO, hub_clip)
    assert host_settings() == before
    assert {each[0] for each in during} == {before[0]}  # connections of others may be in use
    assert all(each[1:] != before[1:] for each in during)
    hub.fail("GET", "status", status=404)
    refused_pack(hub_clip, "owner/none")
    assert host_settings() == before


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("owner/repo", ("owner/repo", "", None)),
        ("owner/repo@refs/pr/1", ("owner/repo", "", "refs/pr/1")),
        ("o-w.n/r_e/deep/er@" + "a" * 40, ("o-w.n/r_e", "deep/er", "a" * 40)),
        *((text, None) for text in ("", "repo", "/etc/passwd", "./a/b", "../a", "owner/..")),
        *((f"owner/repo{end}", None) for end in ("/../x", "@", "@../x", "@a..b", "@a@b", "@/x")),
        *((f"owner/repo{end}", None) for end in ("//b", "/./x", " x", "\n")),
        *((text, None) for text in ("~/pack/x", "öwner/repo", "C:\\a\\b")),
    ],
)
def test_hub_ids(text: str, parts: tuple | None):
    assert parse_id(text) == (parts and HubId(*parts))


def test_a_pack_is_pulled_bit_for_bit_and_then_known(hub, hub_clip, files, published):
    told = []
    pack = load_pack(REPO, hub_clip, progress=lambda done, total: told.append((done, total)))
    for name, tensor in load(files[PROMPTS]).items():
        assert torch.equal(pack.prompts.tensors[name], tensor)
    assert torch.equal(pack.statistics.clean.var, load(files[STATISTICS])["clean.var"])
    size = sum(len(files[name]) for name in (CONFIG, PROMPTS, STATISTICS))
    assert (pack.origin.repo, pack.origin.commit, pack.origin.size) == (REPO, published, size)
    assert (pack.origin.cached, pack.origin.unreachable) == (False, None)
    assert told == sorted(told)
    assert [each for each in told if each[0] == size] == [(size, size)]  # the bar ends once
    again = load_pack(REPO, hub_clip).origin
    assert (again.cached, again.unreachable) == (True, None)
    assert str(again).endswith("from the local cache)")
    hub.requests.clear()
    assert load_pack(f"{REPO}@{published}", hub_clip).origin.unreachable is None
    assert hub.requests == []  # a commit is what it was


def test_only_the_packs_files_of_one_commit_are_read(hub, hub_clip, files, published):
    hub.commit(REPO, {"pickle.bin": b"x", "pytorch_model.bin": b"y", "deep/config.json": b"{}"})
    commit = hub.repos[REPO].refs["main"]
    hub.requests.clear()

    def push_between(done: int, total: int) -> None:
        if hub.repos[REPO].refs["main"] == commit:
            hub.commit(REPO, changed(files))

    pack = load_pack(REPO, hub_clip, progress=push_between)
    assert pack.origin.commit == commit
    asked = {re.sub(".*/resolve/", "", request) for request in hub.requests[1:]}
    assert asked == {f"{commit}/{name}" for name in (CONFIG, PROMPTS, STATISTICS)}
    assert torch.equal(pack.prompts.tensors["text"], load(files[PROMPTS])["text"])
    assert not any(hub.authorized)


def test_revisions_and_subfolders(hub, hub_clip, files):
    first = hub.commit("owner/many", {f"packs/vli/{k}": v for k, v in files.items()})
    hub.repos["owner/many"].tags["v1"] = first
    hub.commit("owner/many", {f"packs/vli/{k}": v for k, v in changed(files).items()})
    for revision in ("v1", first):
        pack = load_pack(f"owner/many/packs/vli@{revision}", hub_clip)
        assert pack.origin.commit == first
        assert torch.equal(pack.prompts.tensors["text"], load(files[PROMPTS])["text"])
    newest = load_pack("owner/many/packs/vli", hub_clip)
    assert torch.equal(newest.prompts.tensors["text"], load(files[PROMPTS])["text"] + 1)
    assert "owner/many has no revision 'v2'" in refused_pack(hub_clip, "owner/many/packs/vli@v2")
    assert "owner/many has no config.json" in refused_pack(hub_clip, "owner/many")


def test_a_folder_goes_before_the_hub(hub, hub_clip, files, tmp_path, monkeypatch):
    (tmp_path / "owner").mkdir()
    (tmp_path / "pack").rename(tmp_path / "owner" / "pack")
    monkeypatch.chdir(tmp_path)
    hub.requests.clear()
    assert load_pack(REPO, hub_clip).origin is None
    assert hub.requests == []


def test_a_link_and_a_large_file_are_not_followed(hub, hub_clip, files):
    hub.commit(REPO, {**files, CONFIG: b"../../../../etc/passwd"})
    assert "is not valid JSON" in refused_pack(hub_clip)
    hub.commit(REPO, {CONFIG: files[CONFIG] + b" " * 2_000_000})
    hub.requests.clear()
    assert "at most 1 MB" in refused_pack(hub_clip)
    assert len(hub.requests) == 1  # refused before any download


@pytest.mark.parametrize(
    "source", ["local-dir:/etc", "random:ViT-B-32", "../x", "hf-hub:owner/repo/../../x", "hf-hub:"]
)
def test_a_pack_from_the_hub_names_no_folder(hub, hub_clip, files, source: str):
    config = json.loads(files[CONFIG])
    config["base_model"]["source"] = source
    hub.commit(REPO, {**files, CONFIG: json.dumps(config).encode()})
    with pytest.raises(PackError, match="names a backbone that is not on the Hub"):
        load_model(REPO)


def test_gated_private_and_missing_repos(hub, hub_clip, files, monkeypatch):
    hub.commit("owner/gated", files, gated=True)
    hub.commit("owner/secret", files, private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_owner")  # which is not sent unasked
    hub.authorized.clear()
    assert "owner/gated is gated: accept its terms" in refused_pack(hub_clip, "owner/gated")
    for repo in ("owner/secret", "owner/none"):
        assert f"has no model repo {repo}" in refused_pack(hub_clip, repo)
    assert not any(hub.authorized)
    assert "is gated" in refused_pack(hub_clip, "owner/gated", token="hf_other")
    for repo in ("owner/gated", "owner/secret"):
        assert load_pack(repo, hub_clip, token="hf_owner").origin.repo == repo
    message = refused_pack(hub_clip, "owner/none", token="hf_wrong")
    assert "does not accept your token" in message
    assert "hf_wrong" not in message


def test_a_backbone_at_the_commit_that_the_pack_names(hub, hub_clip, files, published):
    hub.commit("owner/clip", {CONFIG_FILE: b"{}", WEIGHTS_FILE: b"newer"})
    model = load_model(REPO, device="cpu")
    backbone = model.backbone
    assert backbone.sha256 == hub_clip.sha256 == model.pack.base_model["sha256"]
    assert (backbone.source, backbone.revision) == ("hf-hub:owner/clip", hub_clip.revision)
    by_name, _ = load_backbone(f"hf-hub:owner/clip@{hub_clip.revision}", device="cpu")
    assert (by_name.source, by_name.revision) == (backbone.source, backbone.revision)
    with pytest.raises(BackboneError, match="does not describe a CLIP"):
        load_backbone("hf-hub:owner/clip", device="cpu")


def test_backbone_weights_are_checked(hub, toy_folder):
    files = folder_files(toy_folder)
    hub.commit("owner/clip", files)
    hub.fail(f"GET .*{WEIGHTS_FILE}", "flip")
    with pytest.raises(HubError, match=f"{WEIGHTS_FILE} of owner/clip arrives damaged"):
        load_backbone("hf-hub:owner/clip")
    hub.faults.clear()
    weights = load(files[WEIGHTS_FILE])
    weights["visual.proj"][0, 0] = float("inf")
    hub.commit("owner/clip", {WEIGHTS_FILE: save(weights)})
    with pytest.raises(BackboneError, match="not finite"):
        load_backbone("hf-hub:owner/clip")


def test_openais_named_weights_come_from_the_hub(hub, toy_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-16", toy_config())
    repo = "timm/vit_base_patch16_clip_224.openai"
    weights = (toy_folder / WEIGHTS_FILE).read_bytes()
    commit = hub.commit(repo, {WEIGHTS_FILE: weights, "open_clip_pytorch_model.bin": b"pickle"})
    backbone, _ = load_backbone("ViT-B-16", device="cpu")
    assert (backbone.source, backbone.revision) == ("ViT-B-16", commit)
    assert backbone.sha256 == hashlib.sha256(weights).hexdigest()
    asked = [request for request in hub.requests if "/resolve/" in request]
    assert {r.partition("/resolve/")[2] for r in asked} == {f"{commit}/{WEIGHTS_FILE}"}
    write_pack(make_pack(backbone), tmp_path / "pack")
    hub.commit(REPO, folder_files(tmp_path / "pack"))
    hub.commit(repo, {WEIGHTS_FILE: b"newer"})
    model = load_model(REPO, device="cpu")
    assert (model.backbone.revision, model.pack.base_model["source"]) == (commit, "ViT-B-16")


def test_robust_clips_in_open_clips_layout_load_by_name(hub, toy_folder):
    """As `open_clip.push_to_hf_hub` leaves a repo: FARE and TeCoA models are published so."""
    files = folder_files(toy_folder)
    config = json.loads(files[CONFIG_FILE])
    config["model_cfg"]["quick_gelu"] = True
    config["preprocess_cfg"] |= {"interpolation": "bicubic", "resize_mode": "shortest"}
    files[CONFIG_FILE] = json.dumps(config).encode()
    others = ("README.md", "open_clip_pytorch_model.bin", "tokenizer.json", "merges.txt")
    commit = hub.commit("owner/fare2-clip", {**files, **dict.fromkeys(others, b"---\n---\n")})
    backbone, origin = load_backbone("hf-hub:owner/fare2-clip", device="cpu")
    assert (backbone.revision, origin.commit) == (commit, commit)
    assert backbone.sha256 == hashlib.sha256(files[WEIGHTS_FILE]).hexdigest()
    assert isinstance(backbone.visual.transformer.resblocks[0].mlp.gelu, QuickGELU)
    assert backbone.tokenize(["a cat"]).shape == (1, 4)
    fetched = {request.rpartition("/")[2] for request in hub.requests if "/resolve/" in request}
    assert fetched == {CONFIG_FILE, WEIGHTS_FILE}


def test_packs_of_the_hub_that_fit(hub, hub_clip, files, published):
    hub.commit("owner/plain", {"README.md": b"---\ntags: [clip]\n---\n"})
    named = b"---\ntags: [tapt]\nbase_model: owner/clip\n---\n"
    hub.commit("owner/by-name", {"README.md": named})
    hub.commit("owner/else", {"README.md": named.replace(b"owner/clip", b"owner/other")})
    hub.commit("owner/hidden", files, private=True)
    assert hub_packs(hub_clip) == [REPO, "owner/by-name"]
    hub.stop()
    with pytest.raises(HubError, match=r"^The Hub cannot be reached\.$"):
        hub_packs(hub_clip)


def test_nobody_waits_for_another_visitors_pack(hub, hub_clip, files, published):
    service = Service("hf-hub:owner/clip", None, "cpu", allow_packs="any")
    loaded = service.model(pack=REPO)
    assert loaded.backbone.model is service.first.backbone.model
    hub.commit("owner/slow", changed(files))
    hub.commit("owner/other", changed(files))
    hub.fail(f"GET /owner/slow/.*{STATISTICS}", "stall", seconds=6)
    slow = threading.Thread(target=service.model, kwargs={"pack": "owner/slow"})
    slow.start()
    while not any("GET /owner/slow/resolve" in r and STATISTICS in r for r in hub.requests):
        slow.join(0.05)
    assert service.model(pack=REPO) is loaded
    assert service.model(pack="owner/other").pack.name == "owner/other"
    assert slow.is_alive()
    hub.released.set()
    slow.join()
    assert service.model(pack="owner/slow") is service.model(pack="owner/slow")


def test_predict_with_a_hub_id_alone(hub, published, capsys):
    picture = str(ROOT / "tapt" / "examples" / "cat.png")
    command = ["predict", picture, "--classes", "cat,dog", "--json", "--pack", REPO]

    def predict() -> tuple[dict, str]:
        assert not main([*command, "--device", "cpu"])
        out, told = capsys.readouterr()
        return json.loads(out), told

    first, told = predict()
    assert f"Pack {REPO} at commit {published[:7]}" in told
    assert "Backbone owner/clip at commit" in told
    assert "Download: 100%" in told
    assert first["settings"]["trained"] is True
    hub.stop()
    gone, told = predict()
    assert "from the local cache: the Hub cannot be reached" in told
    assert first["results"] == gone["results"]
