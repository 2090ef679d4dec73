"""Methods on models that have lost blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .method import Method, Step


def pinned(method: Method, steps: Sequence[Step], depth: int) -> Method:
    """A method that does the same in a model of fewer blocks.

    Args:
        method: as given for the whole model.
        steps: what it does in the blocks that are left.
        depth: their number.
    """
    wanted = {step.block: step.strength for step in steps}
    for layers in (method.layers, tuple(wanted)):
        try:
            found = replace(method, layers=layers)
            if layers != "others" and found.strengths(depth) == wanted:
                return found
        except (TypeError, ValueError):
            continue  # options that say a value for every block
    raise cannot_cut(method, depth)


def cannot_cut(method: Method, left: int) -> ValueError:
    """The refusal of a method whose options follow from all blocks of a model."""
    return ValueError(
        f"{method.name}: its options {method.to_dict()} are those of the whole model and cannot be written for the "
        f"{left} blocks that are left of it; take the recipe before prune_intermediate_layers, or prune first and "
        "patch afterwards"
    )
