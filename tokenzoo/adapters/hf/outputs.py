"""What users ask of one call of a transformers model, and what they get."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def asked(model: Any, options: dict[str, Any], name: str) -> Any:
    """An option of transformers: of this call, else of the configuration."""
    given = options.get(name)
    return getattr(model.config, name, None) or False if given is None else given


def selected(states: list[Tensor], wanted: Any) -> tuple[Tensor | None, ...] | None:
    """Hidden states as they are asked for: all, or those of one index or several, None in the place of others."""
    if wanted is False:
        return None
    if wanted is True:
        return tuple(states)
    count = len(states)
    given = [wanted] if isinstance(wanted, int) else wanted
    chosen = {index % count for index in given if -count <= index < count}
    return tuple(state if index in chosen else None for index, state in enumerate(states))


def refuse_options(model: Any, options: dict[str, Any]) -> None:
    """Refuses what a pass with fewer and fewer tokens has no answer to."""
    name = type(model).__name__
    if asked(model, options, "output_attentions"):
        raise ValueError(
            f"{name}: output_attentions=True asks for the maps of all layers, whose tokens are not the same any more; "
            "see tokenzoo.view for what tokens look at, or call tokenzoo.unpatch_model first"
        )
    if options.get("bool_masked_pos") is not None:
        raise ValueError(
            f"{name}: bool_masked_pos is for training by masked patches, which needs every patch behind the layers; "
            "call tokenzoo.unpatch_model first"
        )


def whole_mask(mask: Tensor | None) -> Tensor | None:
    """A mask of tokens [B, N] as one of four dimensions, None where it hides nothing; other masks as they are."""
    if mask is None or mask.dim() != 2:
        return mask
    mask = mask.bool()
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return None if not traced and bool(mask.all()) else mask[:, None, None, :]
