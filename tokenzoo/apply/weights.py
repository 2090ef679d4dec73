"""Weights from a file into a timm model, whatever size of images they were made for."""

from __future__ import annotations

import logging
import sys

from torch import Tensor, nn

from ..core.safe_files import plain_weights

_log = logging.getLogger(__name__)


def load_weights(model: nn.Module, path: str, flag: str, new_head: bool = False) -> None:
    """Loads weights; timm's own filter resizes position and patch embeddings to the model and knows released names.

    Args:
        model: a timm model.
        path: file of weights, .pth or .safetensors; .npz where the model reads such files.
        flag: where the path was given, for messages.
        new_head: a classifier for another number of classes stays as it was created, with a warning; else it is
            refused.

    Raises:
        ValueError: no such file, no plain weights, or weights that do not fit.
    """
    from timm.models import load_checkpoint, load_state_dict

    try:
        with plain_weights(path):
            if path.lower().endswith((".npz", ".npy")):
                load_checkpoint(model, path)
                return
            state = load_state_dict(path, weights_only=True)  # the oldest timm runs code unless it is told not to
    except FileNotFoundError as error:
        raise ValueError(f"{flag} {path} does not exist") from error
    own = model.state_dict()
    state = _fitted(model, state, own, path)
    if new_head:
        state = _own_head(model, state, own, path)
    missing, unexpected = set(own) - set(state), set(state) - set(own)
    shapes = [key for key in own if key in state and own[key].shape != state[key].shape]
    if missing or unexpected or shapes:
        words = [f"{what} {', '.join(sorted(keys)[:5])}" for what, keys in (
            ("missing", missing), ("unknown", unexpected), ("of another shape", shapes)) if keys]  # fmt: skip
        raise ValueError(
            f"{flag} {path} does not fit {type(model).__name__}: {'; '.join(words)}; check --model, --num-classes and "
            "--img-size"
        )
    model.load_state_dict(state)


def _own_head(model: nn.Module, state: dict[str, Tensor], own: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """The weights, with the model's own classifier in place of one for another number of classes."""
    heads = (getattr(model, "pretrained_cfg", None) or {}).get("classifier", "head")
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    other = [
        key for key, value in state.items()
        if key in own and own[key].shape != value.shape and key.startswith(tuple(f"{head}." for head in heads))
    ]  # fmt: skip
    if not other:
        return state
    _log.warning("%s: %s have another number of classes and start anew", path, ", ".join(other))
    return {key: own[key] if key in other else value for key, value in state.items()}


def _fitted(model: nn.Module, state: dict[str, Tensor], own: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """The weights after the filter that timm runs over its released ones, where they do not fit as they are."""
    embeddings = [key for key in own if "pos_embed" in key or "patch_embed" in key]
    fits = own.keys() == state.keys() and all(own[key].shape == state[key].shape for key in embeddings)
    filter_fn = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if fits or filter_fn is None:
        return state
    try:
        found = filter_fn(state, model)
    except (KeyError, ValueError, RuntimeError, AssertionError) as error:
        _log.warning("%s: timm's filter for %s failed (%s)", path, type(model).__name__, error)
        return state
    resized = [key for key in embeddings if key in state and key in found and state[key].shape != found[key].shape]
    for key in resized:
        _log.warning("%s: %s was resized from %s to %s", path, key, list(state[key].shape), list(found[key].shape))
    return found
