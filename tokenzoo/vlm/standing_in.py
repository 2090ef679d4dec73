"""Classes that models, layers and language models have while they are patched."""

from __future__ import annotations

import functools
import inspect
import sys
import types
from typing import Any

from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

_KINDS: dict[tuple[type, type], type] = {}


def stand_in(mixin: type, plain: type, module: str) -> type:
    """The reducing class of an exact class of transformers: the mixin in front of it.

    It stands in a module under a name of its own, so that copies and pickles find it; its `__name__` is the published
    one, which transformers writes into files and looks classes up by. `forward` keeps the published signature, which
    generate, Trainer and PEFT read.

    Args:
        mixin: what to do; overrides in it may take any arguments.
        plain: the exact class.
        module: full name of the module that asks, at its import.
    """
    if (mixin, plain) in _KINDS:
        return _KINDS[mixin, plain]
    path = f"{mixin.__name__}_{plain.__module__.rpartition('.')[2]}_{plain.__name__}"
    space: dict[str, Any] = {"__module__": module, "__qualname__": path, "__doc__": plain.__doc__}
    space |= {name: _signed(getattr(mixin, name), getattr(plain, name)) for name in _published(mixin, plain)}
    kind = type(path, (mixin, plain), space)
    kind.__name__ = plain.__name__
    setattr(sys.modules[module], path, kind)
    # flags that say which outputs to capture are looked up by the class as a string
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(kind), getattr(plain, "_can_record_outputs", None))
    _KINDS[mixin, plain] = kind
    return kind


def _published(mixin: type, plain: type) -> list[str]:
    names = ("forward", "get_image_features", "get_video_features")
    return [name for name in names if name in vars(mixin) and hasattr(plain, name)]


def _signed(own: types.FunctionType, published: Any) -> Any:
    """A copy of a function of a mixin with the published signature; not a call of it, which decoding would pay for."""
    call = types.FunctionType(own.__code__, own.__globals__, own.__name__, own.__defaults__, own.__closure__)
    call.__kwdefaults__ = own.__kwdefaults__
    return functools.update_wrapper(call, published)


@functools.lru_cache(maxsize=256)
def _names(function: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)[1:]


def named(method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a bound method by name."""
    return {**dict(zip(_names(method.__func__), args)), **kwargs} if args else kwargs
