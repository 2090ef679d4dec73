"""Segmenter as its authors release it: checkpoint.pth with variant.yml beside it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..core.safe_files import parse_yaml
from .checkpoints import load_state, read_checkpoint
from .heads import LinearHead, MaskTransformer
from .segmenter import Segmenter

_NORMS = {  # Segmenter's names of normalisations
    "vit": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "deit": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
_NEEDED = ("image_size", "patch_size", "d_model", "n_layers", "n_heads", "n_cls", "decoder")


class _TupleLoader(yaml.SafeLoader):
    """YAML without code, but with the tag for tuples that the released files hold."""


_TupleLoader.add_constructor(
    "tag:yaml.org,2002:python/tuple", lambda loader, node: tuple(loader.construct_sequence(node))
)


def load_official_segmenter(
    path: str | Path,
    variant: str | Path | Mapping[str, Any] | None = None,
    img_size: int | tuple[int, int] | None = None,
) -> Segmenter:
    """Segmenter as its authors release it.

    Layer norms have eps 1e-5; position embeddings are resized bilinearly, without antialiasing, as the official code
    does; classification heads in the checkpoint are ignored. Images of another size than `img_size` go in as well, but
    there timm resamples the position embeddings (bicubic, antialiased), which is not quite the official result.

    Args:
        path: checkpoint.pth, or the folder of it.
        variant: the file that says how the model is built, or its content; None for variant.yml beside the checkpoint.
        img_size: image size to make position embeddings for; None for that of the training crop.

    Returns:
        The model in evaluation mode, with `window` and `stride` of the variant file.

    Raises:
        ValueError: a file is missing or not readable, or the keys do not fit.

    Source: Strudel, Garcia, Laptev, Schmid, "Segmenter: Transformer for Semantic Segmentation", ICCV 2021.
    """
    path = Path(path)
    path = path / "checkpoint.pth" if path.is_dir() else path
    if not isinstance(variant, Mapping):
        variant = _read_variant(path.parent / "variant.yml" if variant is None else Path(variant))
    net = _net_of(variant)
    state = read_checkpoint(path)
    if any(key.startswith("backbone.layers.") for key in state):
        raise ValueError(
            f"checkpoint {path} has the key names of mmsegmentation (backbone.layers.*); convert it to those of the "
            "official Segmenter (encoder.blocks.*, decoder.*) first"
        )
    trained = _pair(net["image_size"])
    size = trained if img_size is None else _pair(img_size)
    model = _build(net, size)
    state = {k: v for k, v in state.items() if not k.startswith(("encoder.head.", "encoder.head_dist."))}
    if "encoder.pos_embed" in state:
        patch, prefix = net["patch_size"], model.encoder.num_prefix_tokens
        old, new = (tuple(side // patch for side in s) for s in (trained, size))
        state["encoder.pos_embed"] = resize_positions(state["encoder.pos_embed"], prefix, old, new)
    load_state(model, state, str(path))
    inference = variant.get("inference_kwargs") or {}
    model.window, model.stride = inference.get("window_size"), inference.get("window_stride")
    model.mean, model.std = _NORMS[_normalization(variant)]
    return model.eval()


def resize_positions(positions: Tensor, prefix: int, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Position embeddings [1, prefix + N, C] of another patch grid, bilinear without antialiasing.

    Raises:
        ValueError: the embeddings do not belong to the old grid.
    """
    if positions.shape[1] != prefix + old[0] * old[1]:
        raise ValueError(f"pos_embed has {positions.shape[1]} rows, not {prefix} and {old[0]} x {old[1]} patches")
    if old == new:
        return positions
    grid = positions[:, prefix:].transpose(1, 2).unflatten(2, old)
    grid = F.interpolate(grid, new, mode="bilinear", align_corners=False)
    return torch.cat([positions[:, :prefix], grid.flatten(2).transpose(1, 2)], dim=1)


def _build(net: Mapping[str, Any], size: tuple[int, int]) -> Segmenter:
    cls = VisionTransformerDistilled if net.get("distilled") else VisionTransformer
    encoder = cls(
        img_size=size,
        patch_size=net["patch_size"],
        embed_dim=net["d_model"],
        depth=net["n_layers"],
        num_heads=net["n_heads"],
        num_classes=0,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
        dynamic_img_size=True,
    )
    decoder, classes = net["decoder"], net["n_cls"]
    if decoder["name"] == "linear":
        return Segmenter(encoder, LinearHead(net["d_model"], classes), classes)
    if decoder["name"] != "mask_transformer":
        raise ValueError(f"variant.yml: decoder {decoder['name']!r} is unknown; use 'linear' or 'mask_transformer'")
    return Segmenter(encoder, MaskTransformer(net["d_model"], classes, decoder["n_layers"]), classes)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _normalization(variant: Mapping[str, Any]) -> str:
    name = (variant.get("dataset_kwargs") or {}).get("normalization") or variant["net_kwargs"].get("normalization")
    if name not in _NORMS:
        raise ValueError(f"variant.yml: normalization {name!r} is unknown; use one of {', '.join(_NORMS)}")
    return name


def _read_variant(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; it says how the checkpoint beside it is built")
    variant = parse_yaml(path.read_bytes(), str(path), _TupleLoader)  # a safe loader with one tag more
    if not isinstance(variant, Mapping):
        raise ValueError(f"{path} holds {type(variant).__name__}, not a mapping with net_kwargs")
    return variant


def _net_of(variant: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part that says how the model is built."""
    net = variant.get("net_kwargs") or {}
    missing = [name for name in _NEEDED if name not in net]
    if missing:
        raise ValueError(f"variant.yml: net_kwargs lacks {', '.join(missing)}")
    return net
