"""Entropy, view selection and alignment of token statistics (TAPT, sections 3.2 and 3.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TokenStatistics:
    """Mean and variance of the residual stream at the input of every block, per token.

    mean, var: (blocks, tokens, width).
    """

    mean: Tensor
    var: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> TokenStatistics:
        """The same statistics on another device or in another type."""
        return TokenStatistics(self.mean.to(device, dtype), self.var.to(device, dtype))


@dataclass(frozen=True, eq=False)
class Statistics:
    """What the alignment loss pulls towards: statistics under the adversarially tuned prompts
    and under the clean-tuned prompts."""

    adversarial: TokenStatistics
    clean: TokenStatistics


def entropy(logits: Tensor) -> Tensor:
    """Softmax entropy in nats over the last dimension."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def log_mean_probability(logits: Tensor) -> Tensor:
    """Log of the mean softmax over the views: (..., K, C) -> (..., C)."""
    # without leaving log space: a class with probability 0 has no nan gradient
    return logits.log_softmax(-1).logsumexp(-2) - math.log(logits.shape[-2])


def multi_view_entropy(logits: Tensor) -> Tensor:
    """Entropy of the mean probability over the kept views: (..., K, C) -> (...)."""
    log_mean = log_mean_probability(logits)
    return -(log_mean.exp() * log_mean).sum(-1)


def kept_views_count(views: int, keep: float) -> int:
    """`int(views * keep)`, at least one."""
    return max(1, int(views * keep))


def select_views(entropies: Tensor, keep: float) -> Tensor:
    """Indices of the most confident views, in that order: (..., V) -> (..., K)."""
    count = kept_views_count(entropies.shape[-1], keep)
    return entropies.topk(count, dim=-1, largest=False, sorted=True).indices


def kept_of(values: Tensor, kept: Tensor) -> Tensor:
    """The kept views' share of values (M, V, ...), (M, K, ...). kept: (M, K)."""
    return values[torch.arange(len(kept), device=kept.device)[:, None], kept]


def view_statistics(hidden: Sequence[Tensor], images: int) -> TokenStatistics:
    """Mean and population variance over each image's kept views, (blocks, images, tokens, width).

    hidden: per block its input, (images * K, tokens, width).
    """
    grouped = [states.view(images, -1, *states.shape[1:]) for states in hidden]  # (M, K, T, W)
    mean = torch.stack([g.mean(1) for g in grouped])
    var = torch.stack([g.var(1, unbiased=False) for g in grouped])
    return TokenStatistics(mean, var)


def alignment(observed: TokenStatistics, target: TokenStatistics, blocks: Sequence[int]) -> Tensor:
    """Distance to the target statistics, (blocks, M); the loss sums it over the blocks.

    observed: (blocks, M, tokens, width); target: (all blocks, tokens, width).
    """
    index = list(blocks)
    mean, var = target.mean[index].unsqueeze(1), target.var[index].unsqueeze(1)
    by_mean = (observed.mean - mean).abs().mean((-2, -1))
    by_var = (observed.var - var).abs().mean((-2, -1))
    return 0.5 * by_mean + 0.5 * by_var
