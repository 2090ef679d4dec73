"""What users put onto single modules of a model, and what a change of class would silently drop of it.

Patching gives a model, its blocks and their attention layers other classes. A method that was set on the instance
(`attn.forward = ...`, `model.forward = torch.compile(model.forward)`) comes in front of the class: set before patching
it runs the old class, set after patching it goes on running the reducing one. The dispatch hooks of accelerate stand
there too, and follow the class (`swapping.become`).
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .backbone import Family
from .swapping import dispatched, hooked


def reducing_modules(
    model: nn.Module, backbone: nn.Module, family: Family
) -> Iterator[tuple[str, nn.Module, type, type]]:
    """Modules that patching gives another class: (name, module, plain class, reducing class); patched or not.

    Args:
        model: where names begin; the backbone, or a model around it.
        backbone: the model that holds the blocks.
        family: the family that serves it.
    """
    names = {module: name for name, module in model.named_modules()}
    top = names.get(backbone, "")
    inner = {**family.blocks, **family.attentions}
    named = [(top, backbone, family.models)]
    for index, block in enumerate(family.view(backbone).served_blocks):
        own = names.get(block, f"blocks.{index}")
        named += [(f"{own}.{name}".rstrip("."), module, inner) for name, module in block.named_modules()]
    around = family.around_of(model)
    if around is not None and around.kind is not None:
        plain = next(old for old, known in family.around.items() if known is around)
        named.append(("", model, {plain: around.kind}))
    if family.parts:
        named += [(f"{top}.{name}".strip("."), module, family.parts) for name, module in backbone.named_modules()]
    for name, module, classes in named:
        for plain, reducing in classes.items():
            if type(module) in (plain, reducing):
                yield name, module, plain, reducing


def refuse_overrides(model: nn.Module, backbone: nn.Module, family: Family) -> None:
    """Refuses to patch a model with methods, or hooks, that the patched one would not run.

    Raises:
        ValueError: with the module and what to do.
    """
    for name, module, plain, reducing in reducing_modules(model, backbone, family):
        taken = _overridden(module, plain, reducing)
        if taken:
            raise ValueError(
                f"{_shown(model, name)}.{taken[0]} was set on the instance ({_about(module, taken[0])}), and a "
                f"patched model would run it instead of reducing tokens, or not at all; take it off "
                f"({_remedy(model, name, module, taken[0])}), patch, and set it on the patched model"
            )
    top = next((name for name, module in model.named_modules() if module is backbone), "")
    for name, module, instead in family.bypassed(backbone):
        name = f"{top}.{name}".strip(".")
        # offloading of what is inside does not need the module itself to be called
        harmless = dispatched(module) and not list(module.parameters(recurse=False))
        found = "a forward of its own" if "forward" in vars(module) and not harmless else None
        if hooked(module):
            found = "hooks"
        if found is not None:
            raise ValueError(
                f"{_shown(model, name)} has {found}, but a patched model runs its parts one by one and never calls "
                f"it as a whole; {instead}"
            )


def refuse_leftovers(model: nn.Module, backbone: nn.Module, family: Family) -> None:
    """Refuses to unpatch a model with methods that would go on running the reducing classes.

    Raises:
        ValueError: with the module and what to do.
    """
    for name, module, plain, reducing in reducing_modules(model, backbone, family):
        taken = _overridden(module, plain, reducing)
        if taken:
            raise ValueError(
                f"{_shown(model, name)}.{taken[0]} was set on the instance after patching "
                f"({_about(module, taken[0])}) and would go on reducing tokens; take it off first "
                f"({_remedy(model, name, module, taken[0])}), then unpatch"
            )


def _overridden(module: nn.Module, plain: type, reducing: type) -> list[str]:
    """Methods of the reducing class that the instance has a version of its own of."""
    changed = {"forward", "forward_head"}
    for cls in reducing.__mro__:
        if cls not in plain.__mro__:
            # numbers that a class gives by default are the instance's own to set
            changed |= {name for name, value in vars(cls).items() if hasattr(type(value), "__get__")}
    if dispatched(module):  # it follows the class
        changed -= {"forward"}
    return sorted((changed & vars(module).keys()), key=lambda name: (name != "forward", name))


def _shown(model: nn.Module, name: str) -> str:
    return f"{type(model).__name__}{'.' if name else ''}{name}"


def _about(module: nn.Module, name: str) -> str:
    if hasattr(module, "_hf_hook"):
        return f"by accelerate's {type(module._hf_hook).__name__}"
    value = vars(module)[name]
    while hasattr(value, "func"):  # partial
        value = value.func
    return getattr(value, "__qualname__", type(value).__name__)


def _remedy(model: nn.Module, name: str, module: nn.Module, attribute: str) -> str:
    if hasattr(module, "_hf_hook"):
        return "accelerate.hooks.remove_hook_from_module(model, recurse=True)"
    return f"del model{'.' if name else ''}{_indexed(name)}.{attribute}"


def _indexed(name: str) -> str:
    """`blocks.1.attn` as it is written in code."""
    parts = [f"[{part}]" if part.isdigit() else f".{part}" for part in name.split(".")] if name else []
    return "".join(parts).lstrip(".")
