"""Shared fixtures: everything offline, a toy CLIP, and the reference CLIP."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # toy models lose time on more threads

import numpy as np
import open_clip
import pytest
import torch
from loopback import LoopbackHub
from safetensors.torch import save_file

from tapt.backbone import Backbone, load_backbone

ROOT = Path(__file__).resolve().parents[1]
TOY_CLASSES = ["cat", "dog", "sports car"]


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


@pytest.fixture(scope="session")
def toy(toy_folder: Path) -> Backbone:
    return load_backbone(f"local-dir:{toy_folder}", device="cpu")


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
