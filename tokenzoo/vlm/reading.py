"""Which modules of a tower are looked at while images are encoded: what they are given, and what they give, is noted.

Hooks stand on the modules while a model is patched. They note something only inside of a call that asks for it, in a
variable of the thread that calls.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..adapters.hooked import Aside
from ..core.tokens import Tokens
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
        if seen is None:
            return
        aside = kwargs.get("aside")
        if isinstance(aside, Aside) and aside.state is not None:  # what tokens carry goes past hooks
            args = (aside.given(args[0], str(self.key)),)
        seen[self.key] = (module, args, kwargs)


class Result:
    """A hook that notes what a module gives, without its gradient.

    Args:
        key: under which it is noted: index of a layer, and the path of the module inside of it.
    """

    def __init__(self, key: tuple[int, str]) -> None:
        self.key = key

    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        seen = SEEN.get()
        if seen is not None and isinstance(out, Tensor):
            seen[self.key] = (module, out.detach())


def in_place(tower: nn.Module, seen: dict[Any, Any]) -> dict[Any, Any]:
    """What was noted, with all tokens in their places where methods have reduced them inside the tower.

    Merged tokens are read by each that went into them, so that attention over all is that of a query which weighs
    tokens by their size; dropped ones have the values that the recipe's `fill` says.

    Args:
        tower: the vision tower, patched or not.
        seen: what its modules were given, see `Noting`.
    """
    found: dict[Any, Any] = {}
    moved = set()
    for key, noted in seen.items():
        if isinstance(key, tuple):
            continue
        module, args, options = noted
        x = args[0] if args else options.get("hidden_states")
        if isinstance(x, Tokens):
            args, options = (tower.in_place(x),), {"attention_mask": options.get("attn_mask")}
            moved.add(key)
        found[key] = (module, args, options)
    given = {key: noted for key, noted in seen.items() if isinstance(key, tuple)}
    # what modules gave for fewer tokens is of no use: it is made anew of all; so is what a later hook may have changed
    return found | {key: noted for key, noted in given.items() if key[0] not in moved and _told_last(noted[0])}


def _told_last(module: nn.Module) -> bool:
    """Whether what `Result` notes is what a module gives in the end: no hook that came later can have changed it."""
    hooks = list(module._forward_hooks.values())
    return bool(hooks) and isinstance(hooks[-1], Result)


def watch(module: nn.Module, key: Any) -> None:
    """Has a module's inputs noted from here on."""
    module.register_forward_pre_hook(Noting(key), with_kwargs=True)


def watch_result(module: nn.Module, key: tuple[int, str]) -> None:
    """Has what a module gives noted from here on."""
    module.register_forward_hook(Result(key))


def unwatch(model: nn.Module) -> None:
    """Takes all such hooks off again."""
    for module in model.modules():
        for number, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, Noting):
                del module._forward_pre_hooks[number]
                module._forward_pre_hooks_with_kwargs.pop(number, None)
        for number, hook in list(module._forward_hooks.items()):
            if isinstance(hook, Result):
                del module._forward_hooks[number]
