"""Random changes of views: SS-TPT's slight one, and the AugMix chain of the TPT family."""

from __future__ import annotations

import math

import torch
from PIL import Image, ImageOps
from torch import Generator, Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import adjust_hue  # that of v2 has no gradient
from torchvision.transforms.v2 import functional as F

from tapt.core.images import to_float, to_picture, to_uint8

BILINEAR = InterpolationMode.BILINEAR
OPERATIONS = (
    "autocontrast",
    "equalize",
    "posterize",
    "rotate",
    "solarize",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)


def straight_through(values: Tensor, like: Tensor) -> Tensor:
    """`values`, with the gradient of `like`, whatever made them of it."""
    return like + (values - like).detach()


def slight_change(views: Tensor, generator: Generator) -> Tensor:
    """SS-TPT's change, one draw for all views of an image, (V, 3, S, S) in [0, 1].

    Always an affine map, black outside; each at p = 0.5: colour jitter, blur, noise. Gradients
    pass.
    """

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator, device="cpu").item()

    size, coin = views.shape[-1], 0.5
    angle, scale = uniform(-5, 5), uniform(0.92, 1.08)
    shift = [round(uniform(-0.04, 0.04) * size) for _ in range(2)]
    changed = F.affine(views, angle, shift, scale, [0.0, 0.0], BILINEAR)
    if uniform(0, 1) < coin:
        factors = [uniform(0.92, 1.08) for _ in range(3)] + [uniform(-0.02, 0.02)]
        jitter = F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, adjust_hue
        for index in torch.randperm(4, generator=generator, device="cpu").tolist():
            changed = jitter[index](changed, factors[index])
    if uniform(0, 1) < coin:
        changed = F.gaussian_blur(changed, [5, 5], [uniform(0.5, 1.2)] * 2)
    if uniform(0, 1) < coin:
        sigma = uniform(0, 0.02)
        noise = torch.randn(views.shape, generator=generator, device="cpu")
        changed = (changed + sigma * noise.to(views)).clamp(0, 1)
    return changed


def augmix(view: Tensor, generator: Generator) -> Tensor:
    """AugMix at severity 1 as the TPT family uses it, (3, S, S) in [0, 1].

    Three chains of 1 to 3 operations are averaged and mixed with the view. torchvision's AugMix
    differs: at severity 1 it never turns, shears or shifts (its lowest magnitudes are 0), its
    result is cut to 8 bits, and it draws from the global random state. To gradients the chain is
    the identity.
    """

    def uniform(low: float = 0, high: float = 1) -> float:
        return low + (high - low) * torch.rand((), generator=generator, device="cpu").item()

    picture = to_picture((view.detach() * 255).round().to(torch.uint8))
    shares = [-math.log(1 - uniform()) for _ in range(3)]  # Dirichlet(1, 1, 1)
    share = uniform()  # Beta(1, 1)
    average = torch.zeros_like(view)
    for part in shares:
        chained = picture
        for _ in range(1 + int(uniform(0, 3))):
            sign = 1 if uniform() < 0.5 else -1
            name = OPERATIONS[int(uniform(0, len(OPERATIONS)))]
            chained = operation(chained, name, uniform(0.1, 1), sign)
        average += part / sum(shares) * to_float(to_uint8(chained), view.dtype).to(view.device)
    return straight_through(share * view.detach() + (1 - share) * average, view)


def operation(image: Image.Image, name: str, level: float, sign: int) -> Image.Image:
    """One AugMix operation.

    level: of 10. sign: to which side.
    """
    shift = sign * int(level * image.width / 30)
    shear = sign * level * 0.03
    maps = {
        "shear_x": (1, shear, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, shear, 1, 0),
        "translate_x": (1, 0, shift, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, shift),
    }
    if name in maps:
        kind, how = Image.Transform.AFFINE, Image.Resampling.BILINEAR
        return image.transform(image.size, kind, maps[name], resample=how)
    if name == "rotate":
        return image.rotate(sign * int(level * 3), resample=Image.Resampling.BILINEAR)
    if name == "posterize":
        return ImageOps.posterize(image, 4 - int(level * 0.4))
    if name == "solarize":
        return ImageOps.solarize(image, 256 - int(level * 25.6))
    return ImageOps.equalize(image) if name == "equalize" else ImageOps.autocontrast(image)
