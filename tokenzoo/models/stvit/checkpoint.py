"""Weights of STViT-R as released: those of classifiers, and of backbones inside of detectors."""

from __future__ import annotations

import re

from torch import Tensor, nn

_STEM = "patch_embed."


def rename_released(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Names a checkpoint's weights as a model has them; for timm's loader.

    - Of a detector, the weights of the backbone alone; the norm of its last output, `norm3`, is the model's `norm`.
    - The stem's two convolutions and norms go by their order, whatever the checkpoint calls them.
    - A learned prompt is left out where the model has none (its dense form), and so are norms of outputs.

    Args:
        state_dict: weights, without a wrapper around them.
        model: `STViTR` that they are for.
    """
    if any(key.startswith("backbone.") for key in state_dict):
        state_dict = {key[9:]: value for key, value in state_dict.items() if key.startswith("backbone.")}
    own = model.state_dict()
    last = f"norm{len(model.layers) - 1}."
    renamed = {re.sub(rf"^{re.escape(last)}", "norm.", key): value for key, value in state_dict.items()}
    stem = {key: value for key, value in renamed.items() if key.startswith(_STEM)}
    if not set(stem) <= set(own):
        rest = {key: value for key, value in renamed.items() if key not in stem}
        renamed = {**_stem(stem, [key for key in own if key.startswith(_STEM)]), **rest}
    optional = re.compile(r".*\.semantic_token2|norm[0-9]\.(weight|bias)")
    return {key: value for key, value in renamed.items() if key in own or not optional.fullmatch(key)}


def _stem(weights: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """The stem's weights under the model's names; as they are where their number and shapes tell another stem."""
    groups = [_layers(list(weights)), _layers(names)]
    if len(groups[0]) != len(groups[1]):
        return weights
    found = {}
    for (theirs, parts), (ours, wanted) in zip(*groups):
        if set(parts) != set(wanted):
            return weights
        found.update({f"{ours}.{part}": weights[f"{theirs}.{part}"] for part in parts})
    return found


def _layers(keys: list[str]) -> list[tuple[str, list[str]]]:
    """Layers in order, each with the names of its tensors."""
    layers: dict[str, list[str]] = {}
    for key in keys:
        layer, _, part = key.rpartition(".")
        layers.setdefault(layer, []).append(part)
    return list(layers.items())
