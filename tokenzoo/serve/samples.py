"""Photographs to begin with: those that scikit-learn carries, where it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

NAMES = ("china", "flower")  # CC BY 2.0: danielbuechele, vultilion


def load_samples() -> dict[str, bytes]:
    """The encoded images by name; none without scikit-learn, which is not imported for them."""
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        return {}
    folder = Path(next(iter(spec.submodule_search_locations))) / "datasets" / "images"
    files = {name: folder / f"{name}.jpg" for name in NAMES}
    return {name: file.read_bytes() for name, file in files.items() if file.is_file()}
