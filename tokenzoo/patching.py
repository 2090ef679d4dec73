"""Putting a recipe onto a model and taking it off again."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from .adapters.block import BlockPlan, ReducingBlock
from .adapters.family import Family, families, find_family
from .adapters.model import BackboneInfo
from .methods.base import Method
from .recipes import Recipe, take_flops
from .registry import create_method, list_methods, method_class
from .tokens import Layout

_log = logging.getLogger(__name__)


def list_backbones() -> dict[str, list[str]]:
    """Served model classes by family."""
    return {family.name: [cls.__name__ for cls in family.models] for family in families()}


def backbone_of(model: nn.Module) -> nn.Module:
    """The module that holds the blocks: timm's `features_only` wrapper and dense models are looked through.

    Raises:
        TypeError: a wrapper that has to be patched before wrapping.
    """
    from timm.models._features import FeatureGetterNet

    if isinstance(model, FeatureGetterNet):
        return model.model
    inner = getattr(type(model), "tokenzoo_backbone", None)
    if inner is not None:  # a dense model names the backbone inside it
        return backbone_of(model.tokenzoo_backbone)
    name = type(model).__name__
    if name in ("DistributedDataParallel", "DataParallel", "OptimizedModule", "FullyShardedDataParallel"):
        raise TypeError(f"model is wrapped in {name}; patch the model first and wrap it afterwards")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {name}, not a torch.nn.Module")
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether a model carries a recipe."""
    return hasattr(backbone_of(model), "tokenzoo_recipe")


def describe(model: nn.Module, grid: tuple[int, int] | None = None, recipe: Recipe | None = None) -> BackboneInfo:
    """Depth, width and token layout of a served model.

    Args:
        model: patched or not.
        grid: patch grid; None for the model's own image size.
        recipe: decides which side data is tracked.
    """
    family = next((f for f in families() if type(model) in (*f.models, *f.models.values())), None)
    if family is not None and family.layout is not None:
        return BackboneInfo(len(model.blocks), model.embed_dim, family.layout(model))
    if family is not None and family.sequences is not None:
        layouts = family.sequences(model, grid, recipe)
        return BackboneInfo(len(model.blocks), model.embed_dim, layouts.pop(0), layouts)
    if grid is None:
        grid = model.patch_embed.grid_size
        if grid is None:
            raise ValueError(
                f"{type(model).__name__}.patch_embed has no grid size; call model.set_input_size(img_size=...) first"
            )
    size = recipe is not None and recipe.track_size
    positions = recipe is not None and recipe.track_positions
    keep = recipe is not None and recipe.keeps_trace
    added = 0 if recipe is None else recipe.protect
    prefix = model.num_prefix_tokens + added
    layout = Layout(prefix, model.cls_token is not None, tuple(grid), size, positions, keep_values=keep, added=added)
    return BackboneInfo(len(model.blocks), model.embed_dim, layout)


def patch_model(model: nn.Module, method: Any, *, flops: float | None = None, **options: Any) -> nn.Module:
    """Makes a model reduce tokens, in place; weights and their names stay as they are.

    Args:
        model: a timm model of a served family, or timm's `features_only` wrapper of one.
        method: a name, a method object, a list of them (composition), a dict, or the path of a YAML recipe.
        flops: share of the unpatched model's multiply-adds to land on, at the model's own image size; the strength of
            the method is solved for. A dict or file may hold it too.
        **options: options of the method, and `merged_positions`, `dense` (forward_features gives all tokens back),
            `fill` (what dropped tokens get then) and `protect` (tokens added behind the prefix, such as prompts), see
            `tokenzoo.recipes.Recipe`.

    Returns:
        The same model.

    Raises:
        TypeError: a model, block or attention class that is not served.
        ValueError: unknown method or option, a strength or budget that cannot be reached, a model already patched.
    """
    backbone = backbone_of(model)
    if hasattr(backbone, "tokenzoo_recipe"):
        raise ValueError(
            f"{type(backbone).__name__} is patched already with {backbone.tokenzoo_recipe.to_dict()}; call "
            "tokenzoo.unpatch_model(model) first, or give all methods in one list"
        )
    family = find_family(backbone)
    _check(backbone, family)
    method, flops = take_flops(method, flops)
    recipe = Recipe.parse(method, **options)
    info = describe(backbone, recipe=recipe)
    _check_recipe(recipe, info, type(backbone).__name__, family)
    family.check_recipe(backbone, recipe)
    if flops is not None:
        from .solving import solve_flops

        recipe = solve_flops(backbone, family, recipe, info, flops)
    recipe.token_counts(info.depth, info.layout, info.restarts)  # raises for strengths that cannot be reached
    _check_branches(backbone, family, recipe)
    _install(backbone, family, recipe, info)
    return model


def _check(backbone: nn.Module, family: Family) -> None:
    """Refuses models whose parts are not exactly known, before anything is changed."""
    family.check(backbone)
    if len(backbone.blocks) == 0:
        raise ValueError(f"{type(backbone).__name__}.blocks is empty: there is no block to patch")
    for index, block in enumerate(backbone.blocks):
        if type(block) not in family.blocks:
            raise TypeError(
                f"blocks.{index} is {type(block).__module__}.{type(block).__qualname__}, which the {family.name} "
                f"family does not serve; it serves exactly {', '.join(cls.__name__ for cls in family.blocks)}"
            )
        inner = family.check_block(block)
        if inner is not None:
            raise TypeError(
                f"blocks.{index} attends with {type(inner).__module__}.{type(inner).__qualname__}, which the "
                f"{family.name} family does not know; use timm's own attention layers"
            )


def _check_recipe(recipe: Recipe, info: BackboneInfo, name: str, family: Family) -> None:
    if not recipe.steps(info.depth) and all(m.layers in ((), "others") for m in recipe.methods):
        raise ValueError(
            f"the recipe {recipe.to_dict()} acts in no block of {name}; name layers from 0 to {info.depth - 1}"
        )
    if recipe.protect and (family.layout is not None or family.sequences is not None):
        raise ValueError(
            f"protect={recipe.protect}: the sequence of {name} has no place for added tokens, since its blocks see "
            "windows, stages or a scan; leave protect out"
        )
    for method in recipe.methods:
        _check_mixing(method, name, family)
        for layout in (info.layout, *(info.restarts or {}).values()):
            method.check(layout, name)
        method.check_recipe(recipe.methods, info.depth)


def _check_mixing(method: Method, name: str, family: Family) -> None:
    """Refuses methods that look at attention on models that scan, and the other way round."""
    if method.reads_scan and not family.scans:
        scanning = ", ".join(cls.__name__ for f in families() if f.scans for cls in f.models)
        raise ValueError(
            f"{method.name} looks into the scan of a block, and {name} has none; it works on {scanning} (for models "
            "that attend see evit, topk or tome)"
        )
    if family.scans and not method.serves_scans:
        served = [other for other in list_methods() if method_class(other)().serves_scans]
        raise ValueError(
            f"{method.name} looks at attention or changes it, and {name} has none: its tokens are scanned; use one of "
            f"{', '.join(served)}"
        )


def _check_branches(backbone: nn.Module, family: Family, recipe: Recipe) -> None:
    """Refuses what needs a branch of its own where attention and MLP share one."""
    for index, steps in recipe.steps(len(backbone.blocks)).items():
        for step in steps:
            block = backbone.blocks[index]
            if step.method.place != "around" or family.blocks[type(block)].mlp_follows:
                continue
            if "attention" not in step.method.branches:
                raise step.error(
                    f"branches={step.method.branches}, but the MLP of {type(block).__name__} runs beside attention; "
                    "add 'attention' to the branches"
                )
            if step.method.replaces_attention:
                raise step.error(
                    f"the attention of {type(block).__name__} cannot be replaced, since its MLP runs in the same "
                    "branch; use a model whose blocks keep the two apart"
                )


def _install(backbone: nn.Module, family: Family, recipe: Recipe, info: BackboneInfo) -> None:
    steps = recipe.steps(info.depth)
    new: list[str] = []
    backbone.__class__ = family.models[type(backbone)]
    backbone.tokenzoo_recipe = recipe
    for index, block in enumerate(backbone.blocks):
        block.__class__ = family.blocks[type(block)]
        kept = []
        for step in steps.get(index, ()):
            width = block.shape().dim if isinstance(block, ReducingBlock) else info.dim
            module = step.method.module(width, step)
            if module is None:
                kept.append(step._replace(key=None))
                continue
            like = next(block.parameters())
            block.add_module(step.key, module.to(like.device, like.dtype).train(block.training))
            new += [f"blocks.{index}.{step.key}.{name}" for name, _ in module.named_parameters()]
            kept.append(step)
        layout, stop = info.sequence(index)
        block.tokenzoo = BlockPlan(index, stop, tuple(kept), recipe.proportional, layout)
        if family.sequences is not None:  # such blocks go back to the full map themselves
            block.tokenzoo_recipe = recipe
    if new:
        _log.warning("%d new parameters are untrained: %s", len(new), ", ".join(new))


def unpatch_model(model: nn.Module) -> nn.Module:
    """Takes the recipe off again, in place; outputs are bit-equal to those before patching.

    Raises:
        ValueError: the model is not patched.
    """
    backbone = backbone_of(model)
    if not hasattr(backbone, "tokenzoo_recipe"):
        raise ValueError(f"{type(backbone).__name__} is not patched; there is nothing to take off")
    family = next(f for f in families() if type(backbone) in f.models.values())
    plain_models = {new: old for old, new in family.models.items()}
    plain_blocks = {new: old for old, new in family.blocks.items()}
    for block in backbone.blocks:
        for step in block.tokenzoo.steps:
            if step.key is not None:
                delattr(block, step.key)
        del block.tokenzoo
        if family.sequences is not None:
            del block.tokenzoo_recipe
        block.__class__ = plain_blocks[type(block)]
    del backbone.tokenzoo_recipe
    backbone.__class__ = plain_models[type(backbone)]
    return model


@contextmanager
def patched(model: nn.Module, method: Any, **options: Any) -> Iterator[nn.Module]:
    """Context in which a model is patched; arguments as for `patch_model`."""
    patch_model(model, method, **options)
    try:
        yield model
    finally:
        if is_patched(model):
            unpatch_model(model)


def recipe(model: nn.Module) -> dict[str, Any]:
    """The recipe of a patched model as a flat dict that `patch_model` takes back; JSON and YAML safe.

    Raises:
        ValueError: the model is not patched.
    """
    backbone = backbone_of(model)
    if not hasattr(backbone, "tokenzoo_recipe"):
        raise ValueError(f"{type(backbone).__name__} is not patched; it has no recipe")
    return backbone.tokenzoo_recipe.to_dict()


def update_method(model: nn.Module, method: str | None = None, **options: Any) -> nn.Module:
    """Changes options of a patched model's method between two forward passes, for instance a keep rate during training.

    Args:
        model: a patched model.
        method: which method of the recipe, needed only when there are several.
        **options: the options to change.

    Raises:
        ValueError: not patched, an unknown option, a strength that cannot be reached, or a method with parameters.
    """
    backbone = backbone_of(model)
    if not hasattr(backbone, "tokenzoo_recipe"):
        raise ValueError(f"{type(backbone).__name__} is not patched; call tokenzoo.patch_model first")
    old = backbone.tokenzoo_recipe
    names = [m.name for m in old.methods]
    if method is None and len(names) > 1:
        raise ValueError(f"the recipe holds {', '.join(names)}; say which one with method='...'")
    chosen = names[0] if method is None else method
    if names.count(chosen) != 1:
        raise ValueError(f"the recipe holds {', '.join(names)}; {chosen!r} does not name exactly one of them")
    create_method(chosen, **options)  # reports unknown options
    methods = tuple(replace(m, **options) if m.name == chosen else m for m in old.methods)
    new = replace(old, methods=methods)
    info = describe(backbone, recipe=new)
    family = next(f for f in families() if type(backbone) in f.models.values())
    _check_recipe(new, info, type(backbone).__name__, family)
    family.check_recipe(backbone, new)
    new.token_counts(info.depth, info.layout, info.restarts)
    steps = new.steps(info.depth)
    keys = {(s.block, s.key) for block in backbone.blocks for s in block.tokenzoo.steps if s.key}
    if keys:
        raise ValueError(f"{chosen} keeps learned modules in its blocks; unpatch and patch again to change its options")
    backbone.tokenzoo_recipe = new
    for index, block in enumerate(backbone.blocks):
        kept = tuple(s._replace(key=None) for s in steps.get(index, ()))
        layout = info.sequence(index)[0]
        block.tokenzoo = block.tokenzoo._replace(steps=kept, proportional=new.proportional, layout=layout)
        if family.sequences is not None:
            block.tokenzoo_recipe = new
    return model
