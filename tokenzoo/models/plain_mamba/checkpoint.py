"""Released checkpoints of PlainMamba: what their weights are called, and loading them.

They hold the weights under `state_dict`, the backbone's with the prefix `backbone.`, the classifier as `head.fc`.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from timm.models import load_state_dict, register_notrace_function
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)  # a PlainMamba

_PREFIXES = ("backbone.", ""), ("head.fc.", "head.")


@register_notrace_function
def resize_positions(positions: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Interpolates positions for another grid, bicubic and without antialiasing, as published.

    Args:
        positions: [1, L, C] in raster order.
        source: grid (high, wide) that they are for.
        target: grid (high, wide) that they shall be for.
    """
    if source == target:
        return positions
    wide = positions.to(torch.promote_types(positions.dtype, torch.float32))
    maps = wide.transpose(1, 2).unflatten(2, source)
    maps = F.interpolate(maps, size=target, mode="bicubic", align_corners=False)
    return maps.flatten(2).transpose(1, 2).to(positions.dtype)


def official_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gives the weights of a released checkpoint the names that they have here; other names stay.

    Args:
        weights: by name.
    """
    renamed = {}
    for key, value in weights.items():
        for start, ours in _PREFIXES:
            if key.startswith(start):
                key = ours + key[len(start) :]
                break
        renamed[key] = value
    return renamed


def fit_weights(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Released weights by our names, positions interpolated where the model is for another image size.

    Args:
        weights: by name, of a model for square images or of this model's grid.
        model: model that they are for.

    Raises:
        ValueError: positions of a grid that is neither square nor the model's.
    """
    fitted = official_names(weights)
    given, grid = fitted.get("pos_embed"), model.patch_embed.grid_size
    if given is not None and given.shape[1] != grid[0] * grid[1]:
        side = isqrt(given.shape[1])
        if side * side != given.shape[1]:
            raise ValueError(
                f"PlainMamba: {given.shape[1]} positions are no square; create the model with the img_size of the "
                "checkpoint, load it, then call set_input_size"
            )
        fitted["pos_embed"] = resize_positions(given, (side, side), grid)
    return fitted


def load_official(model: Model, checkpoint: str | Path | Mapping[str, Any]) -> Model:
    """Loads a released checkpoint, in place; nothing is left over on either side.

    The classifier's weights are left out where the model has no classifier.

    Args:
        model: the model.
        checkpoint: file, or its content.

    Returns:
        The model.

    Raises:
        FileNotFoundError: no such file.
        ValueError: weights that are missing, unknown or of another shape, all listed; the model is not changed.
    """
    if isinstance(checkpoint, (str, Path)):
        if not Path(checkpoint).is_file():
            raise FileNotFoundError(f"PlainMamba: there is no checkpoint {str(checkpoint)!r}")
        weights = load_state_dict(str(checkpoint), use_ema=False)
    else:
        weights = checkpoint.get("state_dict", checkpoint)
    weights = fit_weights(weights, model)
    if model.num_classes == 0:
        weights = {key: value for key, value in weights.items() if not key.startswith("head.")}
    own = model.state_dict()
    # released files may lack the counters of batches, which evaluation does not need
    missing = sorted(key for key in own.keys() - weights.keys() if not key.endswith("num_batches_tracked"))
    unknown = sorted(weights.keys() - own.keys())
    shapes = [
        f"{key} {tuple(value.shape)} for {tuple(own[key].shape)}"
        for key, value in weights.items()
        if key in own and value.shape != own[key].shape
    ]
    found = (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
    wrong = [f"{kind}: {', '.join(keys)}" for kind, keys in found if keys]
    if wrong:
        raise ValueError(
            f"PlainMamba: the checkpoint is not of this model ({'; '.join(wrong)}); create the variant, classes and "
            "norms of taps (tap_norms) that it was saved from, and leave out the weights of other heads"
        )
    model.load_state_dict(weights, strict=False)
    return model
