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


def token_distillation(student: Tokens, teacher: Tensor, cosine: bool = False) -> Tensor:
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
        cosine: add 1 minus the cosine between both, as PH-Reg does (Chen et al., NeurIPS 2025).

    Returns:
        Scalar in float32 at least: the mean over channels and over the tokens of all images together; 0 without any.

    Raises:
        ValueError: student and teacher differ in width or in number of patches.

    Source: Rao et al., "DynamicViT", NeurIPS 2021 (its loss on the kept tokens, of weight 0.5 there); for merged tokens
    ours.
    """
    kind = torch.promote_types(student.x.dtype, torch.float32)
    wanted = _at_places(student, teacher, kind)
    own = student.x[:, student.layout.num_prefix :].to(kind)
    apart = (own - wanted).square().mean(2)
    if cosine:
        apart = apart + cosine_distance(own, wanted)
    return _mean_of_real(apart, student)


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 minus the cosine between tokens [B, M, C] and a teacher's, of every token [B, M]; norms plus 1e-8."""
    lengths = (student.norm(dim=-1) + 1e-8) * (teacher.norm(dim=-1) + 1e-8)
    return 1 - (student * teacher).sum(-1) / lengths


def score_distillation(student: Tokens, teacher: Tensor) -> Tensor:
    """Kullback-Leibler divergence between what student and teacher say of every patch token that is left.

    Tokens find what the teacher says of their places as in `token_distillation`.

    Args:
        student: tokens from `forward_tokens(images, trace=True)` with class scores in place of values [B, N, K].
        teacher: class scores of all patches [B, H * W, K] in raster order, detached here.

    Returns:
        Scalar: the mean over the tokens of all images together; 0 without any.

    Raises:
        ValueError: student and teacher differ in classes or in number of patches.

    Source: Rao et al., "DynamicViT", NeurIPS 2021 (its loss on the kept tokens of LV-ViT, whose second classifier
    scores them); for merged tokens ours.
    """
    kind = torch.promote_types(student.x.dtype, torch.float32)
    wanted = F.log_softmax(_at_places(student, teacher, kind), dim=2)
    said = F.log_softmax(student.x[:, student.layout.num_prefix :].to(kind), dim=2)
    return _mean_of_real(F.kl_div(said, wanted, reduction="none", log_target=True).sum(2), student)


def _at_places(student: Tokens, teacher: Tensor, kind: torch.dtype) -> Tensor:
    """What the teacher has at the places of the student's patch tokens [B, M, C]."""
    prefix, places = student.layout.num_prefix, student.layout.num_patches
    if teacher.shape[1:] != (places, student.x.shape[2]):
        raise ValueError(
            f"--kd-token-weight compares tokens place by place, but the student has {places} patches of "
            f"{student.x.shape[2]} channels and the teacher {teacher.shape[1]} of {teacher.shape[2]}; give a teacher "
            "of the same width and patch grid, such as --kd-model-name unpatched, or --kd-token-weight 0"
        )
    with torch.no_grad(), full_precision(student.x):
        wanted = F.pad(teacher.to(kind), (0, 0, prefix, 0))
        for step in student.trace or ():
            wanted = step.map.means(wanted)
    return wanted[:, prefix:]


def _mean_of_real(apart: Tensor, student: Tokens) -> Tensor:
    """The mean over the patch tokens that are real and open, of all images together; apart [B, M]."""
    if student.valid is None and student.gate is None:
        return apart.sum() / max(1, apart.shape[0] * apart.shape[1])
    real = student.valid if student.valid is not None else torch.ones_like(student.gate.closed)
    if student.gate is not None:
        real = real & ~student.gate.closed
    real = real[:, student.layout.num_prefix :].to(apart.dtype)
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


def layer_tokens(model: nn.Module, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What `forward_features` gives, and the patch tokens [B, H * W, C] behind every block, before the final norm.

    Args:
        model: not patched.
        images: [B, C, H, W].

    Raises:
        ValueError: a model that does not hand out what its blocks give.
    """
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(
            f"{type(model).__name__}, the teacher, has no forward_intermediates, which gives the tokens behind its "
            "blocks; give another model, or set the weight of the method's loss to 0"
        )
    features, layers = model.forward_intermediates(images, norm=False, output_fmt="NLC")
    return features, tuple(layers)


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


def check_scores(model: nn.Module, teacher: nn.Module | None, weight: float) -> None:
    """Refuses to compare scores of tokens where nothing gives any.

    Args:
        model: the student.
        teacher: None for none.
        weight: of the loss.

    Raises:
        ValueError: no weight, or a model without a second classifier.
    """
    for who, each in (("student", model), ("teacher", teacher)):
        if not weight or getattr(each, "aux_head", None) is None:
            raise ValueError(
                f"--kd-token-scores compares what second classifiers say of tokens; {type(each).__name__}, the {who}, "
                "needs an aux_head as LV-ViT has, and --kd-token-weight a weight"
            )
