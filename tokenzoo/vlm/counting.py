"""Rows, multiply-adds and cache bytes of a prompt in a vision-language model, by formula, without running it.

One multiply-add counts once. Counted are linear layers and both products of causal attention, half of all pairs and the
diagonal, and what deciding costs; norms, activations, softmax and sorting are not. Layers of the language model alone
make the share of `prefill=`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from ..ops.layer_macs import linear_macs
from .base import Selector
from .budget import spread
from .family import VLMFamily
from .layer import LayerPlan


class LmRow(NamedTuple):
    """One layer of the language model, while a prompt is read.

    Attributes:
        name: of the layer.
        methods: names of the droppers in front of it.
        rows_in: rows that reach it.
        rows_out: rows that leave it, and that its part of the cache holds.
        macs: multiply-adds, those of deciding included.
        cache_bytes: of its keys and values.
        attention: implementation that runs.
    """

    name: str
    methods: str
    rows_in: int
    rows_out: int
    macs: int
    cache_bytes: int
    attention: str


def image_sizes(family: VLMFamily, inner: nn.Module, images: Sequence[int] | int | None) -> list[int]:
    """Rows of the images of a prompt that is counted.

    Args:
        family: that serves the model.
        inner: the multimodal model.
        images: rows of each image, or of one; None for one image at the tower's own size.

    Raises:
        ValueError: the tower has no size of its own, or a count is not positive.
    """
    if images is None:
        own = family.image_rows(inner)
        if own is None:
            raise ValueError(
                f"images of {type(inner).__name__} have any number of rows; give images=[...], the rows of each (as "
                "many as placeholders)"
            )
        return [own]
    sizes = [images] if isinstance(images, int) else list(images)
    if not sizes or any(type(n) is not int or n < 1 for n in sizes):
        raise ValueError(f"images={images!r}; give the number of rows of each image")
    return sizes


def kept_rows(selector: Selector | None, images: Sequence[int]) -> list[int]:
    """Rows of each image that the language model sees.

    Args:
        selector: with its budget.
        images: rows of each image of a prompt.
    """
    if selector is None:
        return list(images)
    if selector.keep_total is not None:
        return spread(selector.keep_total, images)
    return [selector.count(n) for n in images]


def lm_rows(family: VLMFamily, inner: nn.Module, plans: Sequence[LayerPlan], visual: int, text: int) -> list[LmRow]:
    """The layers of the language model.

    Args:
        family: that serves the model.
        inner: the multimodal model.
        plans: what the layers do.
        visual: visual rows that enter.
        text: all other rows.
    """
    lm = family.language_model(inner)
    config, rows, n = lm.config, [], visual
    weight = next(lm.parameters())
    for layer, plan in zip(lm.layers, plans):
        attn = layer.self_attn
        width = config.num_attention_heads * attn.head_dim
        before, macs = n, 0
        for stage in plan.stages:
            macs += stage.dropper.macs(n, text, config.hidden_size, width, stage.number)
            n = min(n, stage.dropper.count(visual, stage.number))
        total = n + text
        macs += linear_macs(layer) * total + width * total * (total + 1)
        held = 2 * config.num_key_value_heads * attn.head_dim * total * weight.element_size()
        methods = ", ".join(stage.dropper.name for stage in plan.stages)
        path = config._attn_implementation or "eager"
        rows.append(LmRow(plan.name, methods, before + text, total, macs, held, path))
    return rows
