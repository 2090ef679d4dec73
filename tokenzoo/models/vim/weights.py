"""Official Vision Mamba checkpoints: unwrapped, fitted to the image size, refused by name if made otherwise."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from timm.models import load_state_dict
from torch import Tensor, nn

from .embed import fit_positions, num_class_tokens

_WRAPPERS = ("model_ema", "state_dict_ema", "model", "state_dict")


def load_official(model: nn.Module, path: str | Path, ema: bool = True) -> nn.Module:
    """Loads a checkpoint file of the authors into a model of any image size, in place.

    Args:
        model: a `VisionMamba`.
        path: the file.
        ema: take the averaged weights if the file has them (those of Vim-B reach the published accuracy).

    Returns:
        The model.

    Raises:
        ValueError: a checkpoint of a model with other options, or for other layers; keys are listed.
    """
    weights = checkpoint_filter_fn(load_state_dict(str(path), use_ema=ema), model)
    model.load_state_dict(weights)
    return model


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Weights that fit a model, from a checkpoint of the authors; for timm's loader.

    The averaged weights are taken where a checkpoint holds both, as timm does with files. That a class token is first
    or in the middle does not show in a checkpoint: create the model as its weights were trained.

    Args:
        state_dict: a checkpoint as saved, or its weights.
        model: a `VisionMamba`.

    Raises:
        ValueError: weights of a model with other options, or of other layers; keys are listed.
    """
    for key in _WRAPPERS:
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
            break
    weights = {key.removeprefix("module."): value for key, value in state_dict.items()}
    _check_keys(weights, model)
    if weights["pos_embed"].shape != model.pos_embed.shape:
        weights["pos_embed"] = _fit(weights["pos_embed"], model)
    return weights


def _check_keys(weights: dict[str, Tensor], model: nn.Module) -> None:
    own = model.state_dict()
    # another number of classes is timm's business
    extra = sorted(key for key in weights if key not in own and not key.startswith("head."))
    missing = sorted(key for key in own if key not in weights and not key.startswith("head."))
    if not extra and not missing:
        return
    reasons = []
    placed = _cls_position(weights)
    if num_class_tokens(placed) != num_class_tokens(model.cls_position):
        count = {0: "no class token", 1: "one class token", 2: "two class tokens"}[num_class_tokens(placed)]
        where = "'middle' or 'first'" if num_class_tokens(placed) == 1 else repr(placed)
        reasons.append(f"it has {count}: create the model with cls_position={where}")
    kind = _bimamba_type(weights)
    if kind is not None and kind != model.bimamba_type:
        reasons.append(f"its mixers are of another type: create the model with bimamba_type={kind!r}")
    if any(key.endswith(".mixer.gamma") for key in weights):
        reasons.append("it has layer scales (init_layer_scale), which this model does not offer")
    why = "; ".join(reasons) or "it is of another architecture or depth"
    raise ValueError(
        f"VisionMamba: the checkpoint does not fit this model: {why}. "
        f"Keys that the model lacks: {_listed(extra)}. Keys that the checkpoint lacks: {_listed(missing)}"
    )


def _listed(keys: list[str]) -> str:
    return ", ".join(keys) or "none"


def _cls_position(weights: dict[str, Tensor]) -> str:
    if "cls_token_head" in weights or "cls_token_tail" in weights:
        return "both"
    return "middle" if "cls_token" in weights else "none"


def _bimamba_type(weights: dict[str, Tensor]) -> str | None:
    """Type of the mixers, None where there are none."""
    names = {key.split(".mixer.")[1] for key in weights if ".mixer." in key}
    if "A_log" not in names:
        return None
    if "conv1d_b.weight" in names:
        return "v2"
    return "v1" if "A_b_log" in names else "none"


def _fit(positions: Tensor, model: nn.Module) -> Tensor:
    patches = positions.shape[1] - num_class_tokens(model.cls_position)
    side = math.isqrt(max(patches, 0))
    if side * side != patches or patches == 0:
        raise ValueError(
            f"VisionMamba: pos_embed {tuple(positions.shape)} of the checkpoint has {patches} rows besides the class "
            "token's, which is not a square grid; create the model with the image size that it was trained for, load "
            "it, and call set_input_size"
        )
    return fit_positions(positions, model.cls_position, (side, side), model.patch_embed.grid_size)
