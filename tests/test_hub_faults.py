"""Everything that can go wrong between the Hub and the cache."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from conftest import REPO, changed, refused_pack
from filelock import FileLock
from huggingface_hub import close_session, constants
from safetensors.torch import load

import tapt.packs.client
from tapt.core.errors import HubError
from tapt.model import load as load_model
from tapt.packs.format import PROMPTS, STATISTICS, hub_packs, load_pack


@contextmanager
def impatient() -> Iterator[None]:
    """A stall is 0.8 s instead of 8, at the same rate."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tapt.packs.client, "PATIENCE", 0.8)
        patch.setattr(tapt.packs.client, "PROGRESS", 8_000)
        yield


def test_the_cache_serves_when_the_hub_is_gone_and_offline(hub, hub_clip, published, monkeypatch):
    load_model(REPO, device="cpu")
    hub.stop()
    gone = load_pack(REPO, hub_clip)
    assert gone.origin.cached
    assert gone.origin.unreachable == "the Hub cannot be reached"
    assert "local cache, and the Hub cannot be reached." in refused_pack(hub_clip, "owner/none")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.start()
    hub.requests.clear()
    assert "offline mode" in load_pack(REPO, hub_clip).origin.unreachable
    assert "offline mode" in refused_pack(hub_clip, "owner/none")
    assert load_model(REPO, device="cpu").backbone.sha256 == hub_clip.sha256
    with pytest.raises(HubError, match="Offline mode is on"):
        hub_packs(hub_clip)
    assert hub.requests == []


def test_a_name_server_that_does_not_answer(hub, hub_clip, published, monkeypatch):
    real = socket.getaddrinfo
    released = threading.Event()

    def hang(host, *args: object, **options: object):
        released.wait(30)
        return real(host, *args, **options)

    close_session()  # connections that are open need no name
    monkeypatch.setattr(socket, "getaddrinfo", hang)
    with impatient():
        assert "the Hub does not answer" in refused_pack(hub_clip)
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
def test_faults_of_the_first_answer(hub, hub_clip, files, published, fault: str):
    options, sentence = FAULTS[fault]
    hub.fail("GET /api/models", **options)
    with impatient():
        message = refused_pack(hub_clip)
    assert message.startswith(f"{REPO} is not in the local cache, and ")
    assert sentence in message
    hub.faults.clear()
    load_pack(REPO, hub_clip)
    hub.fail("GET /api/models", **options)
    with impatient():
        pack = load_pack(REPO, hub_clip)
    assert pack.origin.cached
    assert sentence in pack.origin.unreachable
    assert torch.equal(pack.prompts.tensors["text"], load(files[PROMPTS])["text"])


@pytest.mark.parametrize("fault", ["stall", "drip", "503", "login-page"])
def test_faults_of_a_file_leave_the_commit_before(hub, hub_clip, files, published, fault: str):
    load_pack(REPO, hub_clip)
    newer = hub.commit(REPO, changed(files))
    hub.fail(f"resolve/.*/{PROMPTS}", **FAULTS[fault][0])
    with impatient():
        pack = load_pack(REPO, hub_clip)
    assert pack.origin.commit == published
    assert FAULTS[fault][1] in pack.origin.unreachable
    assert torch.equal(pack.prompts.tensors["text"], load(files[PROMPTS])["text"])
    hub.faults.clear()
    assert load_pack(REPO, hub_clip).origin.commit == newer


def test_a_hub_that_stalls_is_waited_for_once(hub, hub_clip, published):
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
def test_a_broken_download_goes_on_where_it_was(hub, hub_clip, files, published, kind: str):
    hub.fail(f"GET .*{STATISTICS}", kind, times=1, size=20_000)
    assert load_pack(REPO, hub_clip).origin.unreachable is None
    assert sum(f"GET /{REPO}/resolve/{published}/{STATISTICS}" in r for r in hub.requests) == 2


def test_a_damaged_file_is_fetched_once_more_and_never_kept(hub, hub_clip, files, published):
    hub.fail(f"GET .*{PROMPTS}", "flip", times=1)
    pack = load_pack(REPO, hub_clip)
    assert torch.equal(pack.prompts.tensors["text"], load(files[PROMPTS])["text"])
    hub.commit(REPO, changed(files))
    hub.fail(f"GET .*{PROMPTS}", "flip")
    assert f"{PROMPTS} of {REPO} arrives damaged" in refused_pack(hub_clip)
    blobs = Path(constants.HF_HUB_CACHE, "models--owner--pack", "blobs")
    for blob in blobs.iterdir():
        if len(blob.name) == 64:
            assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name
    hub.faults.clear()
    assert load_pack(REPO, hub_clip).origin.unreachable is None


def test_a_damaged_or_partial_cache_is_not_used(hub, hub_clip, files, published):
    load_pack(REPO, hub_clip)
    cache = Path(constants.HF_HUB_CACHE, "models--owner--pack", "snapshots", published)
    told = []
    for content in (b"", files[PROMPTS][:-1] + b"\x00"):
        (cache / PROMPTS).resolve().write_bytes(content)
        pack = load_pack(REPO, hub_clip, progress=lambda *progress: told.append(progress))
        assert not pack.origin.cached
        assert told[-1] == (pack.origin.size, pack.origin.size)
        assert torch.equal(pack.prompts.tensors["text"], load(files[PROMPTS])["text"])
    (cache / STATISTICS).unlink()
    hub.stop()
    assert "not in the local cache" in refused_pack(hub_clip)
    assert load_pack(REPO, hub_clip, statistics=False).origin.cached
    (cache / PROMPTS).resolve().write_bytes(b"bad")
    assert "not in the local cache" in refused_pack(hub_clip, statistics=False)


def test_no_room_on_the_disk(hub, hub_clip, published, monkeypatch):
    import resource

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, old[1]))
    try:
        message = refused_pack(hub_clip)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "there is no room on the disk" in message
    assert load_pack(REPO, hub_clip).origin.unreachable is None


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


def test_a_read_only_cache(hub, hub_clip, files, published, monkeypatch):
    with TemporaryDirectory() as cache:  # pytest's own folders are closed to others
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", cache)
        load_pack(REPO, hub_clip)
        hub.commit("owner/other", files)
        with read_only(Path(cache)):
            assert load_pack(REPO, hub_clip).origin.unreachable is None
            why = refused_pack(hub_clip, "owner/other")
            assert "cache folder cannot be written (set HF_HOME" in why
        assert load_pack("owner/other", hub_clip).origin.unreachable is None


def test_two_at_once_on_a_slow_line(hub, hub_clip, files, published):
    hub.fail(f"GET .*{STATISTICS}", "drip", size=3000, seconds=0.1)  # about 2.5 s in all
    packs = []
    threads = [
        threading.Thread(target=lambda: packs.append(load_pack(REPO, hub_clip))) for _ in range(2)
    ]
    with impatient():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [pack.origin.unreachable for pack in packs] == [None, None]
    assert torch.equal(*(pack.prompts.tensors["text"] for pack in packs))
    assert sum(STATISTICS in r and r.startswith("GET") for r in hub.requests) == 1


def test_a_program_that_hangs_while_it_fetches_the_same_file(hub, hub_clip, files, published):
    name = f"{hashlib.sha256(files[PROMPTS]).hexdigest()}.lock"
    lock = Path(constants.HF_HUB_CACHE, ".locks", "models--owner--pack", name)
    lock.parent.mkdir(parents=True)
    with FileLock(lock), impatient():
        assert "does not answer" in refused_pack(hub_clip)
    assert load_pack(REPO, hub_clip).origin.unreachable is None
