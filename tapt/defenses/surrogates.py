"""Differentiable stand-ins that an attacker of a deployed defence uses in its place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tapt.core.clip import PromptedClip
from tapt.core.losses import entropy, kept_of, select_views
from tapt.core.prompts import Prompts
from tapt.core.tuning import Objective, TuneConfig
from tapt.defenses.base import ImageBatch
from tapt.progress import quiet


def smooth_tuning(
    clip: PromptedClip, config: TuneConfig, batch: ImageBatch
) -> tuple[Prompts, Tensor, Tensor]:
    """Plain gradient descent, as long as AdamW's step, its graph kept: the gradient of a first
    AdamW step, a sign, vanishes almost everywhere.

    Returns:
        Prompts of every image, their text features ([M,] C, E), and the kept views (M, K).
    """
    objective = Objective(clip.backbone, clip.prompts, clip.statistics, config)
    every = batch.detached().view_logits(clip, config.views, quiet)
    kept = select_views(entropy(every), config.keep)
    kept_views = kept_of(batch.views(config.views), kept)
    prompts = clip.prompts.batch(len(batch)).map(lambda t: t.detach().requires_grad_())
    # the fast attention kernels have no second derivative
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        for _ in range(config.steps):
            text = clip.texts.features(clip.backbone, prompts)
            losses = objective(prompts, kept_views, text)
            gradients = torch.autograd.grad(
                losses.total.sum(),
                list(prompts.tensors.values()),
                allow_unused=True,
                create_graph=True,
            )
            prompts = descended(prompts, gradients, config.lr, config.weight_decay)
        text = clip.texts.features(clip.backbone, prompts)
    return prompts, text, kept


def descended(
    prompts: Prompts, gradients: Sequence[Tensor | None], lr: float, weight_decay: float
) -> Prompts:
    """Each tensor of each image moves by lr on average, as AdamW's first step does."""

    def step(tensor: Tensor, gradient: Tensor | None) -> Tensor:
        if gradient is None:
            return tensor
        size = gradient.abs().flatten(1).mean(1).clamp(min=1e-30)
        size = size.view(-1, *[1] * (gradient.ndim - 1))
        return tensor * (1 - lr * weight_decay) - lr * gradient / size

    pairs = zip(prompts.tensors.items(), gradients, strict=True)
    return Prompts(prompts.config, {name: step(t, g) for (name, t), g in pairs})
