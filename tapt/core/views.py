"""Random views of preprocessed images, and where their randomness comes from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from zlib import crc32

import torch
from torch import Generator, Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

SCALE = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)


def image_seeds(seed: int, images: Sequence[int]) -> list[int]:
    """One seed for each image number: randomness belongs to (seed, image), never to a batch."""
    return [seed * 1_000_003 + image for image in images]


def generators(seeds: Sequence[int], purpose: str = "") -> list[Generator]:
    """A CPU generator for each image; other purposes get other numbers from the same seeds."""
    shift = crc32(purpose.encode())
    # the low 32 bits are all that a CPU generator takes of a seed
    return [Generator().manual_seed((seed + shift) % 2**32) for seed in seeds]


def make_views(image: Tensor, count: int = 64, *, generator: Generator) -> Tensor:
    """View 0 is the image itself; the rest are random resized crops, flipped half of the time.

    image: (3, S, S) in [0, 1], already preprocessed; gradients pass to (count, 3, S, S) views.
    generator: a CPU generator; one seed gives the same crops on every device.
    """
    return torch.stack([image, *(random_view(image, generator) for _ in range(count - 1))])


def random_view(image: Tensor, generator: Generator, *, min_scale: float = SCALE[0]) -> Tensor:
    """One random resized crop (bilinear, antialiased) with a horizontal flip at p = 0.5.

    min_scale: smallest area of the crop, as a share of the image.
    """
    height, width = image.shape[-2:]
    top, left, h, w = crop_box(height, width, generator, (min_scale, SCALE[1]))
    view = F.resized_crop(
        image, top, left, h, w, [height, width], InterpolationMode.BILINEAR, antialias=True
    ).clamp(0, 1)
    flip = torch.rand((), generator=generator, device="cpu") < 0.5
    return view.flip(-1) if flip else view


def crop_box(
    height: int, width: int, generator: Generator, scale: tuple[float, float] = SCALE
) -> tuple[int, int, int, int]:
    """Top, left, height and width, drawn like torchvision's RandomResizedCrop, which only knows
    the global random state."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator, device="cpu").item()

    for _ in range(10):
        area = height * width * uniform(*scale)
        ratio = math.exp(uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(uniform(0, height - h + 1))
            left = int(uniform(0, width - w + 1))
            return top, left, h, w
    side = min(height, width)  # a square always fits the ratios
    return (height - side) // 2, (width - side) // 2, side, side
