"""Putting a recipe onto a vision-language model and taking it off again, all or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..adapters.classes import path_of, refuse_derived
from ..adapters.registry import family_of
from ..adapters.swapping import become, dispatched
from ..adapters.wholes import Whole, register_whole
from ..apply.install import all_or_nothing
from ..apply.patch import patch_model, unpatch_model
from .budget_solving import solved
from .choosing import watch_tower
from .families.language_models import LAYERS, LMS, check_language_model
from .family import VLMFamily, vlm_family_of
from .lm import LmPlan
from .model import VlmPlan
from .plans import layer_plans
from .reading import unwatch
from .recipe import VlmRecipe
from .report import vlm_report


def patch(
    model: nn.Module,
    method: Any,
    *,
    prefill: float | None = None,
    text: int = 64,
    images: Sequence[int] | int | None = None,
    **options: Any,
) -> nn.Module:
    """Makes a vision-language model show its language model fewer visual rows, in place.

    Args:
        model: of a served family.
        method: see `VlmRecipe.parse`.
        prefill: share of the language model's multiply-adds of reading a prompt to land on; the strength of selector
            and droppers is solved for.
        text: rows of text of the prompt that counts for `prefill`.
        images: rows of each of its images; None for one image at the tower's own size.
        **options: of the method, and `positions`.

    Raises:
        TypeError: a model or a part of it that is not served.
        ValueError: unknown method or option, a budget that cannot be reached, or a model that is patched already.
    """
    if hasattr(model, "tokenzoo_recipe"):
        raise ValueError(
            f"{type(model).__name__} is patched already with {model.tokenzoo_recipe.to_dict()}; call "
            "tokenzoo.unpatch_model(model) first, or give all methods in one list"
        )
    family = vlm_family_of(model)
    _check(model, family)
    recipe = VlmRecipe.parse(method, **options)
    _check_recipe(model, family, recipe)
    if prefill is not None:
        _check_open(recipe, prefill)
        recipe = solved(model, family, recipe, prefill, text, images)
    inner = family.inner(model)
    lm = family.language_model(inner)
    plans = layer_plans(family, inner, recipe)
    with all_or_nothing(list(model.modules())):
        if recipe.tower is not None:  # in front of our hooks, which a tower would refuse as somebody's
            patch_model(family.vision_tower(inner), recipe.tower, dense=True)
        become(model, family.heads[type(model)])
        become(inner, family.models[type(inner)])
        inner.tokenzoo_plan = VlmPlan(family, recipe.selector)
        become(lm, LMS[type(lm)])
        lm.tokenzoo_plan = LmPlan(bool(recipe.droppers), recipe.positions, family.builds_masks)
        for layer, plan in zip(lm.layers, plans):
            become(layer, LAYERS[type(layer)])
            layer.tokenzoo_plan = plan
        if recipe.selector is not None:
            watch_tower(inner, family, recipe.selector)
        model.tokenzoo_recipe = recipe
    return model


def _check(model: nn.Module, family: VLMFamily) -> None:
    """Refuses models whose parts are not exactly known, before anything is changed."""
    inner = family.inner(model)
    if type(inner) not in family.models:
        raise TypeError(f"{path_of(type(inner))} inside {type(model).__name__} is not served")
    lm = family.language_model(inner)
    check_language_model(lm, "the language model")
    family.check(model)
    named = [("the model", model), ("its inner model", inner), ("the language model", lm)]
    named += [(f"layer {i} of the language model", layer) for i, layer in enumerate(lm.layers)]
    for name, module in named:
        refuse_derived(module, name)
        if "forward" in vars(module) and not dispatched(module):
            raise ValueError(
                f"{name} has a forward of its own on the instance, which would run in place of the patched one; take "
                "it off (del module.forward), patch, and set it on the patched model (torch.compile goes there too)"
            )


def _check_recipe(model: nn.Module, family: VLMFamily, recipe: VlmRecipe) -> None:
    """Refuses recipes that the model cannot follow.

    Raises:
        ValueError: renumbered positions where these are of frames, rows and columns; a selector that needs a class
            token on a tower without one; more rows than there are; methods inside a tower that is not served.
    """
    name, inner, selector = type(model).__name__, family.inner(model), recipe.selector
    if recipe.positions == "contiguous" and family.position_axes > 1:
        raise ValueError(
            f"positions='contiguous' renumbers rows, but those of {name} are placed by frame, row and column; use "
            "positions='original'"
        )
    if selector is not None and selector.class_row and not family.has_class(inner):
        raise ValueError(
            f"{selector.name} reads what the class token attends to, and the tower of {name} has none; use a selector "
            "that does without, such as fastervlm, which ranks by the mean attention received there"
        )
    if recipe.tower is not None and family_of(family.vision_tower(inner)) is None:
        raise ValueError(
            f"methods inside the tower of {name} ({', '.join(m.name for m in recipe.tower.methods)}) are not served: "
            f"its {type(family.vision_tower(inner)).__name__} packs images into one sequence; use selectors and "
            "droppers"
        )
    if isinstance(getattr(selector, "keep", None), int):
        most = family.fixed_rows(inner)
        if most is not None and selector.keep > most:
            raise ValueError(f"{selector.name}: keep={selector.keep}, but an image of {name} has {most} rows")


def _check_open(recipe: VlmRecipe, prefill: float) -> None:
    """Refuses budgets that `prefill=` would overwrite.

    Raises:
        ValueError: with the option that was given.
    """
    for part in (recipe.selector, *recipe.droppers):
        if part is None:
            continue
        most, options = part.dial(1.0), part.options()
        for name in options:
            value = getattr(part, name)
            if isinstance(value, tuple):  # says how many stages there are, too
                continue
            if value != options[name] and value != getattr(most, name):
                raise ValueError(
                    f"{part.name}: {name}={value!r} and prefill={prefill} both say how many rows stay; give one of them"
                )


def unpatch(model: nn.Module) -> nn.Module:
    """Takes the recipe off again, in place.

    Raises:
        ValueError: the model is not patched.
    """
    family = vlm_family_of(model)
    if not hasattr(model, "tokenzoo_recipe"):
        raise ValueError(f"{type(model).__name__} is not patched; there is nothing to take off")
    inner = family.inner(model)
    lm = family.language_model(inner)
    with all_or_nothing(list(model.modules())):
        unwatch(inner)
        if model.tokenzoo_recipe.tower is not None:
            unpatch_model(family.vision_tower(inner))
        for layer in lm.layers:
            del layer.tokenzoo_plan
            become(layer, _plain(LAYERS, layer))
        for module, classes in ((lm, LMS), (inner, family.models), (model, family.heads)):
            vars(module).pop("tokenzoo_plan", None)
            become(module, _plain(classes, module))
        del model.tokenzoo_recipe
    return model


def _plain(classes: Any, module: nn.Module) -> type:
    return next(plain for plain, kind in classes.items() if kind is type(module))


class _Vlm(Whole):
    """Vision-language models, as `tokenzoo.patch_model` and all behind it see them."""

    name = "vlm"

    def serves(self, model: nn.Module) -> bool:
        return vlm_family_of(model) is not None

    def patch(self, model: nn.Module, method: Any, **options: Any) -> nn.Module:
        return patch(model, method, **options)

    def unpatch(self, model: nn.Module) -> nn.Module:
        return unpatch(model)

    def report(self, model: nn.Module, **options: Any) -> Any:
        return vlm_report(model, **options)


register_whole(_Vlm())
