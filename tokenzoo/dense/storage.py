"""Segmentation models in one safetensors file: weights, and all that is needed to build the model again."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from ..core.safe_files import parse_json
from .checkpoints import load_state, read_safetensors
from .create import create_segmenter
from .segmenter import Segmenter

_FORMAT = "tokenzoo.segmenter/1"


def save_segmenter(model: Segmenter, path: str | Path, half: bool = True) -> Path:
    """Writes a model that `create_segmenter` built, by encoder name, to a safetensors file; atomically.

    Args:
        model: patched or not; what is stored are the weights of the unpatched model.
        path: the file.
        half: store floating-point weights in float16.

    Raises:
        ValueError: the encoder was given as an object, so that nothing could build it again, or a weight is too large
            for float16.
    """
    from safetensors.torch import save_file

    built = getattr(model, "recipe", None)
    if built is None or built["encoder"] is None:
        raise ValueError(
            "save_segmenter: the model was not built by create_segmenter with an encoder name, so that the file could "
            "not say how to build it; save model.state_dict() instead"
        )
    about = {
        **built,
        "num_classes": model.num_classes,
        "classes": model.classes,
        "mean": list(model.mean),
        "std": list(model.std),
        "window": model.window,
        "stride": model.stride,
    }
    state = {key: value.cpu().contiguous() for key, value in model.state_dict().items() if ".tokenzoo_" not in key}
    if half:
        state = {key: _halved(key, value) for key, value in state.items()}
    path = Path(path)
    part = path.with_name(path.name + ".part")
    save_file(state, part, {"format": _FORMAT, "model": json.dumps(about)})
    os.replace(part, path)
    return path


def _halved(key: str, value: torch.Tensor) -> torch.Tensor:
    if not value.is_floating_point():
        return value
    small = value.half()
    if not torch.equal(small.isfinite(), value.isfinite()):
        raise ValueError(f"save_segmenter: {key} holds values too large for float16; save with half=False")
    return small


def load_segmenter(path: str | Path) -> Segmenter:
    """Builds the model of a file that `save_segmenter` wrote, in float32 and evaluation mode.

    Raises:
        ValueError: no such file, or a file of another kind.
    """
    path = Path(path)
    state, about = read_safetensors(path)
    if about.get("format") != _FORMAT:
        raise ValueError(
            f"checkpoint {path} was not written by save_segmenter (format {about.get('format')!r}); official Segmenter "
            "folders: load_official_segmenter"
        )
    built = parse_json(about.get("model", ""), f"checkpoint {path}: what it says of its model")
    try:
        encoder = built.pop("encoder")
        model = create_segmenter(encoder["name"], encoder_kwargs=encoder["kwargs"], **built)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {path} does not say which model it holds ({error})") from error
    load_state(model, {k: v.float() if v.is_floating_point() else v for k, v in state.items()}, str(path))
    return model.eval()
