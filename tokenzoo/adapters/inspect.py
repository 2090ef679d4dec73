"""What a served model is: its layout, the steps of its blocks, whether it is patched."""

from __future__ import annotations

from torch import nn

from ..core.method import Step
from ..core.recipe import Recipe
from .backbone import BackboneInfo
from .classes import unwrapped
from .registry import families, find_family, load_installed
from .wholes import whole_of
from .wrappers import backbone_of, known_of


def list_backbones() -> dict[str, list[str]]:
    """Served model classes by family, of all packages that are installed."""
    load_installed()
    return {family.name: [cls.__name__ for cls in family.models] for family in families()}


def is_patched(model: nn.Module) -> bool:
    """Whether a model carries a recipe."""
    known = known_of(model)
    return hasattr(known if whole_of(known) is not None else backbone_of(model), "tokenzoo_recipe")


def describe(model: nn.Module, grid: tuple[int, int] | None = None, recipe: Recipe | None = None) -> BackboneInfo:
    """Depth and token layout of a served model.

    Args:
        model: patched or not.
        grid: patch grid; None for the model's own image size.
        recipe: decides which side data is tracked.
    """
    view = find_family(model).view(model)
    grid = view.own_grid if grid is None else tuple(grid)
    layouts = view.sequences(grid, recipe)
    return BackboneInfo(len(view.served_blocks), layouts[0], {i: layouts[i] for i in layouts if i > 0}, grid)


def total_blocks(backbone: nn.Module) -> int:
    """Blocks that a patched model had when it was patched; `prune_intermediate_layers` may have taken some since."""
    plans = [block.tokenzoo for block in blocks_of(backbone)]
    return plans[0].total if plans else 0


def running_steps(backbone: nn.Module) -> dict[int, tuple[Step, ...]]:
    """The steps of every block of a patched model that runs, and behind the last one those after the final norm."""
    plans = [block.tokenzoo for block in blocks_of(backbone)]
    steps = {i: tuple(s for s in plan.steps if s.method.place != "norm") for i, plan in enumerate(plans)}
    if plans:
        steps[len(plans) - 1] += plans[-1].at("norm")
    return steps


def block_names(model: nn.Module) -> list[str]:
    """Where the blocks are in a model, as its own modules are called: "blocks.3", "vision_model.encoder.layers.3".

    Args:
        model: patched or not; names begin at the backbone inside it, unless a family serves what is around that too.
    """
    names = {module: name for name, module in known_of(model).named_modules()}
    blocks = find_family(backbone_of(model)).view(backbone_of(model)).served_blocks
    return [names.get(block, f"blocks.{index}") for index, block in enumerate(blocks)]


def blocks_of(backbone: nn.Module) -> list[nn.Module]:
    """The blocks of a model that run, without what is wrapped around them."""
    return [unwrapped(block) for block in find_family(backbone).view(backbone).served_blocks]
