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
from functools import partial
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
def clip(hub: LoopbackHub, toy_folder: Path) -> Backbone:
    """The toy as `hf-hub:owner/clip`."""
    hub.commit("owner/clip", folder_files(toy_folder))
    return load_backbone("hf-hub:owner/clip", device="cpu")[0]


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


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stall is 0.8 s instead of 8, at the same rate."""
    monkeypatch.setattr(tapt.packs.client, "PATIENCE", 0.8)
    monkeypatch.setattr(tapt.packs.client, "PROGRESS", 8_000)


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
        ("owner/repo@v1.0", ("owner/repo", "", "v1.0")),
        ("owner/repo@refs/pr/1", ("owner/repo", "", "refs/pr/1")),
        ("o-w.n/r_e/deep/er@" + "a" * 40, ("o-w.n/r_e", "deep/er", "a" * 40)),
    ],
)
def test_hub_ids(text: str, parts: tuple):
    assert parse_id(text) == HubId(*parts)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "repo",
        "/etc/passwd",
        "./a/b",
        "../a",
        "owner/..",
        "owner/repo/../x",
        "owner/repo@",
        "owner/repo@../x",
        "a//b",
        "owner/repo@a..b",
        "owner/repo@a@b",
        "~/pack/x",
        "owner/repo/./x",
        "owner/repo@/x",
        "öwner/repo",
        "C:\\a\\b",
        "owner/re po",
        "owner/repo\n",
    ],
)
def test_what_is_no_hub_id(text: str):
    assert parse_id(text) is None


def test_a_pack_is_pulled_bit_for_bit(hub, clip, files, published):
    pack = load_pack(REPO, clip)
    assert {k: v.tolist() for k, v in pack.prompts.tensors.items()} == {
        k: v.tolist() for k, v in load(files[PROMPTS]).items()
    }
    assert torch.equal(pack.statistics.clean.var, load(files[STATISTICS])["clean.var"])
    size = sum(len(files[name]) for name in (CONFIG, PROMPTS, STATISTICS))
    assert (pack.origin.repo, pack.origin.commit, pack.origin.size) == (REPO, published, size)
    assert (pack.origin.cached, pack.origin.unreachable) == (False, None)
    again = load_pack(REPO, clip)
    assert again.origin.cached
    assert again.origin.unreachable is None
    assert "from the local cache" in str(again.origin)


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


def test_progress_goes_up_to_the_size(hub, clip, files, published):
    told = []
    pack = load_pack(REPO, clip, progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[-1] == (pack.origin.size, pack.origin.size)


def test_the_cache_serves_when_the_hub_is_gone_and_offline(hub, clip, published, monkeypatch):
    load_pack(REPO, clip)
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


def test_a_pinned_commit_in_the_cache_needs_no_request(hub, clip, published):
    load_pack(REPO, clip)
    hub.requests.clear()
    assert load_pack(f"{REPO}@{published}", clip).origin.unreachable is None
    assert hub.requests == []


def test_a_name_that_nobody_answers_to(hub, clip, published, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://no-such-host.invalid")
    assert "the Hub cannot be reached" in refused(clip)


@pytest.mark.usefixtures("impatient")
def test_a_name_server_that_does_not_answer(hub, clip, published, monkeypatch):
    real = socket.getaddrinfo
    released = threading.Event()

    def hang(host, *args: object, **options: object):
        released.wait(30)
        return real(host, *args, **options)

    close_session()  # connections that are open need no name
    monkeypatch.setattr(socket, "getaddrinfo", hang)
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


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_first_answer(hub, clip, files, published, fault: str):
    options, sentence = FAULTS[fault]
    hub.fail("GET /api/models", **options)
    assert f"{REPO} is not in the local cache, and " in (message := refused(clip))
    assert sentence in message
    hub.faults.clear()
    load_pack(REPO, clip)
    hub.fail("GET /api/models", **options)
    pack = load_pack(REPO, clip)
    assert pack.origin.cached
    assert sentence in pack.origin.unreachable
    assert torch.equal(pack.prompts.tensors["text"], load(files[PROMPTS])["text"])


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_file_leave_the_commit_before(hub, clip, files, published, fault: str):
    load_pack(REPO, clip)
    newer = hub.commit(REPO, changed(files))
    hub.fail(f"resolve/.*/{PROMPTS}", **FAULTS[fault][0])
    for _ in range(2):
        pack = load_pack(REPO, clip)
        assert pack.origin.commit == published
        assert pack.origin.unreachable
        assert torch.equal(pack.prompts.tensors["text"], load(files[PROMPTS])["text"])
    hub.faults.clear()
    assert load_pack(REPO, clip).origin.commit == newer


@pytest.mark.usefixtures("impatient")
def test_a_hub_that_stalls_is_waited_for_once(hub, clip, published):
    load_pack(REPO, clip)
    hub.fail("GET", "stall")
    hub.requests.clear()
    model = load_model(backbone="hf-hub:owner/clip", pack=REPO, device="cpu")
    assert len(hub.requests) == 1
    ours, packs = model.origins
    assert "does not answer" in ours.unreachable
    assert ours.unreachable == packs.unreachable


@pytest.mark.usefixtures("impatient")
def test_a_slow_download_that_goes_on_is_no_fault(hub, clip, files):
    big = {**files, STATISTICS: files[STATISTICS]}
    hub.commit(REPO, big)
    hub.fail(f"GET .*{STATISTICS}", "drip", size=3000, seconds=0.1)  # about 2.5 s in all
    assert len(files[STATISTICS]) > 55_000
    assert load_pack(REPO, clip).origin.unreachable is None


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


def test_a_damaged_cache_is_not_used(hub, clip, files, published):
    load_pack(REPO, clip)
    cache = Path(constants.HF_HUB_CACHE, "models--owner--pack", "snapshots", published)
    told = []
    for content in (b"", files[PROMPTS][:-1] + b"\x00"):
        (cache / PROMPTS).resolve().write_bytes(content)
        pack = load_pack(REPO, clip, progress=lambda *progress: told.append(progress))
        assert not pack.origin.cached
        assert told[-1] == (len(files[PROMPTS]), len(files[PROMPTS]))
        assert torch.equal(pack.prompts.tensors["text"], load(files[PROMPTS])["text"])
    (cache / PROMPTS).resolve().write_bytes(b"bad")
    hub.stop()
    assert "not in the local cache" in refused(clip)


def test_a_partial_cache_is_not_used(hub, clip, published):
    load_pack(REPO, clip)
    cache = Path(constants.HF_HUB_CACHE, "models--owner--pack", "snapshots", published)
    (cache / STATISTICS).unlink()
    hub.stop()
    assert "not in the local cache" in refused(clip)
    assert load_pack(REPO, clip, statistics=False).origin.cached


def header(size: int) -> bytes:
    return size.to_bytes(8, "little")


CONTENTS = {
    "truncated": (PROMPTS, lambda data: data[:-4], "is not a complete safetensors file"),
    "ten-gigabyte-header": (PROMPTS, lambda _: header(10**10) + b"{}", "is not a complete"),
    "ten-gigabyte-tensor": (
        PROMPTS,
        lambda _: (lambda text: header(len(text)) + text)(
            b'{"visual":{"dtype":"F32","shape":[2500000000],"data_offsets":[0,10000000000]}}'
        ),
        "is not a complete",
    ),
    "nan": (
        STATISTICS,
        lambda data: save({k: v * float("nan") for k, v in load(data).items()}),
        "values that are not finite",
    ),
    "link": (CONFIG, lambda _: b"../../../../etc/passwd", "is not valid JSON"),
    "pickle": (PROMPTS, lambda _: b"\x80\x02c__builtin__\neval\n.", "is not a complete"),
    "large-config": (CONFIG, lambda data: data + b" " * 2_000_000, "at most 1 MB"),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_bad_contents(hub, clip, files, case: str):
    name, change, sentence = CONTENTS[case]
    hub.commit(REPO, {**files, name: change(files[name])})
    hub.requests.clear()
    assert sentence in refused(clip)
    if case == "large-config":  # refused before any download
        assert len(hub.requests) == 1


@pytest.mark.parametrize(
    "source",
    [
        "local-dir:../../secret",
        "local-dir:/etc",
        "random:ViT-B-32",
        "../x",
        "nothing",
        "hf-hub:../..",
        "hf-hub:owner/repo/../../x",
        "hf-hub:",
    ],
)
def test_a_pack_from_the_hub_names_no_folder(hub, clip, files, source: str):
    config = json.loads(files[CONFIG])
    config["base_model"]["source"] = source
    hub.commit(REPO, {**files, CONFIG: json.dumps(config).encode()})
    assert "names a backbone that is not on the Hub" in refused(clip)
    with pytest.raises(PackError, match="not on the Hub"):
        load_model(REPO)


def test_gated_private_and_missing_repos(hub, clip, files, monkeypatch):
    hub.commit("owner/gated", files, gated=True)
    hub.commit("owner/secret", files, private=True)
    assert "owner/gated is gated: accept its terms" in refused(clip, "owner/gated")
    assert "has no model repo owner/secret" in refused(clip, "owner/secret")
    assert "has no model repo owner/none" in refused(clip, "owner/none")
    assert "is gated" in refused(clip, "owner/gated", token="hf_other")
    assert load_pack("owner/gated", clip, token="hf_owner").origin.repo == "owner/gated"
    assert load_pack("owner/secret", clip, token="hf_owner").origin.repo == "owner/secret"
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    hub.authorized.clear()
    assert "has no model repo owner/none" in refused(clip, "owner/none")
    assert not any(hub.authorized)
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


@pytest.mark.usefixtures("impatient")
def test_two_at_once_on_a_slow_line(hub, clip, files, published):
    hub.fail(f"GET .*{STATISTICS}", "drip", size=3000, seconds=0.1)  # about 2.5 s in all
    packs = []
    threads = [
        threading.Thread(target=lambda: packs.append(load_pack(REPO, clip))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [pack.origin.unreachable for pack in packs] == [None, None]
    assert torch.equal(*(pack.prompts.tensors["text"] for pack in packs))
    assert sum(STATISTICS in r and r.startswith("GET") for r in hub.requests) == 1


@pytest.mark.usefixtures("impatient")
def test_a_program_that_hangs_while_it_fetches_the_same_file(hub, clip, files, published):
    name = f"{hashlib.sha256(files[PROMPTS]).hexdigest()}.lock"
    lock = Path(constants.HF_HUB_CACHE, ".locks", "models--owner--pack", name)
    lock.parent.mkdir(parents=True)
    with FileLock(lock):
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


def test_another_backbone_is_refused_and_the_right_one_named(hub, clip, published):
    other = replace(clip, name="hf-hub:owner/else", sha256="0" * 64)
    message = refused(other)
    assert f"was made for backbone 'hf-hub:owner/clip@{clip.revision}'" in message
    assert "weights of 'hf-hub:owner/else' are different ones" in message


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
    config = json.loads(files[CONFIG_FILE])
    config["model_cfg"]["text_cfg"]["layers"] = 10**9
    hub.commit("owner/clip", {CONFIG_FILE: json.dumps(config).encode()})
    with pytest.raises(BackboneError, match="which is far larger than they"):
        load_backbone("hf-hub:owner/clip")


def test_openais_named_weights_come_from_the_hub(hub, toy_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-16", toy_config())
    repo = "timm/vit_base_patch16_clip_224.openai"
    weights = (toy_folder / WEIGHTS_FILE).read_bytes()
    commit = hub.commit(repo, {WEIGHTS_FILE: weights, "open_clip_pytorch_model.bin": b"pickle"})
    told = []
    backbone, _ = load_backbone(
        "ViT-B-16", device="cpu", progress=lambda *progress: told.append(progress)
    )
    assert (backbone.source, backbone.revision) == ("ViT-B-16", commit)
    assert backbone.sha256 == hashlib.sha256(weights).hexdigest()
    assert told[-1] == (len(weights), len(weights))
    asked = [request for request in hub.requests if "/resolve/" in request]
    assert {r.partition("/resolve/")[2] for r in asked} == {f"{commit}/{WEIGHTS_FILE}"}
    write_pack(make_pack(backbone), tmp_path / "pack")
    hub.commit(REPO, folder_files(tmp_path / "pack"))
    hub.commit(repo, {WEIGHTS_FILE: b"newer"})
    model = load_model(REPO, device="cpu")
    assert (model.backbone.revision, model.pack.base_model["source"]) == (commit, "ViT-B-16")
    hub.stop()
    again, origin = load_backbone("ViT-B-16", revision=commit, device="cpu")
    assert (again.sha256, origin.cached) == (backbone.sha256, True)


def test_robust_clips_in_open_clips_layout_load_by_name(hub, toy_folder):
    """As `open_clip.push_to_hf_hub` leaves a repo: FARE and TeCoA models are published so."""
    config = json.loads((toy_folder / CONFIG_FILE).read_text())
    config["model_cfg"]["quick_gelu"] = True
    config["preprocess_cfg"] |= {"interpolation": "bicubic", "resize_mode": "shortest"}
    weights = (toy_folder / WEIGHTS_FILE).read_bytes()
    files = {
        CONFIG_FILE: json.dumps(config).encode(),
        WEIGHTS_FILE: weights,
        "README.md": b"---\nlicense: mit\nlibrary_name: open_clip\n---\nFARE CLIP.\n",
        "open_clip_pytorch_model.bin": b"pickle",
        **{name: b"{}" for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")},
        "merges.txt": b"#version: 0.2\n",
    }
    commit = hub.commit("owner/fare2-clip", files)
    backbone, origin = load_backbone("hf-hub:owner/fare2-clip", device="cpu")
    assert (backbone.revision, origin.commit) == (commit, commit)
    assert backbone.sha256 == hashlib.sha256(weights).hexdigest()
    assert isinstance(backbone.visual.transformer.resblocks[0].mlp.gelu, QuickGELU)
    assert backbone.tokenize(["a cat"]).shape == (1, 4)
    fetched = {request.rpartition("/")[2] for request in hub.requests if "/resolve/" in request}
    assert fetched == {CONFIG_FILE, WEIGHTS_FILE}


def test_importing_changes_nothing_of_the_program():
    code = """
import logging, os
from huggingface_hub import constants, get_session
def state():
    own = {k: v for k, v in vars(constants).items() if k.isupper()}
    return dict(os.environ), own, get_session(), get_session().event_hooks, logging.getLogger(
        "huggingface_hub").level, constants.DOWNLOAD_CHUNK_SIZE
before = state()
import tapt.model, tapt.packs.publish, tapt.packs.convert
assert state() == before
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


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


def start(hub: LoopbackHub, home: Path, *command: str, **settings: str) -> subprocess.Popen:
    """A new process with a cache of its own. settings: environment variables."""
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", **settings}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> tuple[str, str]:
    """What a process has said, on both of its channels; it must not have failed."""
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    return out, error


def test_two_processes_at_once(hub, clip, published, tmp_path):
    hub.fail(f"GET .*{STATISTICS}", "drip", size=5000, seconds=0.2)
    code = "import tapt; print(tapt.load('owner/pack').pack.origin)"
    both = [start(hub, tmp_path / "home", "-c", code) for _ in range(2)]
    for process in both:
        assert finish(process)[0].startswith(f"{REPO} at commit {published[:7]} (0.1 MB")


def test_predict_with_a_hub_id_alone(hub, clip, published, tmp_path):
    picture = str(ROOT / "tapt" / "examples" / "cat.png")
    command = ["predict", picture, "--classes", "cat,dog", "--json", "--pack", REPO]
    home = tmp_path / "home"
    predict = partial(start, hub, home, "-m", "tapt", *command)
    out, told = finish(predict())
    assert f"Pack {REPO} at commit {published[:7]}" in told
    assert "Download: 100%" in told
    assert json.loads(out)["settings"]["trained"] is True
    hub.requests.clear()
    offline, told = finish(predict(HF_HUB_OFFLINE="1"))
    assert "from the local cache: offline mode is on (HF_HUB_OFFLINE)" in told
    assert hub.requests == []
    hub.stop()
    gone, told = finish(predict())
    assert "from the local cache: the Hub cannot be reached" in told
    assert json.loads(out)["results"] == json.loads(gone)["results"]
    assert json.loads(out)["results"] == json.loads(offline)["results"]
