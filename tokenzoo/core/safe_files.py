"""Files that others wrote: YAML, JSON and torch's format, read without running code and within bounds.

`yaml.safe_load` runs nothing, but a short text with aliases of aliases stands for billions of values, which whoever
walks it (a message that quotes it, a check of options) would visit one by one. A deeply nested text ends in a
RecursionError.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

LONGEST = 1 << 20  # bytes of a text
MOST_VALUES = 100_000  # of a text, aliases counted wherever they are used


def parse_yaml(text: str | bytes, what: str, loader: type = yaml.SafeLoader) -> Any:
    """The value of a YAML text.

    Args:
        text: at most 1 MiB.
        what: what it is, for messages ("recipe file x.yaml").
        loader: `yaml.SafeLoader`, or a subclass that adds plain types.

    Raises:
        ValueError: no YAML, tags that would run code, or more than 100,000 values, each use of an alias counted.
    """
    _check_length(text, what)
    try:
        value = yaml.load(text, loader)  # noqa: S506 (a safe loader)
        count = _values(value, {})
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{what} is not valid YAML: {' '.join(str(error).split())}") from error
    except (TypeError, ValueError) as error:  # keys that cannot be hashed, dates that are none
        raise ValueError(f"{what} is not valid YAML: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{what} is nested too deeply") from error
    if count > MOST_VALUES:
        raise ValueError(f"{what} stands for more than {MOST_VALUES} values through its aliases; write it out")
    return value


def parse_json(text: str | bytes, what: str) -> Any:
    """The value of a JSON text of any length.

    Args:
        text: JSON.
        what: what it is, for messages.

    Raises:
        ValueError: no JSON.
    """
    try:
        return json.loads(text)
    except ValueError as error:  # json.JSONDecodeError, UnicodeDecodeError
        raise ValueError(f"{what} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{what} is nested too deeply") from error


def read_torch(path: Path, what: str = "checkpoint") -> Any:
    """What `torch.save` wrote, on the CPU: tensors and plain values, never code.

    Args:
        path: the file.
        what: what it is, for messages.

    Raises:
        ValueError: a file that cannot be read, or one that would run code.
    """
    with plain_weights(path, what):
        return torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def plain_weights(path: str | Path, what: str = "checkpoint") -> Iterator[None]:
    """Around a loader that runs no code: what it raises becomes a ValueError that names the file.

    Args:
        path: the file that is being read.
        what: what it is, for messages.
    """
    try:
        yield
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError) as error:
        text = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{what} {path} cannot be read as plain weights ({text}); if you trust the file, load it yourself and "
            "save its state dict alone"
        ) from error


def _check_length(text: str | bytes, what: str) -> None:
    if len(text) > LONGEST:
        raise ValueError(f"{what} has {len(text)} characters; more than {LONGEST} are not read")


def _values(value: Any, known: dict[int, int]) -> int:
    """Values in a tree, shared parts counted wherever they stand; each is visited once."""
    if not isinstance(value, (Mapping, list, tuple, set)):
        return 1
    if id(value) in known:
        return known[id(value)]
    known[id(value)] = MOST_VALUES + 1  # a value that holds itself has no end
    parts = [*value.keys(), *value.values()] if isinstance(value, Mapping) else list(value)
    known[id(value)] = 1 + sum(_values(part, known) for part in parts)
    return known[id(value)]
