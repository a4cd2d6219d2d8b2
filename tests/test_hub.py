"""Packs and backbones from a Hub on this computer, and everything that can go wrong there."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import open_clip
import pytest
import torch
from conftest import ROOT, folder_files, toy_config
from filelock import FileLock
from huggingface_hub import close_session, constants, get_session
from loopback import LoopbackHub
from open_clip.transformer import QuickGELU
from safetensors.torch import load, save
from test_pack import make_pack

import tapt.packs.client
import tapt.packs.hub
from tapt.__main__ import main
from tapt.core.backbone import Backbone
from tapt.core.errors import BackboneError, HubError, PackError
from tapt.model import load as load_model
from tapt.packs.backbones import CONFIG_FILE, WEIGHTS_FILE, load_backbone
from tapt.packs.card import write_pack
from tapt.packs.format import CONFIG, PROMPTS, STATISTICS, hub_packs, load_pack
from tapt.packs.hub import HubId, parse_id
from tapt.ui.service import Service

REPO = "owner/pack"


@pytest.fixture
def clip(hub: LoopbackHub, toy: Backbone, toy_folder: Path) -> Backbone:
    """The toy as `hf-hub:owner/clip`."""
    commit, name = hub.commit("owner/clip", folder_files(toy_folder)), "hf-hub:owner/clip"
    return replace(toy, name=name, source=name, revision=commit)


@pytest.fixture
def files(clip: Backbone, tmp_path: Path) -> dict[str, bytes]:
    """A pack for it."""
    write_pack(make_pack(clip), tmp_path / "pack")
    return folder_files(tmp_path / "pack")


@pytest.fixture
def published(hub: LoopbackHub, files: dict[str, bytes]) -> str:
    """The commit of the pack on the Hub; nobody has asked for it yet."""
    commit = hub.commit(REPO, files)
    hub.requests.clear()
    return commit


@contextmanager
def impatient() -> Iterator[None]:
    """A stall is 0.8 s instead of 8, at the same rate."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tapt.packs.client, "PATIENCE", 0.8)
        patch.setattr(tapt.packs.client, "PROGRESS", 8_000)
        yield


def changed(files: dict[str, bytes]) -> dict[str, bytes]:
    """Other prompts for the same backbone."""
    tensors = load(files[PROMPTS])
    return {**files, PROMPTS: save({k: v + 1 for k, v in tensors.items()})}


def refused(clip: Backbone, source: str = REPO, **options: object) -> str:
    with pytest.raises((HubError, PackError)) as error:
        load_pack(source, clip, **options)
    message = str(error.value)
    assert "/cache" not in message
    assert "http" not in message
    return message


def host_settings() -> tuple:
    hooks = {kind: list(each) for kind, each in get_session().event_hooks.items()}
    level = logging.getLogger("huggingface_hub").level
    return get_session(), hooks, constants.DOWNLOAD_CHUNK_SIZE, level, constants.ENDPOINT


def test_the_programs_own_use_of_the_client_is_left_alone(hub, clip, published, monkeypatch):
    # first of all: a job that a later test leaves hanging keeps the client's settings changed
    before, during, real = host_settings(), [], tapt.packs.hub.hf_hub_download

    def spy(*args: object, **options: object) -> str:
        during.append(host_settings())
        return real(*args, **options)

    monkeypatch.setattr(tapt.packs.hub, "hf_hub_download", spy)
    load_pack(REPO, clip)
    assert host_settings() == before
    assert {each[0] for each in during} == {before[0]}  # connections of others may be in use
    assert all(each[1:] != before[1:] for each in during)
    hub.fail("GET", "status", status=404)
    refused(clip, "owner/none")
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


def test_a_pack_is_pulled_bit_for_bit_and_then_known(hub, clip, files, published):
    told = []
    pack = load_pack(REPO, clip, progress=lambda done, total: told.append((done, total)))
    for name, tensor in load(files[PROMPTS]).items():
        assert torch.equal(pack.prompts.tensors[name], tensor)
    assert torch.equal(pack.statistics.clean.var, load(files[STATISTICS])["clean.var"])
    size = sum(len(files[name]) for name in (CONFIG, PROMPTS, STATISTICS))
    assert (pack.origin.repo, pack.origin.commit, pack.origin.size) == (REPO, published, size)
    assert (pack.origin.cached, pack.origin.unreachable) == (False, None)
    assert told == sorted(told)
    assert [each for each in told if each[0] == size] == [(size, size)]  # the bar ends once
    again = load_pack(REPO, clip).origin
    assert (again.cached, again.unreachable) == (True, None)
    assert str(again).endswith("from the local cache)")
    hub.requests.clear()
    assert load_pack(f"{REPO}@{published}", clip).origin.unreachable is None
    assert hub.requests == []  # a commit is what it was


def test_only_the_packs_files_of_one_commit_are_read(hub, clip, files, published, monkeypatch):
    hub.commit(REPO, {"pickle.bin": b"x", "pytorch_model.bin": b"y", "deep/config.json": b"{}"})
    commit = hub.repos[REPO].refs["main"]
    hub.requests.clear()

    def push_between(done: int, total: int) -> None:
        if hub.repos[REPO].refs["main"] == commit:
            hub.commit(REPO, changed(files))

    pack = load_pack(REPO, clip, progress=push_between)
    assert pack.origin.commit == commit
    asked = {re.sub(".*/resolve/", "", request) for request in hub.requests[1:]}
    assert asked == {f"{commit}/{name}" for name in (CONFIG, PROMPTS, STATISTICS)}
    assert torch.equal(pack.prompts.tensors["text"], load(files[PROMPTS])["text"])
    assert not any(hub.authorized)


def test_revisions_and_subfolders(hub, clip, files):
    first = hub.commit("owner/many", {f"packs/vli/{k}": v for k, v in files.items()})
    hub.repos["owner/many"].tags["v1"] = first
    hub.commit("owner/many", {f"packs/vli/{k}": v for k, v in changed(files).items()})
    for revision in ("v1", first):
        pack = load_pack(f"owner/many/packs/vli@{revision}", clip)
        assert pack.origin.commit == first
        assert torch.equal(pack.prompts.tensors["text"], load(files[PROMPTS])["text"])
    newest = load_pack("owner/many/packs/vli", clip)
    assert torch.equal(newest.prompts.tensors["text"], load(files[PROMPTS])["text"] + 1)
    assert "owner/many has no revision 'v2'" in refused(clip, "owner/many/packs/vli@v2")
    assert "owner/many has no config.json" in refused(clip, "owner/many")


def test_a_folder_goes_before_the_hub(hub, clip, files, tmp_path, monkeypatch):
    (tmp_path / "owner").mkdir()
    (tmp_path / "pack").rename(tmp_path / "owner" / "pack")
    monkeypatch.chdir(tmp_path)
    hub.requests.clear()
    assert load_pack(REPO, clip).origin is None
    assert hub.requests == []


def test_the_cache_serves_when_the_hub_is_gone_and_offline(hub, clip, published, monkeypatch):
    load_model(REPO, device="cpu")
    hub.stop()
    gone = load_pack(REPO, clip)
    assert gone.origin.cached
    assert gone.origin.unreachable == "the Hub cannot be reached"
    assert "owner/none is not in the local cache, and the Hub cannot be reached." in refused(
        clip, "owner/none"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.start()
    hub.requests.clear()
    assert "offline mode" in load_pack(REPO, clip).origin.unreachable
    assert "offline mode" in refused(clip, "owner/none")
    assert load_model(REPO, device="cpu").backbone.sha256 == clip.sha256
    with pytest.raises(HubError, match="Offline mode is on"):
        hub_packs(clip)
    assert hub.requests == []


def test_a_name_server_that_does_not_answer(hub, clip, published, monkeypatch):
    real = socket.getaddrinfo
    released = threading.Event()

    def hang(host, *args: object, **options: object):
        released.wait(30)
        return real(host, *args, **options)

    close_session()  # connections that are open need no name
    monkeypatch.setattr(socket, "getaddrinfo", hang)
    with impatient():
        assert "the Hub does not answer" in refused(clip)
    released.set()


FAULTS = {
    "stall": ({"kind": "stall"}, "does not answer"),
    "drip": ({"kind": "drip", "size": 1, "seconds": 0.1}, "less than 10 kB/s"),
    "503": ({"kind": "status"}, "answers with status 503"),
    "429": (
        {"kind": "status", "status": 429, "headers": {"Retry-After": "3600"}},
        "answers with status 429 (too many requests)",
    ),
    "login-page": ({"kind": "status", "status": 200, "body": b"<html>"}, "answer is not the Hub's"),
    "proxy-page": (
        {"kind": "status", "status": 403, "headers": {"Content-Type": "text/html"}},
        "answer is not the Hub's",
    ),
    "login-elsewhere": (
        {"kind": "status", "status": 302, "headers": {"Location": "/login"}},
        "answer is not the Hub's",
    ),
    "reset": ({"kind": "reset", "size": -1}, "connection to the Hub broke off"),
    "cut": ({"kind": "cut"}, "broke off"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_first_answer(hub, clip, files, published, fault: str):
    options, sentence = FAULTS[fault]
    hub.fail("GET /api/models", **options)
    with impatient():
        message = refused(clip)
    assert message.startswith(f"{REPO} is not in the local cache, and ")
    assert sentence in message
    hub.faults.clear()
    load_pack(REPO, clip)
    hub.fail("GET /api/models", **options)
    with impatient():
        pack = load_pack(REPO, clip)
    assert pack.origin.cached
    assert sentence in pack.origin.unreachable
    assert torch.equal(pack.prompts.tensors["text"], load(files[PROMPTS])["text"])


@pytest.mark.parametrize("fault", ["stall", "drip", "503", "login-page"])
def test_faults_of_a_file_leave_the_commit_before(hub, clip, files, published, fault: str):
    load_pack(REPO, clip)
    newer = hub.commit(REPO, changed(files))
    hub.fail(f"resolve/.*/{PROMPTS}", **FAULTS[fault][0])
    with impatient():
        pack = load_pack(REPO, clip)
    assert pack.origin.commit == published
    assert FAULTS[fault][1] in pack.origin.unreachable
    assert torch.equal(pack.prompts.tensors["text"], load(files[PROMPTS])["text"])
    hub.faults.clear()
    assert load_pack(REPO, clip).origin.commit == newer


def test_a_hub_that_stalls_is_waited_for_once(hub, clip, published):
    names = {"backbone": "hf-hub:owner/clip", "pack": REPO}
    load_model(**names, device="cpu")
    hub.fail("GET", "stall")
    hub.requests.clear()
    with impatient():
        model = load_model(**names, device="cpu")
    assert len(hub.requests) == 1
    ours, packs = model.origins
    assert "does not answer" in ours.unreachable
    assert ours.unreachable == packs.unreachable


@pytest.mark.parametrize("kind", ["reset", "cut"])
def test_a_broken_download_goes_on_where_it_was(hub, clip, files, published, kind: str):
    hub.fail(f"GET .*{STATISTICS}", kind, times=1, size=20_000)
    assert load_pack(REPO, clip).origin.unreachable is None
    assert sum(f"GET /{REPO}/resolve/{published}/{STATISTICS}" in r for r in hub.requests) == 2


def test_a_damaged_file_is_fetched_once_more_and_never_kept(hub, clip, files, published):
    hub.fail(f"GET .*{PROMPTS}", "flip", times=1)
    pack = load_pack(REPO, clip)
    assert torch.equal(pack.prompts.tensors["text"], load(files[PROMPTS])["text"])
    hub.commit(REPO, changed(files))
    hub.fail(f"GET .*{PROMPTS}", "flip")
    assert f"{PROMPTS} of {REPO} arrives damaged" in refused(clip)
    blobs = Path(constants.HF_HUB_CACHE, "models--owner--pack", "blobs")
    for blob in blobs.iterdir():
        if len(blob.name) == 64:
            assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name
    hub.faults.clear()
    assert load_pack(REPO, clip).origin.unreachable is None


def test_a_damaged_or_partial_cache_is_not_used(hub, clip, files, published):
    load_pack(REPO, clip)
    cache = Path(constants.HF_HUB_CACHE, "models--owner--pack", "snapshots", published)
    told = []
    for content in (b"", files[PROMPTS][:-1] + b"\x00"):
        (cache / PROMPTS).resolve().write_bytes(content)
        pack = load_pack(REPO, clip, progress=lambda *progress: told.append(progress))
        assert not pack.origin.cached
        assert told[-1] == (pack.origin.size, pack.origin.size)
        assert torch.equal(pack.prompts.tensors["text"], load(files[PROMPTS])["text"])
    (cache / STATISTICS).unlink()
    hub.stop()
    assert "not in the local cache" in refused(clip)
    assert load_pack(REPO, clip, statistics=False).origin.cached
    (cache / PROMPTS).resolve().write_bytes(b"bad")
    assert "not in the local cache" in refused(clip, statistics=False)


def test_a_link_and_a_large_file_are_not_followed(hub, clip, files):
    hub.commit(REPO, {**files, CONFIG: b"../../../../etc/passwd"})
    assert "is not valid JSON" in refused(clip)
    hub.commit(REPO, {CONFIG: files[CONFIG] + b" " * 2_000_000})
    hub.requests.clear()
    assert "at most 1 MB" in refused(clip)
    assert len(hub.requests) == 1  # refused before any download


@pytest.mark.parametrize(
    "source", ["local-dir:/etc", "random:ViT-B-32", "../x", "hf-hub:owner/repo/../../x", "hf-hub:"]
)
def test_a_pack_from_the_hub_names_no_folder(hub, clip, files, source: str):
    config = json.loads(files[CONFIG])
    config["base_model"]["source"] = source
    hub.commit(REPO, {**files, CONFIG: json.dumps(config).encode()})
    with pytest.raises(PackError, match="names a backbone that is not on the Hub"):
        load_model(REPO)


def test_gated_private_and_missing_repos(hub, clip, files, monkeypatch):
    hub.commit("owner/gated", files, gated=True)
    hub.commit("owner/secret", files, private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_owner")  # which is not sent unasked
    hub.authorized.clear()
    assert "owner/gated is gated: accept its terms" in refused(clip, "owner/gated")
    for repo in ("owner/secret", "owner/none"):
        assert f"has no model repo {repo}" in refused(clip, repo)
    assert not any(hub.authorized)
    assert "is gated" in refused(clip, "owner/gated", token="hf_other")
    for repo in ("owner/gated", "owner/secret"):
        assert load_pack(repo, clip, token="hf_owner").origin.repo == repo
    message = refused(clip, "owner/none", token="hf_wrong")
    assert "does not accept your token" in message
    assert "hf_wrong" not in message


def test_no_room_on_the_disk(hub, clip, published, monkeypatch):
    import resource

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, old[1]))
    try:
        message = refused(clip)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "there is no room on the disk" in message
    assert load_pack(REPO, clip).origin.unreachable is None


@contextmanager
def read_only(cache: Path) -> Iterator[None]:
    """For root too, which modes do not stop: as nobody."""
    folders = [path for path in (cache, *cache.rglob("*")) if path.is_dir()]
    root = os.geteuid() == 0
    for folder in folders:
        folder.chmod(0o555)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for folder in folders:
            folder.chmod(0o755)


def test_a_read_only_cache(hub, clip, files, published, monkeypatch):
    with TemporaryDirectory() as cache:  # pytest's own folders are closed to others
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", cache)
        load_pack(REPO, clip)
        hub.commit("owner/other", files)
        with read_only(Path(cache)):
            assert load_pack(REPO, clip).origin.unreachable is None
            assert "cache folder cannot be written (set HF_HOME" in refused(clip, "owner/other")
        assert load_pack("owner/other", clip).origin.unreachable is None


def test_two_at_once_on_a_slow_line(hub, clip, files, published):
    hub.fail(f"GET .*{STATISTICS}", "drip", size=3000, seconds=0.1)  # about 2.5 s in all
    packs = []
    threads = [
        threading.Thread(target=lambda: packs.append(load_pack(REPO, clip))) for _ in range(2)
    ]
    with impatient():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [pack.origin.unreachable for pack in packs] == [None, None]
    assert torch.equal(*(pack.prompts.tensors["text"] for pack in packs))
    assert sum(STATISTICS in r and r.startswith("GET") for r in hub.requests) == 1


def test_a_program_that_hangs_while_it_fetches_the_same_file(hub, clip, files, published):
    name = f"{hashlib.sha256(files[PROMPTS]).hexdigest()}.lock"
    lock = Path(constants.HF_HUB_CACHE, ".locks", "models--owner--pack", name)
    lock.parent.mkdir(parents=True)
    with FileLock(lock), impatient():
        assert "does not answer" in refused(clip)
    assert load_pack(REPO, clip).origin.unreachable is None


def test_a_backbone_at_the_commit_that_the_pack_names(hub, clip, files, published):
    hub.commit("owner/clip", {CONFIG_FILE: b"{}", WEIGHTS_FILE: b"newer"})
    model = load_model(REPO, device="cpu")
    backbone = model.backbone
    assert backbone.sha256 == clip.sha256 == model.pack.base_model["sha256"]
    assert (backbone.source, backbone.revision) == ("hf-hub:owner/clip", clip.revision)
    by_name, _ = load_backbone(f"hf-hub:owner/clip@{clip.revision}", device="cpu")
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


def test_packs_of_the_hub_that_fit(hub, clip, files, published):
    hub.commit("owner/plain", {"README.md": b"---\ntags: [clip]\n---\n"})
    named = b"---\ntags: [tapt]\nbase_model: owner/clip\n---\n"
    hub.commit("owner/by-name", {"README.md": named})
    hub.commit("owner/else", {"README.md": named.replace(b"owner/clip", b"owner/other")})
    hub.commit("owner/hidden", files, private=True)
    assert hub_packs(clip) == [REPO, "owner/by-name"]
    hub.stop()
    with pytest.raises(HubError, match=r"^The Hub cannot be reached\.$"):
        hub_packs(clip)


def test_the_pages_service(hub, clip, files, published):
    service = Service(None, REPO, "cpu", allow_packs="any")
    first = service.first
    assert first.pack.name == REPO
    assert service.hub_packs(first.backbone.name) == [REPO]
    hub.commit("owner/next", changed(files))
    told = []
    other = service.model(pack="owner/next", progress=lambda *progress: told.append(progress))
    assert other.backbone.model is first.backbone.model
    assert other.pack.name == "owner/next"
    assert told[-1][0] == told[-1][1] == other.pack.origin.size
    with pytest.raises(HubError, match="no model repo owner/none"):
        service.model(pack="owner/none")


def test_nobody_waits_for_another_visitors_pack(hub, clip, files, published):
    service = Service("hf-hub:owner/clip", None, "cpu", allow_packs="any")
    loaded = service.model(pack=REPO)
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


OWN_PROCESS = """
import logging, os
from huggingface_hub import constants, get_session
def state():
    own = {k: v for k, v in vars(constants).items() if k.isupper()}
    return dict(os.environ), own, get_session(), get_session().event_hooks, logging.getLogger(
        "huggingface_hub").level
before = state()
import tapt, tapt.model, tapt.packs.publish, tapt.packs.convert
assert state() == before
print(tapt.load("owner/pack").pack.origin)
"""


def test_two_processes_at_once_which_importing_leaves_as_they_are(hub, clip, published, tmp_path):
    hub.fail(f"GET .*{STATISTICS}", "drip", size=5000, seconds=0.2)
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", OWN_PROCESS],
            cwd=ROOT,
            env={**os.environ, **own},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in both:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        assert out.startswith(f"{REPO} at commit {published[:7]} (0.1 MB")


def test_predict_with_a_hub_id_alone(hub, clip, published, capsys, monkeypatch):
    picture = str(ROOT / "tapt" / "examples" / "cat.png")
    command = ["predict", picture, "--classes", "cat,dog", "--json", "--pack", REPO]

    def predict() -> tuple[dict, str]:
        assert not main([*command, "--device", "cpu"])
        out, told = capsys.readouterr()
        return json.loads(out), told

    first, told = predict()
    assert f"Pack {REPO} at commit {published[:7]}" in told
    assert "Download: 100%" in told
    assert first["settings"]["trained"] is True
    hub.stop()
    gone, told = predict()
    assert "from the local cache: the Hub cannot be reached" in told
    assert first["results"] == gone["results"]
