"""Weights from files that others wrote, and errors that say which of them do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ..core.safe_files import read_torch


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a file: safetensors, or torch's format without code ("model" and "state_dict" are opened).

    Raises:
        ValueError: no such file, one that cannot be read, or one without a state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    saved = read_torch(path)
    for key in ("model", "state_dict"):
        if isinstance(saved, Mapping) and isinstance(saved.get(key), Mapping):
            saved = saved[key]
    if not isinstance(saved, Mapping) or not saved or not all(isinstance(value, Tensor) for value in saved.values()):
        raise ValueError(f"checkpoint {path} holds no state dict; expected {{'model': weights, ...}}")
    return dict(saved)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        ValueError: no such file, or one that cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    try:
        with safe_open(str(path), "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"checkpoint {path} is not a readable safetensors file: {error}") from error


def load_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """`load_state_dict` with an error that lists what does not fit.

    Args:
        model: takes the weights.
        state: the weights.
        source: where they come from, for the message.

    Raises:
        ValueError: keys are missing or left over, or shapes differ.
    """
    own = model.state_dict()
    missing = sorted(set(own) - set(state))
    extra = sorted(set(state) - set(own))
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in sorted(set(own) & set(state))
        if own[key].shape != state[key].shape
    ]
    found = [f"{what}: {_some(keys)}" for what, keys in
             (("missing", missing), ("left over", extra), ("shapes", shapes)) if keys]  # fmt: skip
    if found:
        raise ValueError(f"{source} does not fit {type(model).__name__}; {'; '.join(found)}")
    model.load_state_dict(state)


def _some(keys: list[str], most: int = 6) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
