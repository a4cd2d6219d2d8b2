"""Attacks on a defence as it is deployed, random views and test-time step included.

The attacked model draws fresh views at every pass and runs the whole defence. Its gradient holds
the selection and the tuned prompts constant (BPDA, Athalye et al. 2018) and is an average over
several draws (EOT). A second attack goes through a smooth surrogate of the tuning step; the
stronger of the two counts for each image.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tapt.attacks import AttackConfig, attack_images
from tapt.defense import Defender
from tapt.images import to_float
from tapt.losses import entropy, select_views
from tapt.tuning import TuneConfig, images_per_pass, tune, view_logits
from tapt.views import make_views

DEPLOYED_THREATS = ("square", "adaptive")
RANDOM_DEFENSES = ("ensemble", "tapt")
JUDGING_DRAWS = 8


class Deployed(nn.Module):
    """A whole defence as a model to attack or to ask, in [0, 1] pixels.

    defense: `clip`, `static`, `ensemble` or `tapt`.
    draws: view sets per pass and image.
    smooth: gradients go through a differentiable surrogate of the tuning step; the answers are
        then the surrogate's.
    seed: of the views; every pass draws new ones.
    tick: called often within a pass; may raise to stop.
    """

    def __init__(
        self,
        defender: Defender,
        defense: str,
        *,
        config: TuneConfig | None = None,
        draws: int = 1,
        smooth: bool = False,
        seed: int = 0,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self.model = defender.backbone.model  # torchattacks asks its parameters for the device
        self.defender, self.defense = defender, defense
        self.backbone, self.classes = defender.backbone, len(defender.classes)
        self.config = config or defender.pack.test_time
        self.draws, self.smooth, self.tick = draws, smooth, tick
        self.generator = torch.Generator().manual_seed(seed)
        fixed = defense not in RANDOM_DEFENSES
        self.fixed = defender.classifier(defense) if fixed else None
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities (N, C) of images (N, 3, S, S), averaged over the draws."""
        if self.fixed is not None:
            return self.fixed(images).log_softmax(-1)
        size = images_per_pass(self.backbone, self.config, self.defender.prompted)
        repeated = images.repeat_interleave(self.draws, dim=0)
        parts = [self._answer(self._views(part)) for part in repeated.split(size)]
        return torch.cat(parts).view(len(images), self.draws, -1).mean(1)

    def _views(self, images: Tensor) -> Tensor:
        """(M, V, 3, S, S). BPDA needs gradients to view 0 alone."""
        through = self.defense == "ensemble" or self.smooth
        source = images if through else images.detach()
        views = torch.stack(
            [make_views(image, self.config.views, generator=self.generator) for image in source]
        )
        return views if through else torch.cat([images[:, None], views[:, 1:]], 1)

    def _answer(self, views: Tensor) -> Tensor:
        """One answer per view set, (M, C)."""
        defender, pack = self.defender, self.defender.pack
        if self.defense == "ensemble":
            every = view_logits(
                self.backbone,
                pack.prompts,
                views,
                defender.static_features,
                advance=lambda done: self.tick(),
            )
            kept = select_views(entropy(every), self.config.keep)
            chosen = views[torch.arange(len(views), device=views.device)[:, None], kept]
            logits = defender.classifier("static")(chosen.flatten(0, 1))
            log_p = logits.view(*kept.shape, -1).log_softmax(-1)
            return log_p.logsumexp(1) - math.log(kept.shape[1])
        # the fast attention kernels have no second derivative
        kernel = sdpa_kernel(SDPBackend.MATH) if self.smooth else contextlib.nullcontext()
        with kernel:
            tuned = tune(
                self.backbone,
                pack.prompts,
                views,
                defender.prompted,
                statistics=pack.statistics,
                config=self.config,
                smooth=self.smooth,
                on_progress=lambda done, total: self.tick(),
            )
        return tuned.logits.log_softmax(-1)


def attack_deployed(
    defender: Defender,
    defense: str,
    pixels: Tensor,
    labels: Tensor,
    attack: AttackConfig,
    *,
    config: TuneConfig | None = None,
    draws: int = 4,
    targets: Tensor | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Attacks 8-bit images under one defence as it is deployed.

    TAPT is attacked twice by everything that uses gradients, once with its own step held constant
    and once through the smooth surrogate; the image that the real defence fails more often counts.
    `attack.seed` is also the seed of the views.

    pixels, labels, targets: as for `attack_images`.
    on_progress: called with (passes done, passes), several times within a pass; may raise to stop.
    draws: view sets per gradient, or per query of Square.

    Returns:
        uint8, (N, 3, S, S).
    """
    variants = _variants(defender, defense, attack, config)
    found: list[Tensor] = []
    state = 0, 1

    def report(done: int, total: int) -> None:
        nonlocal state
        state = len(found) * total + done, len(variants) * total
        on_progress(*state)

    def tick() -> None:
        on_progress(*state)

    for smooth in variants:
        model = Deployed(
            defender,
            defense,
            config=config,
            draws=draws,
            smooth=smooth,
            seed=attack.seed,
            tick=tick,
        )
        found.append(
            attack_images(model, pixels, labels, attack, targets=targets, on_progress=report)
        )
    if len(found) == 1:
        return found[0]
    aims, sign = (labels, 1) if targets is None else (targets, -1)
    resistance = torch.stack(
        [
            sign
            * _holding(ask(defender, defense, x, JUDGING_DRAWS, attack.seed, config, tick), aims)
            for x in found
        ]
    )
    weakest = resistance.argmin(0)
    return torch.stack(found)[weakest, torch.arange(len(pixels))]


def _variants(
    defender: Defender, defense: str, attack: AttackConfig, config: TuneConfig | None
) -> tuple[bool, ...]:
    steps = (config or defender.pack.test_time).steps
    tuned = defense == "tapt" and steps > 0 and attack.name != "square"
    return (False, True) if tuned else (False,)


def _holding(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Share of the draws that answer `labels`, and by how much, (N,)."""
    right = (probabilities.argmax(-1) == labels).float().mean(0)
    sure = probabilities.mean(0).gather(1, labels[:, None])[:, 0]
    return right + 1e-3 * sure


@torch.no_grad()
def ask(
    defender: Defender,
    defense: str,
    pixels: Tensor,
    draws: int,
    seed: int,
    config: TuneConfig | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Tensor:
    """Probabilities of `draws` independent answers of a defence, (draws, N, C), for uint8 images.

    The views differ from those of an attack with the same seed.
    """
    model = Deployed(defender, defense, config=config, seed=seed + 1_000_000_007, tick=tick)
    images = to_float(pixels.to(defender.backbone.device), defender.backbone.dtype)
    if model.fixed is not None:
        return model(images).exp().cpu()[None].expand(draws, -1, -1)
    return torch.stack([model(images).exp().cpu() for _ in range(draws)])


def attack_seconds(
    defender: Defender,
    defense: str,
    attack: AttackConfig,
    *,
    config: TuneConfig | None = None,
    draws: int = 4,
) -> float:
    """Estimates how long `attack_deployed` takes for one image, by timing one pass of each kind."""
    backbone = defender.backbone
    image = torch.rand(1, 3, backbone.image_size, backbone.image_size, device="cpu")
    passes = attack.attack.passes(attack, len(defender.classes))
    total = 0.0
    variants = _variants(defender, defense, attack, config)
    if len(variants) > 1:  # each result is judged
        began = time.perf_counter()
        ask(defender, defense, (image * 255).to(torch.uint8), 1, attack.seed, config)
        total += len(variants) * JUDGING_DRAWS * (time.perf_counter() - began)
    for smooth in variants:
        model = Deployed(defender, defense, config=config, draws=draws, smooth=smooth)
        began = time.perf_counter()
        with torch.set_grad_enabled(attack.name != "square"):
            image = image.to(backbone.device).requires_grad_(attack.name != "square")
            log_p = model(image)
            if log_p.requires_grad:
                torch.autograd.grad(log_p[0, 0], image)
        total += passes * (time.perf_counter() - began)
    return total
