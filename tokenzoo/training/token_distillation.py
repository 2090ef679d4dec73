"""The tokens that are left should be what an unpatched teacher has at their places."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.classes import class_of
from ..adapters.inspect import describe, is_patched
from ..adapters.registry import find_family
from ..core.tokens import Layout, Tokens
from ..ops.attention import full_precision
from ..ops.scan_order import from_scan


def token_distillation(student: Tokens, teacher: Tensor) -> Tensor:
    """Mean squared difference of the student's tokens and the teacher's at their places, over the real patch tokens.

    A kept token is compared with the teacher's at its place; a merged one with the mean of the teacher's tokens that it
    was merged from, by the weights that they merged with (a fused token of EViT by the attention to what it stands
    for, scaled to sum to one; a token that CTS cut anew by the patches it covers). Dropped patches and padding do not
    count, nor do tokens behind closed gates while a method learns, nor class and other prefix tokens. Where all tokens
    are left, or there again, all are compared.

    Args:
        student: normed tokens from `forward_tokens(images, trace=True)`; gradients flow into their values alone, not
            into the weights of the maps.
        teacher: normed patch tokens [B, H * W, C] in raster order, without prefix tokens, detached here.

    Returns:
        Scalar in float32 at least: the mean over channels and over the tokens of all images together; 0 without any.

    Raises:
        ValueError: student and teacher differ in width or in number of patches.

    Source: Rao et al., "DynamicViT", NeurIPS 2021 (its loss on the kept tokens, of weight 0.5 there); for merged tokens
    ours.
    """
    prefix, places = student.layout.num_prefix, student.layout.num_patches
    if teacher.shape[1:] != (places, student.x.shape[2]):
        raise ValueError(
            f"--kd-token-weight compares tokens place by place, but the student has {places} patches of "
            f"{student.x.shape[2]} channels and the teacher {teacher.shape[1]} of {teacher.shape[2]}; give a teacher "
            "of the same width and patch grid, such as --kd-model-name unpatched, or --kd-token-weight 0"
        )
    kind = torch.promote_types(student.x.dtype, torch.float32)
    with torch.no_grad(), full_precision(student.x):
        wanted = F.pad(teacher.to(kind), (0, 0, prefix, 0))
        for step in student.trace or ():
            wanted = step.map.means(wanted)
    apart = (student.x[:, prefix:].to(kind) - wanted[:, prefix:]).square().mean(2)
    if student.valid is None and student.gate is None:
        return apart.sum() / max(1, apart.shape[0] * apart.shape[1])
    real = student.valid if student.valid is not None else torch.ones_like(student.gate.closed)
    if student.gate is not None:
        real = real & ~student.gate.closed
    real = real[:, prefix:].to(kind)
    return (apart * real).sum() / real.sum().clamp(min=1)


def full_layout(model: nn.Module, images: Tensor) -> Layout:
    """The token sequence behind the blocks of an unpatched model for images [B, C, H, W]."""
    view = find_family(model).view(model)
    info = describe(model, tuple(view.grid_of(images.shape[-2:])))
    return view.head_layout(info.sequence(info.depth - 1)[0])


def patch_tokens(features: Tensor, layout: Layout) -> Tensor:
    """Patch tokens [B, H * W, C] in raster order from what an unpatched model's `forward_features` returned."""
    if features.dim() == 4:
        return features.flatten(2).transpose(1, 2)
    return from_scan(features, layout.scan_rows)[:, layout.num_prefix :]


def check_tokens(model: nn.Module, who: str) -> None:
    """Refuses models whose final tokens are not to be had.

    Args:
        model: patched or not.
        who: what it is, for the message.

    Raises:
        ValueError: a class that tokenzoo does not serve, one whose output is no sequence of tokens, patch dropout.
    """
    remedy = f"{type(model).__name__}, the {who}, cannot be used with --kd-token-weight"
    if is_patched(model):
        served = class_of(model)
    else:
        try:
            family = find_family(model)
            family.check(model)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{remedy}: {error}; give another model, or --kd-token-weight 0") from error
        served = family.model_kind(model)
    if not served.gives_tokens:
        raise ValueError(
            f"{remedy}: a neck mixes its tokens behind the last norm, or two branches have tokens of their own; "
            "give another model, or --kd-token-weight 0"
        )
