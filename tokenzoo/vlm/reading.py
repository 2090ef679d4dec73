"""Which modules of a tower are looked at while images are encoded: their inputs are noted, nothing is computed twice.

Hooks stand on the modules while a model is patched. They note something only inside of a call that asks for it, in a
variable of the thread that calls.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .passing import SEEN


class Noting:
    """A hook that notes what a module is given.

    Args:
        key: under which it is noted; an index of a layer, or "projector".
    """

    def __init__(self, key: Any) -> None:
        self.key = key

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen = SEEN.get()
        if seen is not None:
            seen[self.key] = (module, args, kwargs)


def watch(module: nn.Module, key: Any) -> None:
    """Has a module's inputs noted from here on."""
    module.register_forward_pre_hook(Noting(key), with_kwargs=True)


def unwatch(model: nn.Module) -> None:
    """Takes all such hooks off again."""
    for module in model.modules():
        for number, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, Noting):
                del module._forward_pre_hooks[number]
                module._forward_pre_hooks_with_kwargs.pop(number, None)
