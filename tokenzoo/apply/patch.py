"""Putting a recipe onto a model and taking it off again."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..adapters.backbone import BackboneInfo, Family
from ..adapters.classes import path_of, refuse_derived, refuse_wrapped
from ..adapters.inspect import block_names, blocks_of, describe, is_patched, total_blocks
from ..adapters.overrides import refuse_leftovers, refuse_overrides
from ..adapters.registry import families, find_family, refuse_around
from ..adapters.wholes import whole_of
from ..adapters.wrappers import backbone_of, backbone_to_patch, known_of
from ..core.learned import Learned
from ..core.method import Method
from ..core.mixins import Companion
from ..core.recipe import Recipe, take_flops
from ..core.registry import check_options, declaring
from .expected import solve_expected
from .install import Change, install, keep_modules, prepare, remove
from .solve import check_share, solve_flops

_log = logging.getLogger(__name__)
M = TypeVar("M", bound=nn.Module)


def patch_model(
    model: M, method: Any, *, flops: float | None = None, images: Tensor | None = None, **options: Any
) -> M:
    """Makes a model reduce tokens, in place; weights and their names stay as they are.

    Args:
        model: a model of a served family, or what is around one: models that the family knows (a classifier, a CLIP
            model), peft, timm's `features_only` wrapper, a dense model.
        method: a name, a method object, a list of them (composition), a dict, or the path of a YAML recipe.
        flops: share of the unpatched model's multiply-adds to land on, at the model's own image size; the strength of
            the method is solved for. A dict or file may hold it too.
        images: normalised images [B, C, H, W], some dozens. The method is put on in the form in which the images decide
            how many tokens stay, and `flops` is what these images cost on average (`tokenzoo.expected_share`).
        **options: options of the method, and `merged_positions`, `dense` (forward_features gives all tokens back),
            `fill` (what dropped tokens get then), `protect` (tokens added behind the prefix, such as prompts) and
            `order` ("raster": patches stand row by row after every reduction), see `tokenzoo.core.recipe.Recipe`.

    Returns:
        The same model.

    Raises:
        TypeError: a model, block or attention class that is not served.
        ValueError: unknown method or option, a strength or budget that cannot be reached, a model already patched, a
            method set on the instance (`attn.forward = ...`) or hooks that a patched model would not run.
    """
    whole = whole_of(known_of(model))
    if whole is not None:
        if flops is not None:
            raise ValueError(f"flops={flops}: a {whole.name} is dialled by prefill=, the share of reading a prompt")
        whole.patch(known_of(model), method, **options if images is None else {"images": images, **options})
        return model
    new = put_on(model, method, flops, images, **options)
    if new:
        places = dict.fromkeys(re.sub(r"(tokenzoo_\w+)\..*", r"\1", name) for name in new)
        _log.warning("%d new parameters are untrained, in %s", len(new), ", ".join(places))
    return model


def put_on(
    model: nn.Module, method: Any, flops: float | None = None, images: Tensor | None = None, **options: Any
) -> list[str]:
    """What `patch_model` does; returns the names of new parameters, without a word about them."""
    backbone = backbone_to_patch(model)
    if hasattr(backbone, "tokenzoo_recipe"):
        raise ValueError(
            f"{type(backbone).__name__} is patched already with {backbone.tokenzoo_recipe.to_dict()}; call "
            "tokenzoo.unpatch_model(model) first, or give all methods in one list"
        )
    family = find_family(backbone)
    names = block_names(model)
    _check(known_of(model), backbone, family, names)
    method, flops = take_flops(method, flops)
    recipe = Recipe.parse(method, **options)
    info = describe(backbone, recipe=recipe)
    if flops is not None and images is None:
        recipe = _solved(backbone, family, recipe, info, flops)
    elif images is not None:
        recipe = _solved_on(model, backbone, family, recipe, info, flops, images)
    return install(backbone, family, recipe, _prepared(backbone, family, recipe, info, names), known_of(model))


def solve(model: nn.Module, recipe: Recipe, flops: float, img_size: tuple[int, int] | None = None) -> Recipe:
    """The recipe at the largest multiply-adds that a budget allows; the model is not patched.

    Args:
        model: as for `patch_model`, unpatched.
        recipe: methods whose strength is solved for, all at the same relative strength (`Recipe.dial`).
        flops: share of the unpatched model's multiply-adds that may be spent at most.
        img_size: image (height, width) that counts; None for the model's own.

    Raises:
        ValueError, TypeError: as for `patch_model`.
    """
    backbone = backbone_of(model)
    family = find_family(backbone)
    _check(known_of(model), backbone, family, block_names(model))
    grid = None if img_size is None else tuple(family.view(backbone).grid_of(img_size))
    return _solved(backbone, family, recipe, describe(backbone, grid, recipe), flops, at_most=True)


def _solved(
    backbone: nn.Module, family: Family, recipe: Recipe, info: BackboneInfo, flops: float, at_most: bool = False
) -> Recipe:
    _check_recipe(backbone, family, recipe, info, info.depth)
    return solve_flops(backbone, family, recipe, info, flops, at_most)


def _solved_on(
    model: nn.Module,
    backbone: nn.Module,
    family: Family,
    recipe: Recipe,
    info: BackboneInfo,
    flops: float | None,
    images: Tensor,
) -> Recipe:
    """The recipe in its image-dependent form, solved for what images cost on average."""
    if flops is None:
        raise ValueError("images are what flops=... is measured on; give both, or leave images out")
    check_share(flops)
    _check_recipe(backbone, family, recipe, info, info.depth)
    training = model.training
    try:
        return solve_expected(model.eval(), recipe, flops, images, patched)[1]
    finally:
        model.train(training)


def _prepared(
    backbone: nn.Module, family: Family, recipe: Recipe, info: BackboneInfo, names: list[str], total: int | None = None
) -> list[Change]:
    """What every block gets, after all checks; nothing is changed."""
    total = info.depth if total is None else total
    _check_recipe(backbone, family, recipe, info, total)
    changes = prepare(backbone, family, recipe, info, total, names)  # raises for strengths that cannot be reached
    _check_branches(changes)
    return changes


def _check(model: nn.Module, backbone: nn.Module, family: Family, names: list[str]) -> None:
    """Refuses models whose parts are not exactly known, before anything is changed."""
    refuse_derived(model, "the model")
    refuse_derived(backbone, "the model")
    blocks = family.view(backbone).served_blocks
    for name, block in zip(names, blocks):
        refuse_wrapped(block, name)
        refuse_derived(block, name)
    family.check(backbone)
    if len(blocks) == 0:
        raise ValueError(f"{type(backbone).__name__}.blocks is empty: there is no block to patch")
    for name, block in zip(names, blocks):
        if type(block) not in family.blocks:
            raise TypeError(
                f"{name} is {path_of(type(block))}, which the {family.name} family does not serve; it serves "
                f"exactly {', '.join(map(path_of, family.blocks))}"
            )
        inner = family.unknown_part(block)
        if inner is not None:
            refuse_derived(inner, f"a part of {name}")
            raise TypeError(
                f"{name} attends with {path_of(type(inner))}, which the {family.name} family does not know; "
                f"use {' or '.join(map(path_of, family.attentions)) or 'the layers that the model comes with'}"
            )
    refuse_overrides(model, backbone, family)


def _check_recipe(backbone: nn.Module, family: Family, recipe: Recipe, info: BackboneInfo, total: int) -> None:
    """Refuses recipes that the model cannot follow."""
    name = type(backbone).__name__
    if not recipe.steps(total) and all(m.layers in ((), "others") for m in recipe.methods):
        raise ValueError(f"the recipe {recipe.to_dict()} acts in no block of {name}; name layers from 0 to {total - 1}")
    if recipe.protect and not family.model_kind(backbone).takes_added:
        raise ValueError(
            f"protect={recipe.protect}: the sequence of {name} has no place for added tokens, since its blocks see "
            "windows, stages or a scan, or its features are maps; leave protect out"
        )
    for method in recipe.methods:
        _check_mixing(method, name, family)
        if isinstance(method, Learned) and method.gates and not family.model_kind(backbone).takes_gates:
            raise ValueError(
                f"{method.name} learns through gates in attention, which the training of {name} does not carry from "
                "block to block (windows, stages or a scan); use a plain transformer"
            )
        for layout in (info.layout, *info.restarts.values()):
            method.check(layout, name)
        if isinstance(method, Companion):
            method.check_recipe(recipe.methods, total)
    if total == info.depth:  # else it was checked on the whole model
        family.check_recipe(backbone, recipe)


def _check_mixing(method: Method, name: str, family: Family) -> None:
    """Refuses methods that look at attention on models that scan, and the other way round."""
    if method.reads_scan and not family.scans:
        scanning = ", ".join(cls.__name__ for f in families() if f.scans for cls in f.models)
        raise ValueError(
            f"{method.name} looks into the scan of a block, and {name} has none; it works on {scanning} (for models "
            "that attend see evit, topk or tome)"
        )
    if family.scans and not method.serves_scans:
        raise ValueError(
            f"{method.name} looks at attention or changes it, and {name} has none: its tokens are scanned; use one of "
            f"{', '.join(declaring('serves_scans'))}"
        )


def _check_branches(changes: list[Change]) -> None:
    """Refuses what needs a branch of its own where attention and MLP share one."""
    for change in changes:
        name = type(change.block).__name__
        for step in change.plan.steps:
            if step.method.place != "around" or change.kind.mlp_follows:
                continue
            if "attention" not in step.branches:
                raise step.error(
                    f"branches={step.branches}, but the MLP of {name} runs beside attention; add 'attention' to "
                    "the branches"
                )
            if step.method.replaces_attention:
                raise step.error(
                    f"the attention of {name} cannot be replaced, since its MLP runs in the same branch; use a model "
                    "whose blocks keep the two apart"
                )


def unpatch_model(model: M) -> M:
    """Takes the recipe off again, in place; outputs are bit-equal to those before patching.

    Raises:
        ValueError: the model is not patched, or a method was set on it since that would go on reducing tokens.
    """
    whole = whole_of(known_of(model))
    if whole is not None:
        whole.unpatch(known_of(model))
        return model
    backbone = _patched_backbone(model, "there is nothing to take off")
    family = find_family(backbone)
    refuse_leftovers(known_of(model), backbone, family)
    remove(backbone, family, known_of(model))
    return model


def _patched_backbone(model: nn.Module, remedy: str) -> nn.Module:
    """The backbone of a patched model."""
    backbone = backbone_of(model)
    if not hasattr(backbone, "tokenzoo_recipe"):
        refuse_around(backbone)
        raise ValueError(f"{type(backbone).__name__} is not patched; {remedy}")
    return backbone


@contextmanager
def patched(model: M, method: Any, **options: Any) -> Iterator[M]:
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
    known = known_of(model)
    if whole_of(known) is not None and hasattr(known, "tokenzoo_recipe"):
        return known.tokenzoo_recipe.to_dict()
    backbone = _patched_backbone(model, "it has no recipe")
    held, total = backbone.tokenzoo_recipe, total_blocks(backbone)
    left = len(blocks_of(backbone))
    return (held if left == total else held.cut(total, left)).to_dict()


def update_method(model: M, method: str | None = None, **options: Any) -> M:
    """Changes options of a patched model's method between two forward passes, for instance a keep rate during training.

    Learned modules stay in place, with their weights; options that would make others are refused.

    Args:
        model: a patched model.
        method: which method of the recipe, needed only when there are several.
        **options: the options to change.

    Raises:
        ValueError: not patched, an unknown option, a strength that cannot be reached, or learned modules of another
            form.
    """
    backbone = _patched_backbone(model, "call tokenzoo.patch_model first")
    old = backbone.tokenzoo_recipe
    names = [m.name for m in old.methods]
    if method is None and len(names) > 1:
        raise ValueError(f"the recipe holds {', '.join(names)}; say which one with method='...'")
    chosen = names[0] if method is None else method
    if names.count(chosen) != 1:
        raise ValueError(f"the recipe holds {', '.join(names)}; {chosen!r} does not name exactly one of them")
    changed = old.methods[names.index(chosen)]
    check_options(chosen, type(changed), options)
    new = replace(old, methods=tuple(replace(m, **options) if m is changed else m for m in old.methods))
    family, info = find_family(backbone), describe(backbone, recipe=new)
    with torch.random.fork_rng(devices=[]):  # modules that are made to be compared draw weights
        changes = _prepared(backbone, family, new, info, block_names(model), total_blocks(backbone))
    install(backbone, family, new, keep_modules(changes, chosen), known_of(model))
    return model
