"""What several droppers share."""

from __future__ import annotations

from torch import Tensor

from .base import Dropper
from .layer_signals import LayerRows


def check_single(dropper: Dropper) -> None:
    """Refuses more than one layer.

    Raises:
        ValueError: with the layers that were given.
    """
    if dropper.layers is not None and len(dropper.layers) != 1:
        raise ValueError(f"{dropper.name}: layers={dropper.layers}; it acts once, give one layer")


def check_stages(dropper: Dropper, field: str) -> None:
    """Refuses another number of layers than of stages.

    Args:
        dropper: whose `layers` are looked at.
        field: the option that has an entry per stage.

    Raises:
        ValueError: with both.
    """
    stages = getattr(dropper, field)
    if dropper.layers is not None and len(dropper.layers) != len(stages):
        raise ValueError(
            f"{dropper.name}: layers={dropper.layers} and {field}={stages}; give one entry of {field} per layer"
        )


def even_layers(depth: int, stages: int) -> tuple[int, ...]:
    """Layers at equal distances, a stage in front of each: (8, 16, 24) for three stages in 32 layers.

    Args:
        depth: layers of the language model.
        stages: how many cuts.
    """
    return tuple(depth * (i + 1) // (stages + 1) for i in range(stages))


def words_behind(rows: LayerRows) -> Tensor:
    """Rows of words behind the first visual row of their prompt [B, N] bool."""
    return rows.text & (rows.visual.long().cumsum(1) > 0)
