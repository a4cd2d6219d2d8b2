"""Image features of length 1, and what defences make of those of several views."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tapt.core.backbone import Backbone
from tapt.core.towers import encode_image
from tapt.core.tuning import views_per_pass
from tapt.defenses.base import ImageBatch

CHUNK = 16


def encode_unit(
    backbone: Backbone,
    views: Tensor,
    prompts: Tensor | None = None,
    *,
    advance: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Features of length 1, (M, V, E), of views (M, V, 3, S, S), in passes of bounded memory.

    prompts: visual prompts of each image, (M, D, n, width).
    """
    parts = []
    images = [(views.flatten(0, 1), None)] if prompts is None else zip(views, prompts, strict=True)
    for every, own in images:
        for part in every.split(views_per_pass(backbone)):
            parts.append(normalize(encode_image(backbone, part, own)[0], dim=-1))
            advance(len(part))
    return torch.cat(parts).view(*views.shape[:2], -1)


def view_features(
    batch: ImageBatch,
    backbone: Backbone,
    views: Tensor,
    *,
    kind: str = "",
    advance: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Features of length 1, (M, V, E), of the batch's first V views, without prompts; made once
    for all that ask, also for those that ask for fewer of them.

    kind: of the views, where they are not the batch's plain ones.
    """
    parts = []
    for start in range(0, views.shape[1], CHUNK):
        part = views[:, start : start + CHUNK]
        key = "features", kind, backbone, start, part.shape[1], torch.is_grad_enabled()
        parts.append(batch.shared(key, partial(encode_unit, backbone, part, advance=advance)))
    return torch.cat(parts, dim=1)


def similarity(backbone: Backbone, features: Tensor, text_features: Tensor) -> Tensor:
    """Logits (M, V, C) of features (M, V, E) and texts ([M,] C, E), both of length 1."""
    return backbone.logit_scale * features @ text_features.mT


def weighted(weights: Tensor, values: Tensor) -> Tensor:
    """Sum over the views of weights (M, V) times values (M, V, C), (M, C)."""
    return (weights[..., None] * values).sum(-2)


def reliability(features: Tensor, neighbours: int) -> Tensor:
    """Mean cosine of every view with its nearest other views, (M, V).

    features: of length 1, (M, V, E).
    neighbours: how many of them; where there are fewer, all others. A single view has 0.
    """
    count = features.shape[-2]
    itself = torch.eye(count, dtype=torch.bool, device=features.device)
    cosines = (features @ features.mT).masked_fill(itself, -torch.inf)
    nearest = cosines.topk(min(neighbours, count - 1)).values
    return nearest.sum(-1) / max(1, nearest.shape[-1])
