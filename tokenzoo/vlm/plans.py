"""What every layer of the language model does, from a recipe."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .base import Dropper
from .family import VLMFamily
from .layer import LayerPlan
from .passing import Stage
from .recipe import VlmRecipe


def layer_plans(family: VLMFamily, inner: nn.Module, recipe: VlmRecipe | None) -> list[LayerPlan]:
    """What every layer of the language model does.

    Raises:
        ValueError: a layer that is not there, or that rows must not leave in front of.
    """
    depth = len(family.language_model(inner).layers)
    return plans_of(() if recipe is None else recipe.droppers, depth, family.deep_layers(inner))


def plans_of(droppers: Sequence[Dropper], depth: int, deep: int = 0) -> list[LayerPlan]:
    """The same for any language model.

    Args:
        droppers: in the order in which they act in front of the same layer.
        depth: layers of the language model.
        deep: first layers whose outputs have to hold all rows, see `VLMFamily.deep_layers`.

    Raises:
        ValueError: a layer that is not there, or that rows must not leave in front of.
    """
    stages: dict[int, list[Stage]] = {}
    for dropper in droppers:
        layers = dropper.default_layers(depth) if dropper.layers is None else dropper.layers
        first = max(1, deep + (dropper.scored_by == "previous"))
        for number, layer in enumerate(layers):
            if not first <= layer < depth:
                raise ValueError(
                    f"{dropper.name}: layers={tuple(layers)}, but rows may leave in front of layers {first} to "
                    f"{depth - 1} of this language model"
                )
            stages.setdefault(layer, []).append(Stage(dropper, number))
    reads = {i - 1 for i, cuts in stages.items() if any(c.dropper.scored_by == "previous" for c in cuts)}
    start = min([*stages, *reads], default=depth)
    return [
        LayerPlan(i, depth, start, tuple(stages.get(i, ())), i in reads, f"language_model.layers.{i}")
        for i in range(depth)
    ]
