"""Multiply-adds of a dense model for one crop, encoder and decoder apart, and its speed round robin."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...adapters.inspect import is_patched
from ...adapters.wrappers import backbone_of
from ...cost.report import report
from ...cost.trace import count_macs
from ...dense.features import encode
from ...ops.layer_macs import conv_macs, linear_shapes
from ..runs import Candidate, Precision, is_served
from ..timing import clock_for, interleave, warm_up


class DenseMacs(NamedTuple):
    """Multiply-adds of one crop.

    Attributes:
        encoder: up to the final norm, reduction and reconstruction included.
        decoder: everything behind it.
        tokens_out: tokens that leave the encoder, prefix included, padding not; a mean where it depends on the image.
        attn_impl: "fused" or "unfused"; "none" for models that scan.
    """

    encoder: float
    decoder: float
    tokens_out: float
    attn_impl: str


class _Encoder(nn.Module):
    """A backbone on its way to a dense head, tied to one image: tracing brings random ones of its own."""

    def __init__(self, backbone: nn.Module, image: Tensor) -> None:
        super().__init__()
        self.backbone = backbone
        self.image = image

    def forward(self, images: Tensor) -> Tensor:
        return encode(self.backbone, self.image).x


def dense_macs(model: nn.Module, crops: Tensor, traced: int = 4) -> DenseMacs | None:
    """Multiply-adds of a dense model, by formula; traced on real crops where they depend on the image.

    Args:
        model: with the property `tokenzoo_backbone`, patched or not.
        crops: normalised [n, 3, h, w]; their size is what counts, unless the recipe depends on the image.
        traced: crops at most that are traced then, and averaged over.

    Returns:
        None for a model without a served backbone.
    """
    backbone = backbone_of(model)
    if backbone is model or not is_served(backbone):
        return None
    patch, size = backbone.patch_embed.patch_size, tuple(crops.shape[-2:])
    size = tuple(-(-n // p) * p for n, p in zip(size, patch))  # dense models pad to whole patches
    grid = tuple(backbone.patch_embed.dynamic_feat_size(size))
    costs, prefix = report(backbone, size), backbone.num_prefix_tokens
    encoder = float(costs.total - costs.rows[-1].macs)  # without the classifier, which a dense model does not run
    tokens = float(costs.tokens_out)
    if costs.data_dependent:
        padded = nn.functional.pad(crops[:traced], (0, size[1] - crops.shape[3], 0, size[0] - crops.shape[2]))
        counts = []
        with torch.no_grad():
            for image in padded.split(1):
                encoded = encode(backbone, image)
                counts.append(encoded.x.shape[1] if encoded.valid is None else int(encoded.valid.sum()))
        encoder = sum(_traced(backbone, image) for image in padded.split(1)) / len(padded)
        tokens = sum(counts) / len(counts)
    restores = is_patched(model) and backbone.tokenzoo_recipe.restores_maps
    prefix += backbone.tokenzoo_recipe.protect if restores else 0
    seen = round(tokens) - prefix if restores else grid[0] * grid[1]
    if hasattr(model, "head_macs"):
        decoder = model.head_macs(seen, grid)
    else:
        decoder = _layers_macs(model, backbone, crops[:1])
    return DenseMacs(encoder, float(decoder), tokens, costs.attn_impl)


def _traced(backbone: nn.Module, image: Tensor) -> float:
    return float(count_macs(_Encoder(backbone, image), tuple(image.shape[1:])).total)


def _layers_macs(model: nn.Module, backbone: nn.Module, crop: Tensor) -> int:
    """Multiply-adds of the linear and convolutional layers outside the backbone, from the shapes that really occur."""
    total = 0

    def count(module: nn.Module, args: Any, out: Tensor) -> None:
        nonlocal total
        if module in linear:
            total += linear[module] * (out.numel() // out.shape[-1])
        else:
            seen = args[0] if isinstance(module, nn.ConvTranspose2d) else out
            total += conv_macs(module) * seen[:, 0].numel()

    inside = set(backbone.modules())
    linear = {layer: inputs * outputs for layer, inputs, outputs in linear_shapes(model)}
    layers = [*linear, *(m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)))]
    hooks = [layer.register_forward_hook(count) for layer in layers if layer not in inside]
    try:
        with torch.no_grad():
            model(crop)
    finally:
        for hook in hooks:
            hook.remove()
    return total


class DenseSpeed(NamedTuple):
    """Times of one run on the same crops as all others.

    Attributes:
        step_times: seconds of one batch, a value a round.
        speedups: unpatched time over this run's time, within each round.
        batch_size: crops per step.
        clock: what times are.
    """

    step_times: list[float]
    speedups: list[float]
    batch_size: int
    clock: str


def dense_speed(
    candidates: Sequence[Candidate], crops: Tensor, rounds: int, precision: Precision, warmup: int = 2
) -> list[DenseSpeed]:
    """Times whole models, decoder and upsampling included, round robin: A B C A B C ...

    Args:
        candidates: the unpatched model first.
        crops: normalised [b, 3, h, w]; halved when memory runs out.
        rounds: how often each one is timed.
        precision: number formats.
        warmup: steps of each before that.

    Raises:
        ValueError: not even one crop fits into memory.
    """
    clock, name = clock_for(crops.device)
    with torch.inference_mode(), precision.autocast(crops.device):
        calls = [c.model for c in candidates]
        crops = warm_up(list(candidates), calls, crops, warmup)
        times = interleave([partial(call, crops) for call in calls], rounds, clock)
    return [DenseSpeed(row, [a / b for a, b in zip(times[0], row)], len(crops), name) for row in times]
