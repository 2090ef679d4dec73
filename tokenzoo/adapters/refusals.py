"""What cannot look into a patched model is refused in one sentence: scripting, symbolic tracing, vmap over images."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import fx
from torch._functorch.pyfunctorch import TransformType, retrieve_all_functorch_interpreters

from ..core.recipe import Recipe


class Unscriptable:
    """Mixin of patched models and blocks; `torch.jit.script` asks every module for this before it compiles."""

    def __prepare_scriptable__(self) -> NoReturn:
        raise TypeError(
            f"torch.jit.script cannot compile {type(self).__name__}, which tokenzoo has patched: tokens travel with "
            "data that TorchScript has no types for; use tokenzoo.apply.export.export(model, 'model.pt2', images), "
            "torch.export or torch.jit.trace, or call tokenzoo.unpatch_model first"
        )


def refuse_symbols(module: Any, x: Any) -> None:
    """Refuses `torch.fx.symbolic_trace` and what stands on it, such as torchvision's `create_feature_extractor`.

    Args:
        module: the model or block.
        x: its input.

    Raises:
        TypeError: the input is a symbol of torch.fx.
    """
    if isinstance(x, fx.Proxy):
        raise TypeError(
            f"torch.fx cannot trace {type(module).__name__}, which tokenzoo has patched: how many tokens are left "
            "follows from the size of the image; for features use model.forward_intermediates(images) or timm's "
            "features_only=True, for a graph torch.export"
        )


def refuse_unplaced(model: Any, recipe: Recipe) -> None:
    """Refuses recipes that give tokens no whole place, where attention adds a bias by the places of query and key.

    Args:
        model: for the message.
        recipe: the recipe.

    Raises:
        ValueError: `merged_positions="mean"`, or added tokens.
    """
    what = f"{type(model).__name__} adds a bias by the places of query and key to its attention"
    if recipe.merged_positions == "mean":
        raise ValueError(
            f"merged_positions='mean' gives merged tokens places between patches, but {what}, which knows whole places "
            "only; use merged_positions='destination'"
        )
    if recipe.protect:
        raise ValueError(f"protect={recipe.protect}: {what}, which has no rows for added tokens; leave protect out")


def refuse_vmap(recipe: Recipe) -> None:
    """Refuses counts that depend on the images inside of `torch.func.vmap`, where nobody can look at them.

    Raises:
        ValueError: names the method and the option that fixes its counts.
    """
    # asked for in this order, a compiled graph does not depend on the options that `data_dependent` looks at
    if torch.compiler.is_compiling() or not recipe.data_dependent:
        return
    if any(level.key() == TransformType.Vmap for level in retrieve_all_functorch_interpreters()):
        method = next(m for m in recipe.methods if m.data_dependent)
        raise ValueError(
            f"{method.name} keeps as many tokens as the images ask for, which torch.func.vmap cannot look at; set a "
            f"fixed budget, such as {method.static_option}"
        )
