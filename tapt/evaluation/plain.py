"""The test-time step a second time, as the paper's section 3 writes it down, without any saving.

Gradients of every view, class sentences padded to the full context, AdamW by hand: it shares the
towers with `tapt.core` and nothing of its tuning, and so checks it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tapt.core.clip import PromptedClip
from tapt.core.prompts import Prompts, class_texts
from tapt.core.towers import encode_image, encode_text
from tapt.core.tuning import TuneConfig
from tapt.progress import Clock


def plain_tune(
    clip: PromptedClip, views: Tensor, config: TuneConfig
) -> tuple[Tensor, dict[str, float]]:
    """Tuned logits (C,) of views (1, V, 3, S, S), the first of which is the image itself, and
    seconds per phase."""
    backbone, design, statistics = clip.backbone, clip.prompts.config, clip.statistics
    assert statistics is not None
    views, depth = views[0], design.visual_depth
    tokens = class_texts(backbone, clip.classes, design, cut=False).tokens
    tensors = {name: t.clone().requires_grad_() for name, t in clip.prompts.tensors.items()}
    moments = {name: [torch.zeros_like(t), torch.zeros_like(t)] for name, t in tensors.items()}
    current, clock = Prompts(design, tensors), Clock(backbone.device)

    def encode_classes() -> Tensor:
        return normalize(encode_text(backbone, tokens, current.text()), dim=-1)

    def encode(images: Tensor, text: Tensor, hidden: Sequence[int] = ()) -> tuple:
        features, states = encode_image(backbone, images, current.visual(), hidden=hidden)
        return backbone.logit_scale * normalize(features, dim=-1) @ text.T, states

    kept = None
    for step in range(1, config.steps + 1):
        text = encode_classes()
        clock.lap("text")
        logits, states = encode(views, text, range(depth - 1))
        p = logits.softmax(-1)
        if kept is None:
            entropies = -(p * p.log()).sum(-1)
            kept = entropies.argsort()[: max(1, int(len(views) * config.keep))]
        clock.lap("select")
        mean = p[kept].mean(0)
        loss = -(mean * mean.log()).sum()
        sides = (config.alpha, statistics.adversarial), (1 - config.alpha, statistics.clean)
        for block, state in enumerate(states):
            for share, target in sides:
                by_mean = (state[kept].mean(0) - target.mean[block]).abs().mean()
                by_var = (state[kept].var(0, unbiased=False) - target.var[block]).abs().mean()
                loss = loss + config.alignment_weight / depth * share * (by_mean + by_var) / 2
        gradients = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
        for name, gradient in zip(tensors, gradients, strict=True):
            if gradient is not None:
                _adamw(tensors[name].data, gradient, moments[name], step, config)
        clock.lap("gradient")
    with torch.no_grad():
        logits, _ = encode(views[:1], encode_classes())
    clock.lap("predict")
    return logits[0], clock.seconds


def _adamw(
    value: Tensor, gradient: Tensor, moments: list[Tensor], step: int, config: TuneConfig
) -> None:
    (b1, b2), lr = config.betas, config.lr
    moments[0] = b1 * moments[0] + (1 - b1) * gradient
    moments[1] = b2 * moments[1] + (1 - b2) * gradient**2
    first, second = moments[0] / (1 - b1**step), moments[1] / (1 - b2**step)
    value.mul_(1 - lr * config.weight_decay).sub_(lr * first / (second.sqrt() + config.eps))
