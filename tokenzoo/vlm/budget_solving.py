"""`prefill=`: the strength at which reading a prompt costs a given share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .counting import image_sizes, kept_rows, lm_rows
from .family import VLMFamily
from .plans import layer_plans
from .recipe import VlmRecipe

_STEPS = 40  # halvings of the strength: finer than one row of any image


def solved(
    model: nn.Module,
    family: VLMFamily,
    recipe: VlmRecipe,
    prefill: float,
    text: int,
    images: Sequence[int] | int | None = None,
) -> VlmRecipe:
    """The recipe at the least strength whose multiply-adds in the language model are no more than a share.

    Args:
        model: unpatched.
        family: that serves it.
        recipe: whose selector and droppers are dialled together.
        prefill: share of the unpatched layers' multiply-adds.
        text: rows of text beside the images.
        images: see `counting.image_sizes`.

    Raises:
        ValueError: the share is not in (0, 1], or out of reach.
    """
    if isinstance(prefill, bool) or not isinstance(prefill, (int, float)) or not 0 < prefill <= 1:
        raise ValueError(f"prefill={prefill!r}; give the share of multiply-adds to spend, in (0, 1]")
    inner = family.inner(model)
    sizes = image_sizes(family, inner, images)
    whole = sum(row.macs for row in lm_rows(family, inner, layer_plans(family, inner, None), sum(sizes), text))

    def share(dialled: VlmRecipe) -> float:
        kept = sum(kept_rows(dialled.selector, sizes))
        return sum(r.macs for r in lm_rows(family, inner, layer_plans(family, inner, dialled), kept, text)) / whole

    least = share(recipe.dial(1.0))
    if least > prefill:
        raise ValueError(
            f"prefill={prefill} is out of reach: with {text} rows of text, {least:.3f} is spent at full strength; give "
            "more, or droppers in earlier layers"
        )
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if share(recipe.dial(middle)) <= prefill else (middle, high)
    return recipe.dial(high)
