"""Register tokens for a ViT of timm that was trained without any, and their removal."""

from __future__ import annotations

from typing import TypeVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..classes import path_of
from ..inspect import is_patched

M = TypeVar("M", bound=nn.Module)


def add_registers(model: M, n: int, generator: torch.Generator | None = None) -> M:
    """Gives a ViT n register tokens behind its class token, in place; all other weights stay as they are.

    The model is then what `timm.create_model(name, reg_tokens=n)` makes, with the same names of weights, and registers
    are prefix tokens for every method. They start as normal numbers over the root of the width, and have no position:
    a position embedding with rows for prefix tokens gets rows of zeros. A new register has an effect at once, since a
    softmax gives every key a share; with registers hidden as keys (`attn_mask`), class and patch tokens are what they
    were. So a model should be trained with its registers, see docs/training.md. Make optimizers afterwards.

    Args:
        model: timm's `VisionTransformer`, not patched, without registers.
        n: registers to add.
        generator: for their first values, on the CPU; None for torch's own.

    Returns:
        The same model.

    Raises:
        TypeError: another class of models.
        ValueError: a model that is patched or has registers, settings under which registers would count elsewhere than
            in attention, or a number below 1.

    Source: Darcet, Oquab, Mairal, Bojanowski, "Vision Transformers Need Registers", ICLR 2024; added to a trained
    model: Chen, Yan, Zhou, Dai, Luo, "Vision Transformers with Self-Distilled Registers", NeurIPS 2025.
    """
    if type(n) is not int or n < 1:
        raise ValueError(f"n={n!r} registers; give a whole number from 1 on")
    _check(model)
    if model.num_reg_tokens or model.reg_token is not None:
        raise ValueError(
            f"{type(model).__name__} has {model.num_reg_tokens} register tokens already; add none, or take them off "
            "with tokenzoo.remove_registers first"
        )
    position, width = model.pos_embed, model.embed_dim
    first = torch.randn(1, n, width, generator=generator) * width**-0.5
    registers = nn.Parameter(first.to(position.device, position.dtype))
    if not model.no_embed_class:
        prefix = model.num_prefix_tokens
        nothing = position.new_zeros(1, n, width)
        _set_positions(model, torch.cat([position[:, :prefix], nothing, position[:, prefix:]], dim=1))
    model.reg_token = registers
    _count(model, n)
    return model


def remove_registers(model: M) -> M:
    """Takes all register tokens of a ViT off, in place; the other weights stay, bit for bit.

    Behind `add_registers` without training, this gives the model as it was.

    Args:
        model: timm's `VisionTransformer`, not patched, with registers.

    Returns:
        The same model.

    Raises:
        TypeError: another class of models.
        ValueError: a model that is patched or has no registers.
    """
    _check(model)
    n = model.num_reg_tokens
    if not n:
        raise ValueError(f"{type(model).__name__} has no register tokens; there is nothing to take off")
    if not model.no_embed_class:
        end = model.num_prefix_tokens  # registers stand last in the prefix
        _set_positions(model, torch.cat([model.pos_embed[:, : end - n], model.pos_embed[:, end:]], dim=1))
    model.reg_token = None
    _count(model, -n)
    return model


def _set_positions(model: nn.Module, value: Tensor) -> None:
    model.pos_embed = nn.Parameter(value.detach().clone(), requires_grad=model.pos_embed.requires_grad)


def _count(model: nn.Module, more: int) -> None:
    model.num_reg_tokens += more
    model.num_prefix_tokens += more


def _check(model: nn.Module) -> None:
    """Refuses models to which a register would be something else than one more key and value."""
    name = type(model).__name__
    if is_patched(model):
        raise ValueError(f"{name} is patched; call tokenzoo.unpatch_model first, and patch again with its registers")
    if type(model) is not VisionTransformer:
        raise TypeError(
            f"{path_of(type(model))} cannot be given register tokens, or lose them; only timm's VisionTransformer "
            "itself is known (ViT, DeiT without distillation token, DeiT-3, CLIP, SigLIP, DINOv2); give the backbone "
            "inside, or a model that was trained with registers"
        )
    if not isinstance(model.pos_embed, nn.Parameter):
        raise ValueError(f"{name} has no position embedding, and such models of timm put no prefix tokens in front")
    if model.pool_include_prefix:
        raise ValueError(f"{name}.pool_include_prefix: its head pools prefix tokens too, so registers would be pooled")
    if not isinstance(model.patch_drop, nn.Identity):
        raise ValueError(
            f"{name}.patch_drop counts prefix tokens by itself; set model.patch_drop = torch.nn.Identity() first"
        )
