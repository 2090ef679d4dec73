"""Builds segmentation models from timm names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import timm
from torch import nn

from .heads import HEADS
from .segmenter import Segmenter


def create_segmenter(
    encoder: str | nn.Module,
    num_classes: int,
    head: str = "linear",
    encoder_kwargs: Mapping[str, Any] | None = None,
    head_kwargs: Mapping[str, Any] | None = None,
    classes: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    img_size: int | Sequence[int] | None = None,
    pretrained: bool = False,
    window: int | None = None,
    stride: int | None = None,
) -> Segmenter:
    """A timm ViT, or another model of one token sequence, with a segmentation head.

    Args:
        encoder: timm's name of a ViT-like model (Vim and PlainMamba too), or such a model.
        num_classes: K.
        head: "linear", "bn_linear" or "mask" (mask transformer).
        encoder_kwargs: passed to `timm.create_model`.
        head_kwargs: passed to the head.
        classes: names of the classes.
        mean: normalisation of RGB channels in 0..1; None for the encoder's own.
        std: the same.
        img_size: (height, width) or one side that position embeddings are made for; other sizes are resampled.
        pretrained: load the encoder's weights by timm.
        window: side of window inference; None for whole images.
        stride: of window inference.

    Raises:
        ValueError: an unknown head or encoder, or one that is not a plain ViT.
    """
    if head not in HEADS:
        raise ValueError(f"head={head!r} is unknown; use one of {', '.join(HEADS)}")
    if type(num_classes) is not int or num_classes < 1:
        raise ValueError(f"num_classes={num_classes!r}; give the number of classes, at least 1")
    given = None
    if isinstance(encoder, str):
        kwargs = {"num_classes": 0, "dynamic_img_size": True, **(encoder_kwargs or {})}
        if img_size is not None:
            kwargs["img_size"] = img_size
        if isinstance(kwargs.get("img_size"), list):
            kwargs["img_size"] = tuple(kwargs["img_size"])
        name, (encoder, kwargs) = encoder, _create_encoder(encoder, pretrained, kwargs)
        given = {"name": name, "kwargs": {k: list(v) if isinstance(v, tuple) else v for k, v in kwargs.items()}}
    elif encoder_kwargs or img_size is not None or pretrained:
        raise ValueError("create_segmenter: encoder_kwargs, img_size and pretrained need an encoder given by name")
    Segmenter.check_encoder(encoder)
    config = getattr(encoder, "pretrained_cfg", None) or {}
    model = Segmenter(
        encoder,
        HEADS[head](encoder.embed_dim, num_classes, **dict(head_kwargs or {})),
        num_classes,
        None if classes is None else list(classes),
        tuple(mean or config.get("mean") or (0.5, 0.5, 0.5)),
        tuple(std or config.get("std") or (0.5, 0.5, 0.5)),
        window,
        stride,
    )
    model.recipe = {"encoder": given, "head": head, "head_kwargs": dict(head_kwargs or {})}
    return model


def _create_encoder(name: str, pretrained: bool, kwargs: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """timm's model and the options it took; names and options that it does not know end in one sentence."""
    if not timm.is_model(name):
        raise ValueError(f"encoder={name!r} is unknown to timm {timm.__version__}; see timm.list_models('vit_*')")
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs), kwargs
    except TypeError as error:
        if "dynamic_img_size" not in str(error):
            raise
        refused = error
    # models that take any size anyway have no such option
    kwargs = {key: value for key, value in kwargs.items() if key != "dynamic_img_size"}
    encoder = timm.create_model(name, pretrained=pretrained, **kwargs)
    if getattr(getattr(encoder, "patch_embed", None), "strict_img_size", True):
        raise ValueError(
            f"encoder={name!r} takes images of one size only (timm gives it no dynamic_img_size): it is not a plain "
            "ViT that a token head can follow"
        ) from refused
    return encoder, kwargs
