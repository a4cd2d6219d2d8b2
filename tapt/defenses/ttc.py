"""TTC (Xing et al., CVPR 2025, arXiv 2503.03613): a counter-attack on the pixels.

It needs no prompts and no views: noise of the size of an attack is pushed away from the image's
own features, and added where features barely react to noise, the mark of an attacked image.

Unlike the published code: float32 throughout (there, float16 without gradient scaling, where a
gradient that underflows has sign 0), underscores in class names are spaces, and the class sentence
is that of vanilla CLIP here ("a photo of a {}.", not "This is a photo of a {}."), so that what
differs between defences is the method.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from pydantic import Field
from pydantic.config import JsonDict
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import softsign

from tapt.core.backbone import Backbone
from tapt.core.clip import PromptedClip
from tapt.core.settings import Settings
from tapt.core.towers import encode_image
from tapt.defenses.base import (
    Defense,
    ImageBatch,
    Prediction,
    PreparedDefense,
    State,
    images_per_pass,
    register,
)
from tapt.progress import Progress, counted, quiet

EPSILON: JsonDict = {"rule": "a number from 0 to 1", "fraction": True}
SHOWN = 64  # pixels; a larger perturbation would swell the JSON


class TtcSettings(Settings):
    """The counter-attack, and when it is used."""

    epsilon: float = Field(
        4 / 255,
        ge=0,
        le=1,
        description="L-inf radius of the answer",
        json_schema_extra=EPSILON | {"option": "ttc-epsilon"},
    )
    step_size: float = Field(
        1 / 255,
        ge=0,
        le=1,
        description="of the steps",
        json_schema_extra=EPSILON | {"option": "ttc-step-size"},
    )
    steps: int = Field(
        2,
        ge=0,
        le=100,
        description="sign steps per image",
        json_schema_extra={"option": "ttc-steps"},
    )
    beta: float = Field(2.0, ge=0, le=100, description="how much later steps weigh more")
    tau_threshold: float = Field(
        0.2, ge=0, le=100, description="features that move more by noise are left to it"
    )


@dataclass(frozen=True, eq=False)
class Counterattack:
    """tau: how far the noise moves the features, as a share of their length, (M,).
    deltas: the noise, and the perturbation after every step, (M, k + 1, 3, S, S).
    weights: of them, (M, k + 1); from the threshold on the noise alone counts.
    delta: their weighted sum, (M, 3, S, S).
    losses: squared distance from the image's features before every step, (M, k).
    gradients: of that distance, k times (M, 3, S, S).
    """

    tau: Tensor
    deltas: Tensor
    weights: Tensor
    delta: Tensor
    losses: Tensor
    gradients: list[Tensor]


def counterattack(
    backbone: Backbone, images: Tensor, noise: Tensor, settings: TtcSettings, *, soft: bool = False
) -> Counterattack:
    """Steps away from the features of every image by itself.

    images: (M, 3, S, S) in [0, 1]. noise: to start from, in [-epsilon, epsilon].
    soft: a differentiable sign, and the graph of everything but the threshold is kept.
    """
    images = images if soft else images.detach()
    # the fast attention kernels have no second derivative
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH) if soft else nullcontext():
        with torch.set_grad_enabled(soft):
            origin, _ = encode_image(backbone, images)
        delta = (images + noise).clamp(0, 1) - images
        deltas, losses, gradients, tau = [delta], [], [], None
        for _ in range(settings.steps):
            moving = delta if delta.requires_grad else delta.requires_grad_()
            distance = (encode_image(backbone, images + moving)[0] - origin).square().sum(-1)
            tau = distance.detach().sqrt() if tau is None else tau
            (gradient,) = torch.autograd.grad(distance.sum(), moving, create_graph=soft)
            delta = moving if soft else moving.detach()
            delta = delta + settings.step_size * _sign(gradient, soft)
            delta = delta.clamp(-settings.epsilon, settings.epsilon)
            delta = (images + delta).clamp(0, 1) - images
            deltas.append(delta)
            losses.append(distance.detach())
            gradients.append(gradient.detach())
    with torch.no_grad():
        if tau is None:
            tau = (encode_image(backbone, images + deltas[0])[0] - origin).norm(dim=-1)
        tau = tau / origin.norm(dim=-1)
        weights = _weights(tau, settings)
    stacked = torch.stack([d if soft else d.detach() for d in deltas], 1)
    total = (weights[..., None, None, None] * stacked).sum(1)
    distances = torch.stack(losses, 1) if losses else tau[:, None][:, :0]
    return Counterattack(tau, stacked, weights, total, distances, gradients)


def _sign(gradient: Tensor, soft: bool) -> Tensor:
    if not soft:
        return gradient.sign()
    scale = gradient.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-30)
    return softsign(gradient / scale)


def _weights(tau: Tensor, settings: TtcSettings) -> Tensor:
    """Of the noise and of every step, (M, k + 1)."""
    order = torch.arange(settings.steps + 1, device=tau.device, dtype=tau.dtype)
    steps, noise = (settings.beta * order).softmax(0), (order == 0).to(tau.dtype)
    return torch.where((tau < settings.tau_threshold)[:, None], steps, noise)


class Ttc(PreparedDefense):
    """Answers to the image plus its counter-perturbation, by vanilla CLIP.

    An attacker's gradients hold the perturbation constant, or in the surrogate pass its steps by a
    soft sign.
    """

    settings: TtcSettings
    uses_prompts = False
    randomised = True
    surrogate = "soft sign"

    def __init__(self, clip: PromptedClip, settings: TtcSettings) -> None:
        super().__init__(clip, settings)
        self.images_per_pass = images_per_pass(clip.backbone, 1)

    def freeze(self, batch: ImageBatch, *, on_progress: Progress = quiet) -> State:
        """The counter-perturbation."""
        return {"delta": self._found(batch, on_progress).delta}

    def frozen_logits(self, batch: ImageBatch, state: State) -> Tensor:
        return self.undefended(batch.images + state["delta"])

    def surrogate_logits(self, batch: ImageBatch) -> Tensor:
        return self.undefended(batch.images + self._found(batch, soft=True).delta)

    @torch.no_grad()
    def predict(self, batch: ImageBatch, *, on_progress: Progress = quiet) -> Prediction:
        found = self._found(batch, on_progress)
        logits = self.undefended(batch.images + found.delta)
        trace: dict[str, Tensor] = {
            "tau": found.tau,
            "weights": found.weights,
            "losses": found.losses,
            "linf": found.delta.abs().amax((1, 2, 3)),
        }
        if batch.images.shape[-1] <= SHOWN:
            trace["perturbation"] = found.delta
        return Prediction(logits.softmax(-1).cpu(), trace)

    def _found(
        self,
        batch: ImageBatch,
        on_progress: Progress = quiet,
        *,
        soft: bool = False,
    ) -> Counterattack:
        advance, noise = counted(on_progress, len(batch)), draw_noise(batch, self.settings.epsilon)
        images = batch.images
        found = counterattack(self.clip.backbone, images, noise, self.settings, soft=soft)
        advance(len(batch))
        return found


def draw_noise(batch: ImageBatch, epsilon: float) -> Tensor:
    """Uniform in [-epsilon, epsilon] for every value, (M, 3, S, S)."""
    shape = batch.images.shape[1:]
    draws = [torch.rand(shape, generator=g, device="cpu") for g in batch.generators("ttc")]
    return ((torch.stack(draws) * 2 - 1) * epsilon).to(batch.images)


register(
    Defense(
        "ttc",
        "TTC",
        "a counter-attack on the pixels, no prompts",
        Ttc,
        TtcSettings,
        by_default=False,
        search={"epsilon": (2 / 255, 4 / 255, 8 / 255), "tau_threshold": (0.1, 0.2, 0.5)},
    )
)
