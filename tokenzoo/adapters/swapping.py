"""Modules inside of a model: the ones that change their class, and whether somebody looks at one."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def swap_classes(around: nn.Module, classes: Mapping[type, type]) -> None:
    """Gives modules inside of another one other classes.

    Args:
        around: a block, or a model.
        classes: exact class now -> class then.
    """
    for module in around.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]


def hooked(module: nn.Module) -> bool:
    """Whether hooks of any kind stand on a module."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(len(kind) > 0 for kind in hooks)
