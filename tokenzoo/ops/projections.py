"""Parts of linear layers: what stands around a layer counts, so its weight is sliced only where nothing does.

Adapters, quantisation, offloading, pruning and hooks all act when a layer is called. Whoever needs some outputs of a
layer, or its product without the bias, asks here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _hooks

# counters of operations: their hooks change nothing, and what they should count is the part that is used
_OBSERVERS = ("fvcore.", "torch.utils.", "torch.distributed._tools.")
_EVERYWHERE = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")
_OWN = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(layer: nn.Module, *kinds: type) -> bool:
    """Whether a layer's weight and bias say all that it does.

    Args:
        layer: any module.
        kinds: exact classes that compute with their weight and bias alone; `nn.Linear` if none are given.

    Returns:
        False for every other class (adapters, quantised layers, parametrisations, whatever wraps a layer), and for
        hooks, a `forward` of its own, or weights that are more than tensors.
    """
    if type(layer) not in (kinds or (nn.Linear,)) or "forward" in layer.__dict__:
        return False
    for name in _OWN:
        if _acts(getattr(layer, name)):
            return False
    for name in _EVERYWHERE:
        if _acts(getattr(_hooks, name)):
            return False
    return _is_tensor(layer.weight) and (layer.bias is None or _is_tensor(layer.bias))


def linear_part(layer: nn.Module, x: Tensor, start: int, stop: int) -> Tensor:
    """Output channels start..stop-1 of a linear layer, or of any module in its place.

    Args:
        layer: maps [..., C] to [..., D].
        x: [..., C].
        start: first channel.
        stop: behind the last channel.
    """
    if not is_plain(layer):
        return layer(x)[..., start:stop]
    if start == 0 and stop == layer.out_features:
        return layer(x)
    return F.linear(x, layer.weight[start:stop], None if layer.bias is None else layer.bias[start:stop])


def product_and_bias(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a linear layer with a bias, or any module in its place, makes of x [..., C], apart: [..., D] and [D].

    The sum is what the layer gives. The bias of a module that is no linear layer of torch's is what it gives for zeros;
    these are asked for first, so that a hook that keeps the last call keeps that of x.
    """
    bias = layer.bias if isinstance(layer, nn.Linear) and "forward" not in layer.__dict__ else None
    if bias is not None and is_plain(layer):
        return F.linear(x, layer.weight), bias
    if bias is None:
        bias = layer(x.new_zeros(1, 1, x.shape[-1])).flatten()
    out = layer(x)
    wide = torch.promote_types(out.dtype, torch.float32)
    return (out.to(wide) - bias.to(wide)).to(out.dtype), bias


def pointwise(conv: nn.Module, x: Tensor, *kinds: type) -> Tensor:
    """A 1 x 1 convolution, or any module in its place, on rows [B, N, C]; `kinds` as in `is_plain`."""
    if is_plain(conv, *kinds):
        return F.linear(x, conv.weight.flatten(1), conv.bias)
    return conv(x.transpose(1, 2).unsqueeze(3)).squeeze(3).transpose(1, 2)


def cast_for(layer: nn.Module, x: Tensor) -> Tensor:
    """x in the number format that a layer computes in; unchanged for a layer without parameters of such a format."""
    if is_plain(layer):
        return x.to(layer.weight.dtype)
    return x.to(next((p.dtype for p in layer.parameters() if p.is_floating_point()), x.dtype))


def _acts(hooks: dict[int, object]) -> bool:
    """Whether there are hooks that may do more than count."""
    return len(hooks) > 0 and any(not getattr(h, "__module__", "").startswith(_OBSERVERS) for h in hooks.values())


def _is_tensor(x: object) -> bool:
    """Whether a weight is nothing but a tensor; those that stand for one while a program is exported are."""
    return type(x) in (nn.Parameter, Tensor) or type(x).__module__.startswith("torch._subclasses")
