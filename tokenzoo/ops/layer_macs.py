"""Multiply-adds of layers by their widths, whatever stands around them.

A layer costs what its widths say, so that a model costs the same before and after it is quantised or given adapters.
An adapter that wraps a layer under the names of peft is not counted: its products vanish once it is merged. In other
modules every linear layer counts.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

_WRAPPED = ("base_layer", "original_module")  # peft's names for what an adapter wraps
_CONV = ("in_channels", "out_channels", "kernel_size", "groups")


def unwrapped(module: nn.Module) -> nn.Module:
    """The layer inside an adapter, the module itself where there is none."""
    for name in _WRAPPED:
        inner = getattr(module, name, None)
        if isinstance(inner, nn.Module):
            return unwrapped(inner)
    return module


def linear_shapes(module: nn.Module) -> Iterator[tuple[nn.Module, int, int]]:
    """(layer, inputs, outputs) of the linear layers inside a module, itself included, of any class."""
    module = unwrapped(module)
    widths = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if not isinstance(module, nn.Linear):
        found = False
        for child in module.children():
            for each in linear_shapes(child):
                found = True
                yield each
        if found:  # widths of such a module tell about the layers that it holds
            return
    if all(isinstance(width, int) for width in widths):
        yield module, *widths


def linear_macs(module: nn.Module) -> int:
    """Multiply-adds a row of all linear layers inside a module."""
    return sum(inputs * outputs for _, inputs, outputs in linear_shapes(module))


def is_conv(module: nn.Module) -> bool:
    """Whether a module is a convolution, of any class."""
    return all(hasattr(module, name) for name in _CONV)


def conv_macs(module: nn.Module) -> int:
    """Multiply-adds a place of all convolutions inside a module, each at places of its own output."""
    module = unwrapped(module)
    if not is_conv(module):
        return sum(conv_macs(child) for child in module.children())
    macs = module.in_channels * module.out_channels // module.groups
    for side in module.kernel_size:
        macs *= side
    return macs


def stream_width(attn: nn.Module, projections: dict[str, int], width: int) -> int:
    """Channels of the residual stream that an attention layer reads.

    Args:
        attn: the layer, with an output projection `proj`.
        projections: names of its input projections, and how many outputs each has.
        width: inputs of `proj`; also the answer where no linear layer can be found inside the projections.
    """
    for name, outputs in projections.items():
        for _, found, out in linear_shapes(getattr(attn, name)):
            if out == outputs:
                return found
    return next((out for _, found, out in linear_shapes(attn.proj) if found == width), width)
