"""Modules inside of a model: the ones that change their class, and whether somebody looks at one."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def become(module: nn.Module, kind: type) -> None:
    """Gives a module another class.

    The dispatch hooks of accelerate (`device_map`, offloading) keep the method that they stand in front of; it becomes
    that of the new class.
    """
    module.__class__ = kind
    if "_old_forward" in vars(module):
        module._old_forward = kind.forward.__get__(module)


def dispatched(module: nn.Module) -> bool:
    """Whether `forward` on an instance is accelerate's, in front of nothing but the class's own."""
    held = getattr(vars(module).get("_old_forward"), "__func__", None)
    return hasattr(module, "_hf_hook") and held is not None and held is type(module).forward


def swap_classes(around: nn.Module, classes: Mapping[type, type]) -> None:
    """Gives modules inside of another one other classes.

    Args:
        around: a block, or a model.
        classes: exact class now -> class then.
    """
    for module in around.modules():
        if type(module) in classes:
            become(module, classes[type(module)])


def hooked(module: nn.Module) -> bool:
    """Whether hooks of any kind stand on a module."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(len(kind) > 0 for kind in hooks)
