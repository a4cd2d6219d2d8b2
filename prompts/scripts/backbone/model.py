"""The models: their sizes and schedules, the pass of the image tower, and the files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from backbone.kept import as_json
from backbone.words import FIRST, Kind
from safetensors.torch import save
from torch import Tensor, nn

from tapt.files import write_file


@dataclass(frozen=True)
class Stage:
    """A part of the schedule: its share of the steps, image size, share of patches kept."""

    share: float
    size: int
    keep: float


@dataclass(frozen=True)
class Preset:
    """A model: image size, patch, width, blocks, embedding, least area of a crop, schedule."""

    size: int
    patch: int
    width: int
    blocks: int
    embedding: int
    area: float
    epochs: int
    stages: tuple[Stage, ...]

    @property
    def config(self) -> dict:
        """What open_clip reads."""
        vision = {"image_size": self.size, "patch_size": self.patch, "width": self.width}
        vision |= {"layers": self.blocks, "head_width": 64}
        text = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 3}
        mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
        preprocess = {"mean": list(mean), "std": list(std), "interpolation": "bicubic"}
        model = {"embed_dim": self.embedding, "vision_cfg": vision, "text_cfg": text}
        preprocess["resize_mode"] = "shortest"
        return {"model_cfg": model, "preprocess_cfg": preprocess}


PRESETS = {
    "tiny": Preset(32, 4, 192, 6, 128, 0.2, 50, (Stage(0.95, 32, 0.5), Stage(0.05, 32, 1))),
    "small": Preset(
        64, 8, 192, 6, 192, 0.35, 15, (Stage(0.70, 32, 1), Stage(0.22, 48, 1), Stage(0.08, 64, 1))
    ),
}


def plain_attention(query: Tensor, key: Tensor, value: Tensor, mask=None, *_, **__) -> Tensor:
    """Attention in steps: on a processor the fused kernel's backward pass is slower for so few
    tokens (ten percent in float32, five times in bfloat16)."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return (scores if mask is None else scores + mask).softmax(-1) @ value


def encode_image(
    visual: nn.Module, images: Tensor, keep: float = 1.0, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Embeddings (B, E) and mean patch tokens (B, W) of normalised images of any size."""
    x = visual.conv1(images)  # (B, W, grid, grid)
    grid, own = x.shape[-1], visual.grid_size[0]
    positions = visual.positional_embedding[1:].T.unflatten(1, (own, own))[None]
    if grid != own:
        positions = F.interpolate(positions, (grid, grid), mode="bilinear", antialias=True)
    x = (x + positions).flatten(2).transpose(1, 2)  # (B, patches, W)
    if keep < 1:
        order = torch.rand(x.shape[:2], generator=generator).to(x.device)
        kept = order.topk(int(keep * x.shape[1])).indices[..., None]
        x = x.gather(1, kept.expand(-1, -1, x.shape[-1]))
    first = (visual.class_embedding + visual.positional_embedding[0]).to(x.dtype)
    x = torch.cat([first.expand(len(x), 1, -1), x], dim=1)
    x = visual.ln_post(visual.transformer(visual.ln_pre(x)))
    return x[:, 0] @ visual.proj, x[:, 1:].mean(1)


def export(model: nn.Module, preset: Preset, kinds: list[Kind], out: Path) -> None:
    """Config, float16 weights and the names that the model knows, everyday things first."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().half().cpu().contiguous() for k, v in model.state_dict().items()}
    write_file(out / "open_clip_model.safetensors", save(weights))
    write_file(out / "open_clip_config.json", as_json(preset.config))
    ordered = sorted(kinds, key=lambda kind: FIRST.index(kind.name) if kind.name in FIRST else 99)
    names = {kind.name: kind.words[1:] for kind in ordered}
    write_file(out / "names.json", as_json(names))
