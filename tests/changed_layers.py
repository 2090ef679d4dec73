"""What users put around the linear layers of a model, hand-written: one row a kind of change."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Around(nn.Module):
    """A low-rank adapter around a layer that says nothing of the layer's sizes."""

    def __init__(self, inner: nn.Module, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inner = inner
        generator = torch.Generator().manual_seed(inputs + outputs)
        self.down = nn.Parameter(torch.randn(2, inputs, generator=generator) * inputs**-0.5)
        self.up = nn.Parameter(torch.randn(outputs, 2, generator=generator) * 0.4)

    def forward(self, x: Tensor) -> Tensor:
        axis = 1 if isinstance(self.inner, (nn.Conv1d, nn.Conv2d)) else -1  # where the channels are
        added = x.movedim(axis, -1) @ self.down.T @ self.up.T
        return self.inner(x) + added.movedim(-1, axis)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The layer alone, with the adapter in its weight."""
        self.inner.weight.add_((self.up @ self.down).view(self.inner.weight.shape))
        return self.inner


class Adapter(Around):
    """The same under the names of peft, which hand out the weight of the layer inside."""

    def __init__(self, inner: nn.Module, inputs: int, outputs: int) -> None:
        super().__init__(inner, inputs, outputs)
        self.base_layer, self.in_features, self.out_features = inner, inputs, outputs

    @property
    def weight(self) -> Tensor:
        return self.inner.weight


class Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * torch.linspace(0.5, 1.5, len(weight)).unsqueeze(1)


def linear_layers(model: nn.Module, names: tuple[str, ...] = ()) -> dict[str, nn.Linear]:
    """Linear layers inside the blocks by name, or those called `names` alone."""
    inside = {m for block in model.blocks for m in block.modules()}
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m in inside}
    return {n: m for n, m in found.items() if not names or n.rpartition(".")[2] in names}


def replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def _wrap(kind: type) -> Callable[[nn.Module, dict[str, nn.Linear]], nn.Module]:
    def change(model: nn.Module, layers: dict[str, nn.Linear]) -> nn.Module:
        for name, layer in layers.items():
            replace(model, name, kind(layer, layer.in_features, layer.out_features))
        return model

    return change


def _hooked(model: nn.Module, layers: dict[str, nn.Linear]) -> nn.Module:
    for layer in layers.values():
        layer.register_forward_hook(lambda module, args, out: out * torch.linspace(0.5, 1.5, out.shape[-1]) + 0.1)
    return model


def _pre_hooked(model: nn.Module, layers: dict[str, nn.Linear]) -> nn.Module:
    for layer in layers.values():
        layer.register_forward_pre_hook(lambda module, args: (args[0] * 1.3 + 0.1,))
    return model


def _parametrised(model: nn.Module, layers: dict[str, nn.Linear]) -> nn.Module:
    for layer in layers.values():
        parametrize.register_parametrization(layer, "weight", Scaled())
    return model


def _overridden(model: nn.Module, layers: dict[str, nn.Linear]) -> nn.Module:
    for layer in layers.values():
        layer.forward = lambda x, forward=layer.forward: forward(x) * 1.2 + 0.1
    return model


def _quantised(model: nn.Module, layers: dict[str, nn.Linear]) -> nn.Module:
    names = {name: torch.ao.quantization.default_dynamic_qconfig for name in layers}
    return torch.ao.quantization.quantize_dynamic(model, names)


# name -> a function of a model and some of its layers that gives the changed model
CHANGES: dict[str, Callable[[nn.Module, dict[str, nn.Linear]], nn.Module]] = {
    "around": _wrap(Around),
    "adapter": _wrap(Adapter),
    "hooked": _hooked,
    "pre_hooked": _pre_hooked,
    "parametrised": _parametrised,
    "overridden": _overridden,
    "quantised": _quantised,
}


def merge(model: nn.Module) -> nn.Module:
    """Puts adapters into the weights."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Around):
            replace(model, name, module.merged())
    return model
