"""CLIP's two towers with prompts as an argument (V, VLI and VLJ, MaPLe-style deep prompts).

Both functions run open_clip's own blocks and give what `encode_image` and `encode_text` give when
there are no prompts. Nothing is stored on the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tapt.core.backbone import Backbone

SHORT = 100  # tokens


def encode_image(
    backbone: Backbone,
    images: Tensor,
    prompts: Tensor | None = None,
    *,
    hidden: Sequence[int] = (),
) -> tuple[Tensor, list[Tensor]]:
    """Image features under visual prompts.

    images: (N, 3, S, S) in [0, 1].
    prompts: (D, n, width) for all images, or (G, D, n, width) where N is a multiple of G and
        each run of N / G images has prompts of its own. The n tokens stand behind the patch
        tokens; block d < D sees its own set, later blocks see what block D - 1 made of them.
    hidden: blocks whose input (hidden states, prompt tokens in place) is returned too.

    Returns:
        Features before L2 normalisation, (N, E), and one (N, tokens, width) tensor per block of
        `hidden`.
    """
    visual = backbone.visual
    x = visual._embeds(backbone.normalize(images))  # (N, 1 + patches, width)
    depth, count = (0, 0) if prompts is None else prompts.shape[-3:-1]
    states = []
    for index, block in enumerate(visual.transformer.resblocks):
        if prompts is not None and index < depth:
            tokens = _per_item(prompts[..., index, :, :], len(x))  # (N, n, width)
            if index == 0:
                # LayerNorm acts per token: normalised here as if concatenated before ln_pre
                x = torch.cat([x, visual.ln_pre(tokens)], dim=1)
            else:
                x = torch.cat([x[:, :-count], tokens], dim=1)
        if index in hidden:
            states.append(x)
        x = _run_block(visual.transformer, block, x)
    if count:
        x = x[:, :-count]
    pooled, _ = visual._pool(x)
    return pooled if visual.proj is None else pooled @ visual.proj, states


def encode_text(backbone: Backbone, tokens: Tensor, prompts: Tensor | None = None) -> Tensor:
    """Text features under text prompts.

    tokens: (C, L) ids from `Backbone.tokenize`.
    prompts: (D, n, width), or (G, D, n, width) for G sets at once. They take positions 1..n.

    Returns:
        Features before L2 normalisation: (C, E), or (G, C, E) for G sets.
    """
    from open_clip.transformer import text_global_pool

    text, groups = backbone.text, torch.Size() if prompts is None else prompts.shape[:-3]
    shape = *groups, len(tokens), -1
    tokens = tokens.repeat(groups.numel(), 1)
    x, mask = _embed_text(text, tokens)  # (C, L, width)
    depth, count = (0, 0) if prompts is None else prompts.shape[-3:-1]
    for index, block in enumerate(text.transformer.resblocks):
        if prompts is not None and index < depth:
            context = _per_item(prompts[..., index, :, :], len(x))  # (C, n, width)
            if index == 0:
                context = context + text.positional_embedding[1 : 1 + count].to(x.dtype)
            x = torch.cat([x[:, :1], context, x[:, 1 + count :]], dim=1)
        x = _run_block(text.transformer, block, x, mask)
    if getattr(text, "cls_emb", None) is not None:  # CoCa: the last token, normalised after
        pooled = text.ln_final(text_global_pool(x, pool_type="last"))
    else:
        pool_type = getattr(text, "pool_type", None) or text.text_pool_type
        eos = getattr(text, "eos_id", getattr(text, "text_eos_id", None))
        pooled = text_global_pool(text.ln_final(x), tokens, pool_type, eos_token_id=eos)
    if (project := text.text_projection) is not None:
        pooled = project(pooled) if isinstance(project, nn.Linear) else pooled @ project
    return pooled.view(shape)


def _embed_text(text: Any, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    if hasattr(text, "_embeds"):  # TextTransformer: CoCa's class token and padding masks
        x, mask = text._embeds(tokens)
    else:
        dtype = text.transformer.get_cast_dtype()
        x = text.token_embedding(tokens).to(dtype)
        x = x + text.positional_embedding[: tokens.shape[1]].to(dtype)
        mask = text.attn_mask
    length = x.shape[1]
    return x, None if mask is None else mask[..., :length, :length]


def _run_block(transformer: Any, block: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    plain = type(block).__name__ == "ResidualAttentionBlock" and transformer.batch_first
    if _backward_is_slow(x) and plain:
        x = x + block.ls_1(_attention(block.attn, block.ln_1(x), mask))
        return x + block.ls_2(block.mlp(block.ln_2(x)))
    if transformer.batch_first:
        return block(x, attn_mask=mask)
    return block(x.transpose(0, 1), attn_mask=mask).transpose(0, 1)


def _backward_is_slow(x: Tensor) -> bool:
    """Whether the fused attention kernel's backward pass loses to attention in steps: on
    processors, in bfloat16 by a factor of 2 to 6, in float32 for short sequences by up to 2."""
    if x.device.type != "cpu" or not (x.requires_grad and torch.is_grad_enabled()):
        return False
    half = x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    return half or x.shape[1] <= SHORT


def _attention(layer: nn.MultiheadAttention, x: Tensor, mask: Tensor | None) -> Tensor:
    heads = (3, layer.num_heads, layer.head_dim)
    projected = F.linear(x, layer.in_proj_weight, layer.in_proj_bias)  # (N, tokens, 3 * width)
    query, key, value = projected.unflatten(-1, heads).permute(2, 0, 3, 1, 4)
    scores = query * layer.head_dim**-0.5 @ key.mT  # (N, heads, tokens, tokens)
    if mask is not None:  # (tokens, tokens), or CoCa's (N * heads, tokens, tokens)
        scores = scores + (mask if mask.ndim == 2 else mask.unflatten(0, (-1, layer.num_heads)))
    return layer.out_proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(-2))


def _per_item(tokens: Tensor, items: int) -> Tensor:
    """(n, width) or (G, n, width) -> (items, n, width), each group repeated for its run."""
    if tokens.ndim == 2:
        return tokens.expand(items, -1, -1)
    return tokens.repeat_interleave(items // len(tokens), dim=0)
