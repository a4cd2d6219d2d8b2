"""Attacks by torchattacks on any of our classifiers, in [0, 1] pixels and float32.

The attacked image is rounded to 8 bits and held to epsilon in integers, so that a PNG keeps the
attack and its L-inf is exact.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torchattacks
from torch import Tensor, nn

from tapt.backbone import Backbone
from tapt.errors import InputError
from tapt.images import to_float
from tapt.prompts import Prompts, image_logits
from tapt.towers import encode_image

# torchattacks draws from the global random state, which threads share
_RANDOM_STATE = threading.Lock()


@dataclass(frozen=True)
class AttackConfig:
    """name: a row of `ATTACKS`.
    epsilon: L-inf radius in [0, 1]; whole multiples of 1/255 are used exactly, others are
        rounded down to one, since the attacked image is 8-bit.
    steps: iterations.
    step_size: in [0, 1]; None is 2.5 * epsilon / steps.
    random_start: start at a random point of the ball.
    seed: of the random start.
    """

    name: str = "pgd"
    epsilon: float = 4 / 255
    steps: int = 10
    step_size: float | None = None
    random_start: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in ATTACKS:
            raise InputError(f"attack must be one of {', '.join(ATTACKS)}, got {self.name!r}.")
        _check("epsilon", self.epsilon, 1 / 255, 1.0, "from 1/255 to 1")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int):
            raise InputError(f"steps must be a whole number, got {self.steps!r}.")
        _check("steps", self.steps, 1, 10_000, "from 1 to 10000")
        if self.step_size is not None:
            _check("step_size", self.step_size, 1e-6, 1.0, "above 0 and at most 1")

    @property
    def epsilon_255(self) -> int:
        """Epsilon in whole 1/255 steps."""
        return int(self.epsilon * 255 + 1e-6)

    @property
    def step(self) -> float:
        """Step size in [0, 1]."""
        return self.step_size or 2.5 * self.epsilon_255 / 255 / self.steps

    def to_dict(self) -> dict:
        return {**asdict(self), "step_size": self.step}


def _check(name: str, value: float, low: float, high: float, rule: str) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low - 1e-9 <= value <= high:
        raise InputError(f"{name} must be a number {rule}, got {value!r}.")


def _pgd(model: nn.Module, config: AttackConfig) -> torchattacks.attack.Attack:
    return torchattacks.PGD(
        model,
        eps=config.epsilon_255 / 255,
        alpha=config.step,
        steps=config.steps,
        random_start=config.random_start,
    )


ATTACKS: dict[str, Callable[[nn.Module, AttackConfig], torchattacks.attack.Attack]] = {
    "pgd": _pgd,
}


class Classifier(nn.Module):
    """CLIP as an image classifier with fixed text features and fixed visual prompts."""

    def __init__(
        self, backbone: Backbone, text_features: Tensor, prompts: Prompts | None = None
    ) -> None:
        super().__init__()
        self.model = backbone.model  # torchattacks asks its parameters for the device
        self.backbone = backbone
        self.text_features = text_features.detach()
        self.visual = None if prompts is None else prompts.visual().detach()
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, C) of images in [0, 1], (N, 3, S, S)."""
        features, _ = encode_image(self.backbone, images, self.visual)
        return image_logits(self.backbone, features, self.text_features)


class _Watched(nn.Module):
    """Reports every forward pass of an attack; the callback may raise to stop it."""

    def __init__(self, classifier: Classifier, on_pass: Callable[[int], None]) -> None:
        super().__init__()
        self.classifier, self.on_pass, self.passes = classifier, on_pass, 0
        self.eval()  # torchattacks switches a model back to the mode that it finds here

    def forward(self, images: Tensor) -> Tensor:
        self.on_pass(self.passes)
        self.passes += 1
        return self.classifier(images)


def attack_images(
    classifier: Classifier,
    pixels: Tensor,
    labels: Tensor,
    config: AttackConfig,
    *,
    targets: Tensor | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Attacks 8-bit images.

    pixels: uint8, (N, 3, S, S).
    labels: the classes to move away from, (N,).
    targets: the classes to move towards instead, (N,).
    on_progress: called with (steps done, steps) before every step; may raise to stop.

    Returns:
        uint8, (N, 3, S, S), with L-inf <= `config.epsilon_255` in integers.
    """
    if classifier.backbone.dtype != torch.float32:
        raise InputError("Attacks run in float32: load the backbone with dtype=torch.float32.")
    device = classifier.backbone.device
    images = to_float(pixels.to(device))
    devices = [device.index or 0] if device.type == "cuda" else []
    watched = _Watched(classifier, lambda done: on_progress(min(done, config.steps), config.steps))
    with _RANDOM_STATE, torch.random.fork_rng(devices=devices), torch.enable_grad():
        torch.manual_seed(config.seed)
        attack = ATTACKS[config.name](watched, config)
        if targets is not None:
            attack.set_mode_targeted_by_label(quiet=True)
        aims = labels if targets is None else targets
        attacked = attack(images, aims.to(device))
    on_progress(config.steps, config.steps)
    return _to_8_bit(attacked, pixels.to(device), config.epsilon_255).to(pixels.device)


def _to_8_bit(attacked: Tensor, pixels: Tensor, epsilon_255: int) -> Tensor:
    # rounded, not floored: floor weakens the attack and can leave the ball
    delta = (attacked.detach() * 255).round().int() - pixels.int()
    clipped = pixels.int() + delta.clamp(-epsilon_255, epsilon_255)
    return clipped.clamp(0, 255).to(torch.uint8)


def linf_255(attacked: Tensor, pixels: Tensor) -> Tensor:
    """Largest pixel change of each image in 1/255, (N,), from uint8 images (N, 3, S, S)."""
    return (attacked.int() - pixels.int()).abs().flatten(1).amax(1)
