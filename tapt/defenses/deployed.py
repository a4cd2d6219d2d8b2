"""Attacks on a defence as it is deployed, random views and test-time step included.

The attacked model draws anew at every pass and runs the whole defence. Its gradient holds what
has none constant (BPDA, Athalye et al. 2018) and is an average over several draws (EOT). Further
attacks go through the defence's differentiable surrogates; the strongest counts for each image.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from tapt.core.attacks import Attack, attack_images
from tapt.core.clip import Classifier
from tapt.core.images import to_float
from tapt.core.tuning import Progress
from tapt.core.views import generators, image_seeds
from tapt.defenses.base import ImageBatch, PreparedDefense

JUDGING_DRAWS = 8


class Deployed(Classifier):
    """A whole defence as a model to attack or to ask.

    draws: of all that is random, per pass and image.
    generators: of the seeds of each image's draws; every pass takes new ones.
    surrogate: the answers are then the surrogate's.
    tick: called often within a pass; may raise to stop.
    """

    def __init__(
        self,
        prepared: PreparedDefense,
        generators: Sequence[Generator],
        *,
        draws: int = 1,
        surrogate: str | None = None,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self.model = prepared.clip.backbone.model  # torchattacks asks it for the device
        self.backbone, self.classes = prepared.clip.backbone, len(prepared.clip.classes)
        self.prepared, self.generators = prepared, list(generators)
        self.randomised = prepared.randomised
        self.draws = draws if self.randomised else 1
        self.surrogate, self.tick = surrogate, tick
        self.eval()

    def rows(self, index: Tensor) -> Deployed:
        return Deployed(
            self.prepared,
            [self.generators[i] for i in index.tolist()],
            draws=self.draws,
            surrogate=self.surrogate,
            tick=self.tick,
        )

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
            logits = self.prepared.logits(
                batch, surrogate=self.surrogate, on_progress=lambda done, total: self.tick()
            )
            parts.append(logits.log_softmax(-1))
        return torch.cat(parts).view(len(images), self.draws, -1).mean(1)


def attack_deployed(
    prepared: PreparedDefense,
    pixels: Tensor,
    labels: Tensor,
    attack: Attack,
    *,
    draws: int = 4,
    images: Sequence[int] | None = None,
    targets: Tensor | None = None,
    on_progress: Progress = lambda done, total: None,
) -> Tensor:
    """Attacks 8-bit images under one defence as it is deployed.

    Where the attack uses gradients and the defence has surrogates, it runs once through each; the
    image that the real defence fails more often counts.

    pixels, labels, images, targets: as for `attack_images`.
    draws: per gradient, or per query.
    on_progress: called with (passes done, passes), several times within a pass.

    Returns:
        uint8, (N, 3, S, S).
    """
    surrogates = variants(prepared, attack)
    numbers = range(len(pixels)) if images is None else images
    seeds = image_seeds(attack.seed, numbers)
    found: list[Tensor] = []
    state = 0, 1

    def report(done: int, total: int) -> None:
        nonlocal state
        state = len(found) * total + done, len(surrogates) * total
        on_progress(*state)

    def tick() -> None:
        on_progress(*state)

    for surrogate in surrogates:
        model = Deployed(
            prepared,
            generators(seeds, "deployed"),
            draws=draws,
            surrogate=surrogate,
            tick=tick,
        )
        attacked = attack_images(
            model, pixels, labels, attack, images=numbers, targets=targets, on_progress=report
        )
        found.append(attacked)
    if len(found) == 1:
        return found[0]
    aims, sign = (labels, 1) if targets is None else (targets, -1)
    resistance = [
        sign * _resistance(ask(prepared, x, seeds, "judging", JUDGING_DRAWS, tick=tick), aims)
        for x in found
    ]
    return torch.stack(found)[torch.stack(resistance).argmin(0), torch.arange(len(pixels))]


def variants(prepared: PreparedDefense, attack: Attack) -> tuple[str | None, ...]:
    """The defence itself, and the surrogates that an attack by gradients also tries."""
    return (None, *prepared.surrogates) if attack.method.gradients else (None,)


def _resistance(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Share of the draws that answer `labels`, and by how much, (N,)."""
    right = (probabilities.argmax(-1) == labels).float().mean(0)
    sure = probabilities.mean(0).gather(1, labels[:, None])[:, 0]
    return right + 1e-3 * sure


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


def attack_seconds(prepared: PreparedDefense, attack: Attack, *, draws: int = 4) -> float:
    """Estimates how long `attack_deployed` takes for one image, by timing one pass of each kind."""
    backbone = prepared.clip.backbone
    image = torch.full((1, 3, backbone.image_size, backbone.image_size), 0.5, device="cpu")
    passes = attack.method.passes(attack.budget_steps, len(prepared.clip.classes))
    surrogates, total = variants(prepared, attack), 0.0
    if len(surrogates) > 1:  # each result is judged
        began = time.perf_counter()
        ask(prepared, (image * 255).to(torch.uint8), [0], "judging", 1)
        total += len(surrogates) * JUDGING_DRAWS * (time.perf_counter() - began)
    for surrogate in surrogates:
        model = Deployed(
            prepared,
            generators([0]),
            draws=draws,
            surrogate=surrogate,
        )
        began = time.perf_counter()
        with torch.set_grad_enabled(attack.method.gradients):
            probe = image.to(backbone.device).requires_grad_(attack.method.gradients)
            log_p = model(probe)
            if log_p.requires_grad:
                torch.autograd.grad(log_p[0, 0], probe)
        total += passes * (time.perf_counter() - began)
    return total
