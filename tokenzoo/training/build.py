"""The model of a run, its teacher, and the recipe on it."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..adapters.inspect import is_patched
from ..adapters.vit.registers import add_registers
from ..apply.patch import patch_model, recipe
from ..apply.weights import load_weights
from ..core.learned import Learned
from ..core.recipe import Recipe, take_flops
from ..core.registry import list_methods
from .seeds import METHOD, MODEL, seed_everything


class Built(NamedTuple):
    """What a run trains.

    Attributes:
        model: on its device, patched if a method is given.
        teacher: frozen, in eval mode; None without distillation.
        recipe: what `patch_model` takes to get this run's reduction again, None without one.
    """

    model: nn.Module
    teacher: nn.Module | None
    recipe: dict[str, Any] | None


def build(args: argparse.Namespace, num_classes: int, device: torch.device) -> Built:
    """Creates, loads and patches the model.

    Raises:
        ValueError: an unknown model, weights that do not fit, a recipe that cannot be reached.
        TypeError: a model that the method cannot be put on.
    """
    method = _parsed(args)
    seed_everything(args.seed, MODEL)
    model = _create(args.model, args, num_classes, args.pretrained, args.initial_checkpoint)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    model = model.to(device)
    teacher = _teacher(args, model, num_classes, device, _asks(method, args))
    if args.registers:
        add_registers(model, args.registers)
    if args.grad_checkpointing:
        if not hasattr(model, "set_grad_checkpointing"):
            raise ValueError(f"{type(model).__name__} has no gradient checkpointing; leave --grad-checkpointing out")
        model.set_grad_checkpointing(True)
    if method is not None:
        seed_everything(args.seed, METHOD)
        patch_model(model, method, flops=args.flops, **args.method_kwargs)
    if args.train_only is not None:
        _freeze(model, args.train_only)
    return Built(model, teacher, None if method is None else recipe(model))


def _freeze(model: nn.Module, starts: Sequence[str]) -> None:
    """Leaves the parameters learning whose names begin in one of some ways, and those that a method brought."""
    names = [name for name, _ in model.named_parameters()]
    for start in starts:
        if not any(name.startswith(start) for name in names):
            raise ValueError(
                f"--train-only {start}: no parameter of {type(model).__name__} begins so; there are "
                f"{', '.join(dict.fromkeys(name.split('.')[0] for name in names))}"
            )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".tokenzoo_" in name or name.startswith(tuple(starts)))


def _parsed(args: argparse.Namespace) -> Any:
    """The method as `patch_model` takes it; an unknown name or option is reported before anything is loaded."""
    if args.method is None:
        return None
    named = isinstance(args.method, str) and not args.method.endswith((".yaml", ".yml"))
    if named and args.method not in list_methods():
        raise ValueError(f"--method {args.method!r} is unknown; use one of {', '.join(list_methods())} or a .yaml file")
    given = dict(args.method) if isinstance(args.method, Mapping) else args.method
    if isinstance(given, dict) and "flops" not in given or named:
        Recipe.parse(given, **args.method_kwargs)
    return given


def _create(name: str, args: argparse.Namespace, num_classes: int, pretrained: bool, checkpoint: str) -> nn.Module:
    import timm

    if not timm.is_model(name):
        near = timm.list_models(f"*{name}*")[:5]
        raise ValueError(f"--model {name!r} is no timm model" + (f"; did you mean {', '.join(near)}?" if near else ""))
    options = {"drop_rate": args.drop, "drop_path_rate": args.drop_path, **args.model_kwargs}
    if args.img_size:
        options["img_size"] = args.img_size[0] if len(args.img_size) == 1 else tuple(args.img_size)
    model = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **options)
    if checkpoint:
        load_weights(model, checkpoint, "--initial-checkpoint", new_head=True)
    return model


def _asks(method: Any, args: argparse.Namespace) -> bool:
    """Whether losses of a method want a teacher, whatever the flags weigh."""
    methods = () if method is None else Recipe.parse(take_flops(method, None)[0], **args.method_kwargs).methods
    return any(isinstance(each, Learned) and each.asked() for each in methods)


def _teacher(
    args: argparse.Namespace, model: nn.Module, num_classes: int, device: torch.device, asks: bool
) -> nn.Module | None:
    if args.kd_model_name is None or not (args.kd_weight or args.kd_token_weight or asks):
        return None
    if args.kd_model_name == "unpatched" and not args.kd_checkpoint:
        teacher = copy.deepcopy(model)
    else:
        name = args.model if args.kd_model_name == "unpatched" else args.kd_model_name
        own = args if name == args.model else argparse.Namespace(**{**vars(args), "model_kwargs": {}})
        teacher = _create(name, own, num_classes, args.pretrained and not args.kd_checkpoint, args.kd_checkpoint)
        teacher = teacher.to(device)
    if is_patched(teacher):
        raise ValueError(f"the teacher {args.kd_model_name} is patched; distillation takes an unpatched one")
    return teacher.eval().requires_grad_(False)
