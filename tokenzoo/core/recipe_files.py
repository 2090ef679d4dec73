"""Recipes in YAML files, and the budget that may stand beside the options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .safe_files import parse_yaml


def take_flops(method: Any, flops: float | None) -> tuple[Any, float | None]:
    """Takes the key `flops` out of a recipe dict or file, which is a budget to solve for and no option of a method.

    Args:
        method: what `Recipe.parse` takes.
        flops: budget given beside it; both at once are refused.

    Returns:
        The recipe without the key, and the budget.
    """
    if isinstance(method, (str, Path)) and str(method).endswith((".yaml", ".yml")):
        method = read_yaml(Path(method))
    if not isinstance(method, Mapping) or "flops" not in method:
        return method, flops
    if flops is not None:
        raise ValueError(f"flops is given twice: {method['flops']} in the recipe and {flops} beside it; keep one")
    return {key: value for key, value in method.items() if key != "flops"}, method["flops"]


def read_yaml(path: Path) -> Mapping[str, Any]:
    """A recipe file as it stands.

    Raises:
        ValueError: no such file, no YAML, or no mapping in it.
    """
    if not path.is_file():
        raise ValueError(f"recipe file {path} does not exist")
    data = parse_yaml(path.read_bytes(), f"recipe file {path}")
    if not isinstance(data, Mapping):
        raise ValueError(f"recipe file {path} holds {type(data).__name__}, not a mapping with the key 'method'")
    return data
