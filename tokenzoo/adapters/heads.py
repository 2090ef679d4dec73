"""Multiply-adds of what stands around the blocks, read off models that name their parts as timm does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.tokens import Layout
from ..ops.layer_macs import conv_macs, is_conv, linear_macs, unwrapped


def embed_macs(embed: nn.Module, grid: tuple[int, int]) -> int:
    """Multiply-adds of a patch embedding, convolutional stems included, from the shapes that really occur."""
    total = 0
    if hasattr(embed, "macs"):  # embeddings of tokenzoo.models know their cost
        return embed.macs(grid)
    if is_conv(embed):
        return conv_macs(embed) * grid[0] * grid[1]
    patch = embed.patch_size if isinstance(embed.patch_size, tuple) else (embed.patch_size,) * 2
    if is_conv(unwrapped(getattr(embed, "proj", None))) and not hasattr(embed, "backbone"):
        return conv_macs(embed.proj) * grid[0] * grid[1]

    def count(module: nn.Module, args: Any, out: Tensor) -> None:
        nonlocal total
        positions = out[0, 0].numel() if isinstance(module, nn.Conv2d) else out[0].numel() // out.shape[-1]
        total += module.weight.numel() * positions

    layers = [m for m in embed.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    weight = layers[0].weight
    size = embed.img_size if embed.img_size is not None else tuple(g * p for g, p in zip(grid, patch))
    training = embed.training
    try:
        embed.eval()
        with torch.no_grad():
            embed(torch.zeros(1, layers[0].weight.shape[1], *size, device=weight.device, dtype=weight.dtype))
    finally:
        embed.train(training)
        for hook in hooks:
            hook.remove()
    return total


def head_macs(model: nn.Module, n: int, layout: Layout) -> int:
    """Multiply-adds of pooling and classifier.

    Args:
        model: a model with classifiers `head` and `head_dist`, `global_pool` and perhaps `attn_pool`.
        n: tokens that reach them.
        layout: says how many of these are prefix.
    """
    heads = [m for name in ("head", "head_dist") if (m := getattr(model, name, None)) is not None]
    fixed, pool = sum(linear_macs(m) for m in heads), getattr(model, "attn_pool", None)
    if pool is None:
        # without pooling the head sees every token
        return fixed * n if getattr(model, "global_pool", None) == "" else fixed
    if not getattr(model, "pool_include_prefix", True):
        n -= layout.own_prefix
    if not hasattr(pool, "latent"):
        return fixed + 2 * pool.num_heads * pool.head_dim * n * n
    width = pool.num_heads * pool.head_dim
    once = linear_macs(pool.q) + linear_macs(pool.proj) + (linear_macs(pool.mlp) if pool.mlp is not None else 0)
    return fixed + pool.latent_len * once + 2 * width * (width + pool.latent_len) * n
