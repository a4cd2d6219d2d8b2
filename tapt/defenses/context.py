"""Text context tuned for every single image: the step, losses and weights of the TPT family.

Functions on features and logits, one for each formula of the papers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tapt.core.backbone import Backbone
from tapt.core.losses import entropy, multi_view_entropy
from tapt.core.prompts import ClassTexts, PromptConfig, Prompts, init_prompts
from tapt.core.settings import Settings
from tapt.core.tuning import Keep, LearningRate, Steps, Views, WeightDecay
from tapt.defenses.features import similarity
from tapt.defenses.surrogates import descended

CONTEXT = PromptConfig(design="VLI", tokens=4, visual_depth=1, text_depth=1)
Terms = dict[str, Tensor]
"""Loss terms (M,) by name; the step lowers `loss`."""


class ContextSettings(Settings):
    """The step on the context vectors."""

    views: Views = 64
    steps: Steps = 1
    lr: LearningRate = 5e-3
    weight_decay: WeightDecay = 0.01
    augmix: bool = Field(False, description="AugMix on top of the crops, as outside ImageNet")


class TptSettings(ContextSettings):
    """TPT's step, and which views it looks at."""

    keep: Keep = 0.1


class RtptSettings(TptSettings):
    """R-TPT's step, and how its answer is weighted."""

    neighbours: int = Field(20, ge=1, le=1023, description="views that a view is compared with")
    temperature: float = Field(0.01, gt=0, le=100, description="of the views' weights")


class SstptSettings(ContextSettings):
    """SS-TPT's step, and how views are weighted."""

    views: Views = 16
    select: int = Field(3, ge=1, le=1024, description="most confident views, at least 2")
    temperature: float = Field(0.25, gt=0, le=100, description="of the views' weights")
    suitability_weight: float = Field(
        0.4, ge=0, le=1, description="share of the suitability; the stability has the rest"
    )
    consistency_weight: float = Field(1.0, ge=0, le=1e6, description="of the consistency loss")


@dataclass(frozen=True, eq=False)
class Step:
    """terms: losses before the step, (M,) by name.
    gradient: of the context, and the context after the step, (M, 4, width).
    """

    terms: Terms
    gradient: Tensor
    context: Tensor


def start_context(backbone: Backbone, config: PromptConfig = CONTEXT) -> Prompts:
    """The embeddings of the context's words, (1, 4, width)."""
    return Prompts(config, {"text": init_prompts(backbone, config).tensors["text"]})


def tune_context(
    backbone: Backbone,
    texts: ClassTexts,
    features: Tensor,
    loss: Callable[[Tensor], Terms],
    settings: ContextSettings,
    *,
    start: Prompts,
    smooth: bool = False,
) -> tuple[Tensor, list[Step]]:
    """Tunes the context for each image.

    texts: for the design of `start`.
    features: of the kept views, of length 1, (M, K, E).
    loss: of logits (M, K, C).
    start: from `start_context`.
    smooth: plain gradient descent as long as AdamW's step, its graph kept.

    Returns:
        Text features of length 1, (M, C, E), and the steps.
    """
    context = start.batch(len(features)).map(Tensor.requires_grad_)
    tensor, steps = context.tensors["text"], []
    optimizer = torch.optim.AdamW([tensor], lr=settings.lr, weight_decay=settings.weight_decay)
    # the fast attention kernels have no second derivative
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH) if smooth else nullcontext():
        for _ in range(settings.steps):
            text = texts.features(backbone, context)
            terms = loss(similarity(backbone, features, text))
            tensor = context.tensors["text"]
            (gradient,) = torch.autograd.grad(terms["loss"].sum(), tensor, create_graph=smooth)
            if smooth:
                context = descended(context, [gradient], settings.lr, settings.weight_decay)
            else:
                tensor.grad = gradient
                with torch.device("cpu"):  # AdamW makes its counter on the default device
                    optimizer.step()
            after = context.tensors["text"].detach()[:, 0].clone()
            terms = {name: term.detach() for name, term in terms.items()}
            steps.append(Step(terms, gradient.detach()[:, 0], after))
        with torch.set_grad_enabled(smooth):
            return texts.features(backbone, context), steps


def marginal_entropy(logits: Tensor) -> Terms:
    """TPT: entropy of the mean probability over the kept views."""
    return {"loss": multi_view_entropy(logits)}


def pointwise_entropy(logits: Tensor) -> Terms:
    """R-TPT: mean over the kept views of their entropies."""
    return {"loss": entropy(logits).mean(-1)}


def consistent_entropy(logits: Tensor, weights: Tensor, consistency_weight: float) -> Terms:
    """SS-TPT: the mean entropy, and the mean divergence of each kept view from the weighted mean
    of the others, which is held constant.

    weights: of the kept views, (M, K).
    """
    p = logits.softmax(-1).clamp(min=1e-8)  # (M, K, C)
    count = weights.shape[-1]
    others = weights[:, None, :] * (1 - torch.eye(count, device=weights.device))  # (M, K, K)
    reference = (others @ p / others.sum(-1, keepdim=True).clamp(min=1e-8)).detach()
    divergence = torch.special.xlogy(reference, reference) - reference * p.log()
    terms = entropy(logits).mean(-1), divergence.sum(-1).mean(-1)
    return {
        "loss": terms[0] + consistency_weight * terms[1],
        "entropy_loss": terms[0],
        "consistency_loss": terms[1],
    }


def divergence(logits: Tensor, changed: Tensor) -> Tensor:
    """How far the slight change moves each view's answer, (M, V): half of KL(m || p) + KL(m || q).

    The paper and its code call it Jensen-Shannon, which would be KL(p || m) and KL(q || m).
    """
    p, q = logits.softmax(-1), changed.softmax(-1)
    m = (p + q) / 2 + 1e-8
    to_p, to_q = ((m * (m / (x + 1e-8)).log()).sum(-1) for x in (p, q))
    return ((to_p + to_q) / 2).clamp(min=0)


def suitability(features: Tensor) -> Tensor:
    """Inverse mean squared distance of each view to all others, (M, V).

    features: of length 1, (M, V, E).
    """
    others = max(1, features.shape[-2] - 1)
    distances = 2 - 2 * features @ features.mT  # (M, V, V), its diagonal is not exactly 0
    total = distances.sum(-1) - distances.diagonal(dim1=-2, dim2=-1)
    return 1 / (total / others + 1e-8)


def view_weights(suitability: Tensor, stability: Tensor, settings: SstptSettings) -> Tensor:
    """Weights of one set of views, (M, K); both scores are spread over [0, 1] within the set."""

    def spread(x: Tensor) -> Tensor:
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        return (x - low) / (high - low + 1e-8)

    share = settings.suitability_weight
    score = share * spread(suitability) + (1 - share) * spread(stability)
    return (score / settings.temperature).softmax(-1)
