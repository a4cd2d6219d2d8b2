"""Shared fixtures: everything offline, a toy CLIP, and the reference CLIP."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # toy models lose time on more threads
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import open_clip
import pytest
import torch
from example_defense import FLIPS
from loopback import LoopbackHub
from PIL import Image
from safetensors.torch import load, save, save_file

from tapt.core.backbone import Backbone
from tapt.core.clip import PromptedClip
from tapt.core.errors import HubError, PackError
from tapt.core.losses import Statistics, TokenStatistics
from tapt.core.prompts import PromptConfig, init_prompts
from tapt.data import LabelledImages
from tapt.defenses import Defense, PreparedDefense, base, find_defense, register
from tapt.model import Model
from tapt.packs.backbones import load_backbone
from tapt.packs.card import write_pack
from tapt.packs.format import PROMPTS, Pack, base_model, load_pack

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-device-for-media-stream",  # a camera
    "--use-fake-ui-for-media-stream",
]
TIMEOUT = 120_000  # ms; only a busy computer needs it
TOY_CLASSES = ["cat", "dog", "sports car"]
REPO = "owner/pack"
TWO_PROCESSES = (
    "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 "
    "--mixed_precision no --dynamo_backend no --main_process_port 0"
)


def python(*arguments: str, folder: Path = ROOT, **environment: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def write_backbone(folder: Path, model_cfg: dict, weights: dict[str, torch.Tensor]) -> Path:
    """An open_clip folder that `local-dir:` loads."""
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {
        "mean": list(open_clip.OPENAI_DATASET_MEAN),
        "std": list(open_clip.OPENAI_DATASET_STD),
    }
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder


def toy_config(**text: object) -> dict:
    return {
        "embed_dim": 32,
        "vision_cfg": {
            "image_size": 32,
            "patch_size": 8,
            "width": 64,
            "layers": 3,
            "head_width": 32,
        },
        "text_cfg": {
            "context_length": 24,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 3,
            **text,
        },
    }


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = open_clip.CLIP(**toy_config())
    weights = {k: v.contiguous() for k, v in model.state_dict().items()}
    return write_backbone(tmp_path_factory.mktemp("toy"), toy_config(), weights)


def local_backbone(folder: Path, dtype: torch.dtype | None = None) -> Backbone:
    return load_backbone(f"local-dir:{folder}", device="cpu", dtype=dtype)[0]


@pytest.fixture(scope="session")
def toy(toy_folder: Path) -> Backbone:
    return local_backbone(toy_folder)


def some_statistics(backbone: Backbone, config: PromptConfig) -> Statistics:
    generator = torch.Generator().manual_seed(4)
    tokens = backbone.image_tokens + config.tokens
    shape = backbone.visual_blocks, tokens, backbone.visual_width

    def draw() -> TokenStatistics:
        mean, var = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)
        return TokenStatistics(mean, var)

    return Statistics(draw(), draw())


def toy_clip(backbone: Backbone, design: str = "VLI", **options: object) -> PromptedClip:
    """Untrained prompts and made-up statistics for the toy's classes."""
    prompts = init_prompts(backbone, PromptConfig(design, 2, 3), seed=1)
    statistics = some_statistics(backbone, prompts.config)
    return PromptedClip(backbone, prompts, statistics, tuple(TOY_CLASSES), **options)


def make_pack(backbone: Backbone, design: str = "VLI", **changes: object) -> Pack:
    """Made-up prompts and statistics; few views."""
    clip, views = toy_clip(backbone, design), {"views": 6, "keep": 0.34}
    test_time = {"tapt": {**views, "lr": 0.02}, "ensemble": views}
    pack = Pack(clip.prompts, clip.statistics, test_time, "toy", base_model(backbone))
    return replace(pack, **changes)


def toy_model(backbone: Backbone, design: str = "VLI", **changes: object) -> Model:
    """The toy with that pack. changes: of the pack."""
    return Model(backbone, make_pack(backbone, design, **changes))


def prepared(clip: PromptedClip, name: str, **settings: object) -> PreparedDefense:
    """A defence with few views, whatever else it has."""
    defense = find_defense(name)
    fields = defense.settings.model_fields
    few = {k: v for k, v in {"views": 8, "keep": 0.25, "lr": 0.02}.items() if k in fields}
    return defense.prepare(clip, defense.settings(**{**few, **settings}))


def random_pixels(count: int, side: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="session")
def clip(toy: Backbone) -> PromptedClip:
    return toy_clip(toy)


@pytest.fixture(scope="session")
def model(toy: Backbone) -> Model:
    return toy_model(toy)


def write_noise(
    folder: Path, seed: int = 0, *, classes: Sequence[str] = TOY_CLASSES, count: int = 2
) -> Path:
    """Class folders with a few pictures each."""
    random = np.random.RandomState(seed)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = random.randint(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def counted(data: LabelledImages) -> tuple[LabelledImages, list[int]]:
    """The same images, and a list of those that were opened."""
    opened: list[int] = []

    def read(i: int) -> Image.Image:
        opened.append(i)
        return data.read(i)

    return LabelledImages(data.classes, data.labels, read, data.content), opened


@pytest.fixture
def flips(monkeypatch: pytest.MonkeyPatch) -> Defense:
    """The example defence, registered."""
    monkeypatch.setattr("tapt.defenses.base._REGISTRY", dict(base._REGISTRY))
    return register(FLIPS)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A Hub on this computer that the client is set to, with an empty cache of its own."""
    loopback = LoopbackHub({"hf_owner": "owner", "hf_other": "other"})
    settings = {
        "ENDPOINT": loopback.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": loopback.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": False,
    }
    for name, value in settings.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield loopback
    loopback.stop()


def folder_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub_clip(hub: LoopbackHub, toy: Backbone, toy_folder: Path) -> Backbone:
    """The toy as `hf-hub:owner/clip`."""
    commit, name = hub.commit("owner/clip", folder_files(toy_folder)), "hf-hub:owner/clip"
    return replace(toy, name=name, source=name, revision=commit)


@pytest.fixture
def files(hub_clip: Backbone, tmp_path: Path) -> dict[str, bytes]:
    """A pack for it."""
    write_pack(make_pack(hub_clip), tmp_path / "pack")
    return folder_files(tmp_path / "pack")


@pytest.fixture
def published(hub: LoopbackHub, files: dict[str, bytes]) -> str:
    """The commit of the pack on the Hub; nobody has asked for it yet."""
    commit = hub.commit(REPO, files)
    hub.requests.clear()
    return commit


def changed(files: dict[str, bytes]) -> dict[str, bytes]:
    """Other prompts for the same backbone."""
    tensors = load(files[PROMPTS])
    return {**files, PROMPTS: save({k: v + 1 for k, v in tensors.items()})}


def refused_pack(clip: Backbone, source: str = REPO, **options: object) -> str:
    """Why a pack is not loaded; the sentence shows no path and no address."""
    with pytest.raises((HubError, PackError)) as error:
        load_pack(source, clip, **options)
    message = str(error.value)
    assert "/cache" not in message
    assert "http" not in message
    return message


def reference_weights(entries: list[dict]) -> dict[str, torch.Tensor]:
    """Regenerates the reference CLIP as tests/reference/README.md says."""
    weights = {}
    for entry in entries:
        if "constant" in entry:
            values = np.full(entry["shape"], entry["constant"])
        else:
            count = int(np.prod(entry["shape"]))
            noise = np.random.RandomState(entry["seed"]).standard_normal(count)
            values = (entry["base"] + entry["scale"] * noise).reshape(entry["shape"])
        weights[entry["name"]] = torch.from_numpy(np.asarray(values, dtype=np.float32))
    return weights


def reference_backbone(folder: Path, spec: dict) -> Backbone:
    """The reference CLIP of a description in tests/reference."""
    arch = spec["arch"]
    config = {
        "embed_dim": arch["embed_dim"],
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": arch["image_size"],
            "patch_size": arch["patch_size"],
            "width": arch["vision_width"],
            "layers": arch["vision_layers"],
            "head_width": 64,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": arch["text_width"],
            "heads": arch["text_width"] // 64,
            "layers": arch["text_layers"],
        },
    }
    return local_backbone(write_backbone(folder, config, reference_weights(spec["weights"])))


@contextmanager
def serving(
    folder: Path, *options: str, program: Sequence[str | Path] = (ROOT / "app.py",), **settings: str
) -> Iterator[str]:
    """The page in a process of its own; yields its address.

    folder: where it works, empty, so that nothing depends on where the command is run.
    settings: environment variables.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {"GRADIO_TEMP_DIR": str(folder / "uploads"), **settings}
    with open(folder / "log.txt", "w+") as log:
        process = subprocess.Popen(
            [sys.executable, *program, "--port", str(port), "--device", "cpu", *options],
            cwd=folder,
            env={**os.environ, **own},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            _wait_for(f"http://127.0.0.1:{port}/", process, folder / "log.txt")
            yield f"http://127.0.0.1:{port}"
            assert "Traceback" not in (folder / "log.txt").read_text()
        finally:
            process.terminate()
            process.wait(20)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page as it starts without options, with its tools for agents."""
    with serving(tmp_path_factory.mktemp("page"), GRADIO_MCP_SERVER="true") as address:
        yield address


def _wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    for _ in range(720):
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            assert process.poll() is None, log.read_text()
            time.sleep(0.25)
    raise AssertionError(f"app.py did not answer within three minutes:\n{log.read_text()}")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.fail(f"The page's tests need a browser: install one of {', '.join(names)}.")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=path, headless=True, args=CHROMIUM_FLAGS
        )
        yield running
        running.close()


@pytest.fixture
def page(server: str, browser: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A fresh page with its first picture loaded; at the end, no script error and no request to
    anywhere else. A parameter holds options of the browser's context."""
    options = {"viewport": {"width": 1280, "height": 800}, **getattr(request, "param", {})}
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(TIMEOUT)
    errors: list[str] = []
    strangers: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda r: None if _is_own(r.url, server) else strangers.append(r.url))
    page.goto(server)
    page.locator("#chips li").first.wait_for(state="attached")
    yield page
    context.close()
    assert (errors, strangers) == ([], [])


def _is_own(url: str, server: str) -> bool:
    return url.startswith((server, "data:", "blob:"))
