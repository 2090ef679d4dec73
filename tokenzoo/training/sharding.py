"""Training by FSDP2: every process holds a part of each weight, its gradient and its moments.

Blocks, patched or not, are the units: the weights of one are gathered when it runs and let go behind it. What stands
around the blocks is a unit of its own. Names of parameters stay as they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.inspect import blocks_of
from ..adapters.registry import find_family
from ..adapters.wrappers import backbone_of
from ..evaluation.distributed import World


def check_sharding(args: argparse.Namespace, world: World) -> None:
    """Refuses what does not go together with --fsdp.

    Raises:
        ValueError: names the flag, and what to do.
    """
    if world.size == 1:
        raise ValueError("--fsdp parts a model among processes, and this is one alone; start it with torchrun")
    refused = {
        "--consistency": (args.consistency, "its second pass shares the weights of the first"),
        "--eval-unpatched": (args.eval_unpatched, "the unpatched view shares weights; use `tokenzoo eval` afterwards"),
        "--torchcompile": (args.torchcompile, "its one graph cannot hold the gathering"),
        "--amp-dtype float16": (args.amp and args.amp_dtype == "float16", "use bfloat16"),
        "--clip-mode agc": (args.clip_grad is not None and args.clip_mode == "agc", "use norm"),
    }
    for flag, (given, why) in refused.items():
        if given:
            raise ValueError(f"{flag} does not go with --fsdp: {why}")


def shard(root: nn.Module, model: nn.Module, world: World, methods: tuple[str, ...] = ()) -> None:
    """Shards a model in place, and moves it to the device of its process.

    Args:
        root: what is called, around the model.
        model: patched or not.
        world: this process among all.
        methods: of the root, besides its forward pass, that run the model.

    Raises:
        TypeError: a model that is not served, whose blocks nobody knows.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    backbone = backbone_of(model)
    find_family(backbone)
    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in blocks_of(backbone):
        fully_shard(block, mesh=mesh)
    fully_shard(root, mesh=mesh)
    for method in methods:
        register_fsdp_forward_method(root, method)


class Answering(nn.Module):
    """A model that is only asked, as the root of its shards.

    Args:
        model: patched or not.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """What the model answers."""
        return self.model(images)


@contextmanager
def without_sync(wrapped: nn.Module) -> Iterator[None]:
    """Lets gradients add up in each process; the next backward pass outside sums them over all."""
    if hasattr(wrapped, "no_sync"):
        with wrapped.no_sync():
            yield
        return
    wrapped.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        wrapped.set_requires_gradient_sync(True)


def _sharded(value: Any) -> bool:
    return isinstance(value, Tensor) and hasattr(value, "full_tensor")


def whole(state: Any, keep: bool = True) -> Any:
    """A state dict with shards put together, on the CPU; all processes have to call it.

    Args:
        state: tensors and plain values in mappings and lists; what is no shard stays the same object.
        keep: whether this process wants the whole tensors.
    """
    if _sharded(state):
        full = state.detach().full_tensor()
        return full.cpu() if keep else None
    if isinstance(state, Mapping):
        return {key: whole(value, keep) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(whole(value, keep) for value in state)
    return state


def load_weights(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """`load_state_dict` with whole tensors, for a module that may be sharded."""
    own = module.state_dict()
    module.load_state_dict({key: _part(value, own.get(key)) for key, value in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """`load_state_dict` with whole tensors, for an optimizer of shards or of whole parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        index: {
            name: _part(value, parameters[index]) if _like(value, parameters[index]) else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})


def _like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _part(value: Tensor, own: Any) -> Tensor:
    """This process's shard of a whole tensor, where its own is one."""
    if not _sharded(own):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)


