"""Modules inside of blocks: the ones that change their class, and whether somebody looks at one."""

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


def hooked(module: nn.Module) -> bool:
    """Whether hooks of any kind stand on a module."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(len(kind) > 0 for kind in hooks)
