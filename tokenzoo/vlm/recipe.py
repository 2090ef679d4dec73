"""Recipes for vision-language models: methods of the tower, one selector, droppers, and what holds for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.method import Method
from ..core.recipe import Recipe
from ..core.recipe_files import read_yaml
from ..core.registry import list_methods
from .base import POSITIONS, Dropper, Selector
from .registry import create, find, list_droppers, list_selectors

TOWER = "tower:"  # in front of a name that both a method of towers and a selector have


@dataclass(frozen=True)
class VlmRecipe:
    """What is done in a vision-language model.

    Args:
        tower: methods inside the vision tower, None for none.
        selector: chooses the rows that the language model sees, None keeps all.
        droppers: drop rows between layers of the language model, in list order in front of the same layer.
        positions: "original": rows that are left keep their positions; "contiguous": they are renumbered.
    """

    tower: Recipe | None = None
    selector: Selector | None = None
    droppers: tuple[Dropper, ...] = ()
    positions: str = "original"

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS:
            raise ValueError(f"positions={self.positions!r}; use one of {POSITIONS}")
        if self.tower is None and self.selector is None and not self.droppers:
            raise ValueError("a recipe needs at least one method, selector or dropper; see docs/vlm.md")

    def dial(self, t: float) -> VlmRecipe:
        """The same recipe with its selector and droppers at relative strength t in [0, 1]; the tower stays."""
        selector = None if self.selector is None else self.selector.dial(t)
        return replace(self, selector=selector, droppers=tuple(d.dial(t) for d in self.droppers))

    def to_dict(self) -> dict[str, Any]:
        """A flat dict that `VlmRecipe.parse` and `patch_model` take back; JSON and YAML safe."""
        parts: list[dict[str, Any]] = []
        if self.tower is not None:
            tower = self.tower.to_dict()
            if isinstance(tower["method"], list):
                inner = [{**each, "method": _told_apart(each["method"])} for each in tower["method"]]
                parts += inner if len(tower) == 1 else [{**tower, "method": inner}]
            else:
                parts.append({**tower, "method": _told_apart(tower["method"])})
        parts += [] if self.selector is None else [self.selector.to_dict()]
        parts += [dropper.to_dict() for dropper in self.droppers]
        extra = {} if self.positions == "original" else {"positions": self.positions}
        return {**parts[0], **extra} if len(parts) == 1 else {"method": parts, **extra}

    @classmethod
    def parse(cls, method: Any, **options: Any) -> VlmRecipe:
        """Reads a recipe from a name, an object, a list of those, a dict, a YAML file, or a recipe.

        A name that both a selector and a method of towers have ("random") is the selector; "tower:random" is the other.

        Args:
            method: "fastervlm", FasterVLM(keep=64), [ToMe(r=8), "fastv"], {"method": "fastervlm", "keep": 64}, a file.
            **options: of the method where it is given by name, and `positions`.

        Raises:
            ValueError, TypeError: with the offending name, value or line.
        """
        common = {key: options.pop(key) for key in ("positions",) if key in options}
        if isinstance(method, VlmRecipe):
            _none_left(options, "a recipe")
            return replace(method, **common)
        if isinstance(method, (str, Path)) and str(method).endswith((".yaml", ".yml")):
            _none_left(options, f"the file {method}")
            method = read_yaml(Path(method))
        if isinstance(method, Mapping):
            method = {**method, **options}
            common = {**{key: method.pop(key) for key in ("positions",) if key in method}, **common}
            if "method" not in method:
                raise ValueError(f"a recipe dict needs the key 'method'; this one has {sorted(map(str, method))}")
            options = {key: value for key, value in method.items() if key != "method"}
            method = method["method"]
        several = isinstance(method, Sequence) and not isinstance(method, str)
        if several:
            _none_left(options, "a list of methods")
        parts = [_part(each, {}) for each in method] if several else [_part(method, options)]
        towers = [each for each in parts if isinstance(each, Recipe)]
        selectors = [each for each in parts if isinstance(each, Selector)]
        if len(selectors) > 1:
            names = " and ".join(each.name for each in selectors)
            raise ValueError(f"{names} both choose the rows that the language model sees; name one of them")
        tower = _tower(towers)
        return cls(tower, next(iter(selectors), None), tuple(d for d in parts if isinstance(d, Dropper)), **common)


def _part(method: Any, options: dict[str, Any]) -> Recipe | Selector | Dropper:
    if isinstance(method, (Selector, Dropper)):
        _none_left(options, f"the object {method.name}")
        return method
    if isinstance(method, (Method, Recipe)):
        return Recipe.parse(method, **options)
    if isinstance(method, Mapping):
        rest = {**method, **options}
        return _part(rest.pop("method", None), rest)
    if isinstance(method, Sequence) and not isinstance(method, str):  # methods of a tower, with options for all
        inner = [_part(each, {}) for each in method]
        if not all(isinstance(each, Recipe) for each in inner):
            raise ValueError("selectors and droppers stand in the outermost list, beside methods of the tower")
        return Recipe.parse([m for each in inner for m in each.methods], **options)
    if not isinstance(method, str):
        raise TypeError(
            f"method={method!r} of type {type(method).__name__}: give a name, an object, a list of them, a dict or the "
            "path of a YAML file"
        )
    if find(method) is not None:
        return create(method, **options)
    name = method.removeprefix(TOWER)
    if name not in list_methods():
        raise ValueError(
            f"{method!r} is unknown; selectors: {', '.join(list_selectors())}; droppers: {', '.join(list_droppers())}; "
            f"methods of the tower: {', '.join(list_methods())}"
        )
    return Recipe.parse(name, **options)


def _tower(recipes: list[Recipe]) -> Recipe | None:
    """One recipe of those of the parts.

    Raises:
        ValueError: several of them, one of which has options that hold for all methods.
    """
    if len(recipes) < 2:
        return next(iter(recipes), None)
    for recipe in recipes:
        if recipe != Recipe(recipe.methods):
            raise ValueError(
                f"options of a whole tower are given with {recipe.methods[0].name}, one of several methods; give these "
                'in one part, {"method": [...], ...}'
            )
    return Recipe(tuple(m for recipe in recipes for m in recipe.methods))


def _told_apart(name: str) -> str:
    return f"{TOWER}{name}" if find(name) is not None else name


def _none_left(options: dict[str, Any], what: str) -> None:
    if options:
        raise ValueError(f"options {sorted(options)} cannot be combined with {what}; set them there")
