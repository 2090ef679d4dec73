"""One sentence for code that takes what patched blocks hand on for a tensor.

Tokens travel from block to block as a named tuple, which compilers, exporters and checkpointing know. Loops over
`model.blocks`, hooks and extractors that were written for plain models cut it, add to it or give it to a layer. The
functions here are set in the bodies of such tuples (named tuples take no mixin): whatever only a tensor can do says
what to use instead. Fields, integer indices, iteration and comparison stay those of a tuple, and cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor
from torch._C import DisableTorchFunctionSubclass
from torch._ops import HigherOrderOperator

_REMEDY = (
    "take its values [B, N, C] by `.x`, or call model.forward_intermediates(images) or model.forward_tokens(images) "
    "instead of looping over model.blocks; a layer inside of a block, such as model.blocks[i].norm2, gives a tensor "
    "to hooks and explainers"
)


def _sentence(cls: type, what: str) -> str:
    name = f"tokenzoo's {cls.__name__}"
    return f"{what}: between its blocks a patched model hands on {name}, which is not a tensor; {_REMEDY}"


def refuse_attribute(self: Any, name: str) -> NoReturn:
    """`__getattr__`: names that only a tensor has."""
    cls = type(self)
    if name.startswith("_") or not hasattr(Tensor, name):
        raise AttributeError(f"{cls.__name__!r} object has no attribute {name!r}")
    raise AttributeError(_sentence(cls, f".{name} was asked for"))


def take_field(self: Any, index: Any) -> Any:
    """`__getitem__`: a field by its number, as in every tuple; indices and slices of tensors are refused."""
    if isinstance(index, int):
        return tuple.__getitem__(self, index)
    raise TypeError(_sentence(type(self), f"it was indexed with {_shown(index)}"))


def refuse_function(cls: type, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """`__torch_function__`: layers and functions of torch; the operators that a compiler makes of calls take tuples."""
    if isinstance(func, HigherOrderOperator):  # checkpointing under torch.compile
        with DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))
    raise TypeError(_sentence(cls, f"{getattr(func, '__name__', func)} was called on it"))


def refuse_operator(self: Any, *other: Any) -> NoReturn:
    """Arithmetic: for a tuple, `+` and `*` would be something else."""
    raise TypeError(_sentence(type(self), f"arithmetic with {type(other[0]).__name__}" if other else "arithmetic"))


def _shown(index: Any) -> str:
    parts = index if isinstance(index, tuple) else (index,)
    names = [type(part).__name__ if isinstance(part, Tensor) else repr(part) for part in parts]
    return f"[{', '.join(names)}]"
