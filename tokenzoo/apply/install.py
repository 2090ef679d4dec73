"""What patching changes in a model: prepared first, then done all or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from ..adapters.backbone import BackboneInfo, Family
from ..adapters.block import OUTSIDE, BlockPlan
from ..adapters.classes import class_of, refuse_derived
from ..adapters.inspect import blocks_of
from ..adapters.swapping import become, swap_classes
from ..core.mixins import Shaped
from ..core.recipe import Placed, Recipe
from ..core.step import BlockShape, Step
from ..core.tokens import Layout


def _module_of(shape: BlockShape, layout: Layout, step: Step) -> nn.Module | None:
    """The learned module of a step in a block, None for none."""
    method = step.method
    return method.module_of(shape, layout, step) if isinstance(method, Shaped) else method.module(shape.dim, step)


class Change(NamedTuple):
    """What one block gets.

    Attributes:
        block: the block, without what is wrapped around it.
        kind: its reducing class.
        plan: what it does about tokens.
        modules: learned modules of its methods by name.
    """

    block: nn.Module
    kind: type
    plan: BlockPlan
    modules: dict[str, nn.Module]


def prepare(
    backbone: nn.Module, family: Family, recipe: Recipe, info: BackboneInfo, total: int, names: list[str]
) -> list[Change]:
    """Works out what every block gets; the model is not touched.

    Args:
        backbone: patched or not.
        family: the family that serves it.
        recipe: the recipe.
        info: the model as it is.
        total: blocks that the recipe is for; the model may have lost some of them since it was patched.
        names: of the blocks.

    Raises:
        ValueError: a strength that cannot be reached.
    """
    steps = recipe.steps(total)
    counts = Placed.of(recipe, steps).token_counts(info.depth, info.layout, info.restarts)
    padded = any(method.pads for method in recipe.methods)
    changes = []
    for index, (block, row) in enumerate(zip(blocks_of(backbone), counts)):
        layout, stop = info.sequence(index)
        kind, modules, kept = family.block_kind(block), {}, []
        for step, n, n_out in row:
            step = step.resolved(n, n_out, layout, padded)  # modules may have a row per token that is left
            module = _module_of(family.block_view(block).shape(), layout, step)
            if module is not None:
                like = next(block.parameters())
                modules[step.key] = module.to(like.device, like.dtype).train(block.training)
            kept.append(step if module is not None else step._replace(key=None))
        plan = BlockPlan(index, stop, tuple(kept), recipe.proportional, layout, total=total, name=names[index])
        changes.append(Change(block, kind, plan, modules))
    acting = [step for change in changes for step in change.plan.steps]
    acting += [step._replace(key=None) for index in range(len(changes), total) for step in steps.get(index, ())]
    outside = tuple(step for step in acting if step.method.place in OUTSIDE)
    return [change._replace(plan=change.plan._replace(outside=outside)) for change in changes]


def keep_modules(changes: list[Change], method: str) -> list[Change]:
    """The same changes with the learned modules that the blocks hold left in place.

    Args:
        changes: with modules as a new patching would make them.
        method: name of the method whose options change, for the message.

    Raises:
        ValueError: a module of another form, or one more.
    """
    for change in changes:
        for name, module in change.modules.items():
            if _form(getattr(change.block, name, None)) != _form(module):
                raise ValueError(
                    f"{method} keeps learned modules in its blocks; unpatch and patch again to change its options: "
                    f"with these, {name} of block {change.plan.index} would be another one"
                )
    return [change._replace(modules={}) for change in changes]


def _form(module: nn.Module | None) -> Any:
    """What two modules have in common if one can go on with the weights of the other."""
    return None if module is None else {name: tuple(value.shape) for name, value in module.state_dict().items()}


def install(
    backbone: nn.Module, family: Family, recipe: Recipe, changes: list[Change], model: nn.Module | None = None
) -> list[str]:
    """Puts a prepared recipe onto a model that may carry another one already.

    Args:
        backbone: the model that holds the blocks.
        family: the family that serves it.
        recipe: the recipe.
        changes: what every block gets.
        model: what is around the backbone, where the family knows it.

    Returns:
        Names of new parameters.
    """
    kind = family.model_kind(backbone)
    around = None if model is None else family.around_of(model)
    with all_or_nothing([*([] if model is None else [model]), *backbone.modules()]):
        if around is not None and around.kind is not None and class_of(model) is not around.kind:
            become(model, around.kind)
        for change in changes:
            block = change.block
            if class_of(block) is not change.kind:
                become(block, change.kind)
                swap_classes(block, family.attentions)
            for name, module in change.modules.items():
                block.add_module(name, module)
            block.tokenzoo = change.plan
            if change.kind.reads_recipe:
                block.tokenzoo_recipe = recipe
        backbone.tokenzoo_recipe = recipe
        if class_of(backbone) is not kind:
            become(backbone, kind)
            swap_classes(backbone, family.parts)
    return [
        f"{change.plan.name}.{key}.{name}"
        for change in changes
        for key, module in change.modules.items()
        for name, _ in module.named_parameters()
    ]


def remove(backbone: nn.Module, family: Family, model: nn.Module | None = None) -> None:
    """Takes the recipe off a model.

    Args:
        backbone: the model that holds the blocks.
        family: the family that serves it.
        model: what is around the backbone, where the family knows it.

    Raises:
        TypeError: torch has changed the class of the model or of a block since.
    """
    blocks = blocks_of(backbone)
    refuse_derived(backbone, "the model")
    for block in blocks:
        refuse_derived(block, block.tokenzoo.name)
        for name, part in block.named_modules():
            if class_of(part) in family.attentions.values():
                refuse_derived(part, f"{block.tokenzoo.name}.{name}")
    plain_models = {new: old for old, new in family.models.items()}
    plain_blocks = {new: old for old, new in family.blocks.items()}
    plain_attentions = {new: old for old, new in family.attentions.items()}
    plain_around = {known.kind: old for old, known in family.around.items() if known.kind is not None}
    with all_or_nothing([*([] if model is None else [model]), *backbone.modules()]):
        if type(model) in plain_around:
            become(model, plain_around[type(model)])
        for block in blocks:
            # a learned module stays where an update left its method nothing to do
            for name in [name for name, _ in block.named_children() if name.startswith("tokenzoo_")]:
                delattr(block, name)
            del block.tokenzoo
            if block.reads_recipe:
                del block.tokenzoo_recipe
            become(block, plain_blocks[type(block)])
            swap_classes(block, plain_attentions)
        swap_classes(backbone, {new: old for old, new in family.parts.items()})
        del backbone.tokenzoo_recipe
        become(backbone, plain_models[type(backbone)])


@contextmanager
def all_or_nothing(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Gives modules back their classes, attributes and children if anything raises inside."""
    kept = [(module, type(module), dict(vars(module)), dict(module._modules)) for module in modules]
    try:
        yield
    except BaseException:
        for module, cls, attributes, children in kept:
            if type(module) is not cls:
                module.__class__ = cls
            vars(module).clear()
            vars(module).update(attributes)
            module._modules.clear()
            module._modules.update(children)
        raise
