"""What a training run sees: its settings, its share of the data, and the batch of every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, field_validator
from pydantic.config import JsonDict
from torch import Generator, Tensor

from tapt.core.attacks import EPSILON, ONE
from tapt.core.backbone import Backbone
from tapt.core.images import to_float
from tapt.core.settings import Settings
from tapt.core.views import random_view
from tapt.data import LabelledImages, Pixels

RADIUS = "radius and step size of the training attack, PGD"
SHOTS: JsonDict = {"rule": "a whole number from 1 to 1,000,000, or 0 for all"}
MAX_HELD_OUT = 1000  # images that a few-shot run keeps for validation


class TrainConfig(Settings):
    """Settings of a training run; the defaults are the published ones for full-size CLIP."""

    epsilon: float = Field(1 / 255, ge=ONE, le=1, description=RADIUS, json_schema_extra=EPSILON)
    attack_steps: int = Field(2, ge=1, le=1000, description="steps of the training attack")
    clean_share: float = Field(
        0.5, ge=0, le=1, description="unattacked share of a batch; 1 makes clean-tuned prompts"
    )
    shots: int | None = Field(
        16, ge=1, le=1_000_000, description="training images per class", json_schema_extra=SHOTS
    )
    epochs: int = Field(100, ge=1, le=100_000, description="passes over the training images")
    batch_size: int = Field(32, ge=1, le=100_000, description="images per step, of all processes")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="optimiser of the prompts")
    lr: float = Field(0.0035, ge=0, le=10, description="learning rate, on a cosine to 0")
    min_crop: float = Field(0.08, ge=0.01, le=1, description="smallest area of the random crops")
    validation: float = Field(
        0.1, ge=0, le=0.5, description="share held out to pick the best epoch"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the steps; validation is float32 in any case"
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="of all that is random")

    @field_validator("shots", mode="before")
    @classmethod
    def _all(cls, shots: object) -> object:
        return None if shots == 0 else shots


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Images to train on and images held out, with their labels, (N,)."""

    classes: tuple[str, ...]
    images: Pixels
    labels: Tensor
    held_out: Pixels
    held_out_labels: Tensor


def split_data(data: LabelledImages, backbone: Backbone, config: TrainConfig) -> TrainingData:
    """Splits off the validation share and takes `shots` images per class, all by the seed."""
    count = round(len(data) * config.validation)
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(data), generator=generator, device="cpu").tolist()
    held_out, rest = data.subset(order[:count]), data.subset(order[count:])
    if config.shots is not None:
        wanted = config.shots * len(data.classes)
        rest = rest.balanced(wanted, config.seed)
        held_out = held_out.balanced(min(4 * wanted, MAX_HELD_OUT), config.seed)
    return TrainingData(
        data.classes,
        Pixels(rest, backbone.preprocess),
        torch.tensor(rest.labels, device="cpu"),
        Pixels(held_out, backbone.preprocess),
        torch.tensor(held_out.labels, device="cpu"),
    )


@dataclass(frozen=True, eq=False)
class Batch:
    """A process's part of a step's batch.

    images: augmented, (B, 3, S, S) in [0, 1].
    labels: (B,).
    attacked: which images are attacked, (B,).
    start: of the attack, (B, 3, S, S) in [-1, 1] times epsilon.
    joint: images in the batch of all processes.
    """

    images: Tensor
    labels: Tensor
    attacked: Tensor
    start: Tensor
    joint: int


def draw_batch(
    data: TrainingData, config: TrainConfig, size: int, step: int, process: int, processes: int
) -> Batch:
    """One process's part of a step's batch; the parts of all processes make up the batch that one
    process alone would draw. Every draw depends on (seed, step) alone.

    size: of the images' sides.
    """
    epoch, position = divmod(step, steps_per_epoch(data, config))
    seed = config.seed * 1_000_003
    shuffle = Generator().manual_seed(seed + epoch)
    order = torch.randperm(len(data.images), generator=shuffle, device="cpu")
    index = order[position * config.batch_size :][: config.batch_size]
    draws = Generator().manual_seed(seed + 7_919 * (step + 1))
    blank = torch.zeros(1, size, size, device="cpu")  # another's image only moves the generator
    views = []
    for place, image in enumerate(index.tolist()):
        own = place % processes == process
        pixels = to_float(data.images[image]) if own else blank
        view = random_view(pixels, draws, min_scale=config.min_crop)
        views += [view] if own else []
    images = torch.stack(views) if views else torch.empty(0, 3, size, size, device="cpu")
    start = torch.rand((len(index), 3, size, size), generator=draws, device="cpu") * 2 - 1
    attacked = torch.arange(len(index), device="cpu") >= round(len(index) * config.clean_share)
    own_part = slice(process, None, processes)
    labels = data.labels[index][own_part]
    return Batch(images, labels, attacked[own_part], start[own_part], len(index))


def steps_per_epoch(data: TrainingData, config: TrainConfig) -> int:
    """Whole batches in the training images, at least one."""
    return max(1, len(data.images) // config.batch_size)
