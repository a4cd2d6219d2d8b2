"""All training images in memory, and what an epoch and a batch see of them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import open_clip
import torch
import torch.nn.functional as F
from backbone.words import Kind, load_kinds
from PIL import Image
from torch import Tensor

from tapt.core.images import to_uint8
from tapt.data import load_data
from tapt.data.images import Pixels


@dataclass(frozen=True)
class Pool:
    """All images: uint8 (N, 3, S, S); per image its kind, its source, whether it is held out; per
    kind its source."""

    images: Tensor
    labels: Tensor
    sources: Tensor
    held: Tensor
    kinds: list[Kind]
    kind_sources: Tensor

    def epoch(self, seed: int, epoch: int, others: int) -> Tensor:
        """Indices of the epoch's images in their order."""
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        order = torch.randperm(len(self.images), generator=generator)
        order = order[~self.held[order]]
        other = self.sources[order] > 0
        return order[~other | (other.cumsum(0) <= others)]


def load_pool(args: argparse.Namespace, size: int) -> Pool:
    """Reads the data sets; of the first one --validation images are held out, of others half."""
    sets = [load_data(path, "train") for path in args.data]
    kinds, parts, kind_sources = load_kinds(sets, args.words), [], []
    for source, data in enumerate(sets):
        data = data.balanced(args.others) if source else data
        labels = torch.tensor(data.labels) + len(kind_sources)
        held = torch.zeros(len(data), dtype=torch.bool)
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(args.seed))
        held[order[: args.validation // (2 if source else 1)]] = True
        pixels = Pixels(data, lambda i: to_uint8(i.resize((size, size), Image.BICUBIC)))
        images = pixels.batch(range(len(data)))
        parts.append((images, labels, torch.full_like(labels, source), held))
        kind_sources += [source] * len(data.classes)
    joined = [torch.cat(column) for column in zip(*parts, strict=True)]
    return Pool(*joined, kinds, torch.tensor(kind_sources))


def normalize(images: Tensor) -> Tensor:
    """[0, 1] pixels -> what the first convolution expects."""
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    shape = (3, 1, 1)
    return (images - images.new_tensor(mean).view(shape)) / images.new_tensor(std).view(shape)


def augment(images: Tensor, area: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Shifts, crops, flips, relights and in part blurs a batch, (B, 3, S, S) in [0, 1].

    Half of the batch moves by whole pixels and stays sharp; the other half is zoomed.

    Returns:
        The images, and which of them are mirrored.
    """
    n, _, size, _ = images.shape

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(n, generator=generator) * (high - low) + low

    zoomed = uniform(0, 1) < 0.5
    scale = torch.where(zoomed, uniform(area, 1.0).sqrt(), torch.ones(n))
    shift = torch.stack([uniform(-1, 1), uniform(-1, 1)], dim=1)  # (B, 2)
    whole = (shift * 4).round() * 2 / size
    shift = torch.where(zoomed[:, None], shift * (1 - scale + 0.1)[:, None], whole)
    mirrored = uniform(0, 1) < 0.5
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = scale * torch.where(mirrored, -1.0, 1.0), scale
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, list(images.shape), align_corners=False).to(images.device)
    images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    # some are blurred, so that sharpness does not tell the data sets apart
    blurred = (uniform(0, 1) < 0.25) & (size > 32)
    if blurred.any():
        small = F.avg_pool2d(images[blurred], 2)
        images[blurred] = F.interpolate(small, scale_factor=2, mode="bicubic")
    gain, bias = (u.view(-1, 1, 1, 1).to(images) for u in (uniform(0.8, 1.2), uniform(-0.1, 0.1)))
    return (images * gain + bias).clamp(0, 1), mirrored.long()


def at_size(images: Tensor, size: int) -> Tensor:
    """The images made smaller, antialiased."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True).clamp(0, 1)
