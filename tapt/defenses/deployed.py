"""A defence as it is deployed, random views and test-time step included: to ask and to attack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from tapt.core.attacks import Attack, attack_images
from tapt.core.clip import Classifier, PromptedClip
from tapt.core.images import to_float
from tapt.core.views import generators, image_seeds
from tapt.defenses.adaptive import Adaptive, Search, is_adaptive
from tapt.defenses.base import ImageBatch, PreparedDefense
from tapt.progress import Progress, quiet


class Deployed(Classifier):
    """A whole defence as a model to attack or to ask.

    draws: of all that is random, per pass and image.
    generators: of the seeds of each image's draws; every pass takes new ones.
    tick: called often within a pass; may raise to stop.
    """

    def __init__(
        self,
        prepared: PreparedDefense,
        generators: Sequence[Generator],
        *,
        draws: int = 1,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self.model = prepared.clip.backbone.model  # torchattacks asks it for the device
        self.backbone, self.classes = prepared.clip.backbone, len(prepared.clip.classes)
        self.prepared, self.generators = prepared, list(generators)
        self.randomised = prepared.randomised
        self.draws = draws if self.randomised else 1
        self.tick = tick
        self.eval()

    def rows(self, index: Tensor) -> Deployed:
        own = [self.generators[i] for i in index.tolist()]
        return Deployed(self.prepared, own, draws=self.draws, tick=self.tick)

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities (N, C) of images (N, 3, S, S), averaged over the draws."""
        seeds = [
            int(torch.randint(2**62, (), generator=generator, device="cpu"))
            for generator in self.generators
            for _ in range(self.draws)
        ]
        repeated = images.repeat_interleave(self.draws, dim=0)
        size, parts = self.prepared.images_per_pass, []
        for start in range(0, len(repeated), size):
            batch = ImageBatch(repeated[start : start + size], seeds[start : start + size])
            logits = self.prepared.logits(batch, on_progress=lambda done, total: self.tick())
            parts.append(logits.log_softmax(-1))
        return torch.cat(parts).view(len(images), self.draws, -1).mean(1)


def attack_deployed(
    prepared: PreparedDefense,
    pixels: Tensor,
    labels: Tensor,
    attack: Attack,
    *,
    adaptive: Adaptive | None = None,
    images: Sequence[int] | None = None,
    targets: Tensor | None = None,
    on_progress: Progress = quiet,
) -> Tensor:
    """Attacks 8-bit images under one defence as it is deployed: by gradients the adaptive attack,
    by answers alone (Square), or without an epsilon (CW), the attack itself with averages over
    draws.

    pixels, labels, images, targets: as for `attack_images`.
    adaptive: what it may spend.
    on_progress: called with (passes done, passes), several times within a pass.

    Returns:
        uint8, (N, 3, S, S).
    """
    adaptive = adaptive or Adaptive()
    numbers, state = range(len(pixels)) if images is None else images, (0, 1)

    def report(done: int, total: int) -> None:
        nonlocal state
        state = done, total
        on_progress(*state)

    def tick() -> None:
        on_progress(*state)

    options: dict[str, Any] = {"images": numbers, "targets": targets, "on_progress": report}
    if is_adaptive(attack):
        asked = partial(ask, tick=tick)
        return Search(prepared, pixels, labels, attack, adaptive, ask=asked, **options).run()
    draws = generators(image_seeds(attack.seed, numbers), "deployed")
    model = Deployed(prepared, draws, draws=adaptive.draws, tick=tick)
    return attack_images(model, pixels, labels, attack, **options)


def attack_batch(
    clip: PromptedClip,
    attacked: str,
    pixels: Tensor,
    labels: Tensor,
    attack: Attack,
    *,
    prepared: PreparedDefense | None = None,
    adaptive: Adaptive | None = None,
    **options: Any,
) -> Tensor:
    """Attacks 8-bit images (N, 3, S, S) on vanilla CLIP, on the static prompts, or on a defence as
    it is deployed.

    attacked: `clip` or `static`; another name goes with `prepared`, the defence that is attacked
        as deployed, and adaptive: with which budget.
    options: as for `attack_images`.
    """
    if prepared is not None:
        return attack_deployed(prepared, pixels, labels, attack, adaptive=adaptive, **options)
    fixed = {"clip": clip.vanilla, "static": clip.static}[attacked]
    return attack_images(fixed, pixels, labels, attack, **options)


@torch.no_grad()
def ask(
    prepared: PreparedDefense,
    pixels: Tensor,
    seeds: Sequence[int],
    purpose: str,
    draws: int,
    *,
    tick: Callable[[], None] = lambda: None,
) -> Tensor:
    """Probabilities of `draws` independent answers, (draws, N, C), for uint8 images.

    purpose: draws for another purpose (an attack, its judging, the score) are other ones.
    """
    model = Deployed(prepared, generators(seeds, purpose), tick=tick)
    images = to_float(pixels.to(model.backbone.device), model.backbone.dtype)
    return torch.stack([model(images).exp().cpu() for _ in range(draws)])
