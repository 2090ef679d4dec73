"""Which modules of a model change their class, and what stands on them that a change of class would drop."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def swap_attentions(block: nn.Module, classes: Mapping[type, type]) -> None:
    """Gives the attention layers of a block other classes.

    Args:
        block: patched or not.
        classes: exact class now -> class then.
    """
    for module in block.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
