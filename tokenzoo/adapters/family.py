"""A backbone family: which exact classes it serves, and with what."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..recipes import Recipe
from ..tokens import Layout
from .classes import class_of, path_of, unwrapped


@dataclass(frozen=True)
class Family:
    """One backbone family.

    Args:
        name: short name.
        summary: what it covers, for the table of backbones.
        models: exact model class -> reducing subclass.
        blocks: exact block class -> reducing subclass.
        check: raises ValueError for settings of a model that cannot be served.
        check_block: returns an inner module of a block that is not exactly known, None if all are.
        check_recipe: raises ValueError for recipes that a model of the family cannot follow.
        layout: what methods see where that is not the sequence of all tokens (windows); None for the usual.
        sequences: where blocks see one sequence after the other (stages), the first block of each and what it sees at
            a grid of tokens (None for the model's own) under a recipe (None for none); None for the usual.
        costs: reads what counting needs, at a grid of tokens, where the usual formulas do not hold; the result has
            `rows(recipe, layout)`, the fields of the rows of a report. None for the usual.
        scans: blocks scan their tokens instead of attending.
        attentions: exact class of an attention layer inside a block -> reducing subclass.
        bypassed: (name, module, what to do instead) of the modules that the unpatched model calls and the patched one
            does not, running their parts one by one: hooks on them would never fire.
    """

    name: str
    summary: str
    models: dict[type, type]
    blocks: dict[type, type]
    check: Callable[[nn.Module], None]
    check_block: Callable[[nn.Module], nn.Module | None]
    check_recipe: Callable[[nn.Module, Recipe], None] = lambda model, recipe: None
    layout: Callable[[nn.Module], Layout] | None = None
    sequences: Callable[[nn.Module, tuple[int, int] | None, Recipe | None], dict[int, Layout]] | None = None
    costs: Callable[[nn.Module, tuple[int, int]], Any] | None = None
    scans: bool = False
    attentions: Mapping[type, type] = field(default_factory=dict)
    bypassed: Callable[[nn.Module], list[tuple[str, nn.Module, str]]] = lambda model: []

    def model_kind(self, model: nn.Module) -> type:
        """The reducing class of a model, patched or not."""
        return _kind(self.models, model)

    def block_kind(self, block: nn.Module) -> type:
        """The reducing class of a block, patched or not, wrapped or not."""
        return _kind(self.blocks, unwrapped(block))


def _kind(table: dict[type, type], module: nn.Module) -> type:
    cls = class_of(module)
    return cls if cls in table.values() else table[cls]


def families() -> tuple[Family, ...]:
    """All families, imported when first asked for."""
    from . import eva, plain_mamba, sam, svit, vim, vit, vit_stems

    return vit.FAMILY, eva.FAMILY, vit_stems.FAMILY, svit.FAMILY, sam.FAMILY, vim.FAMILY, plain_mamba.FAMILY


def family_of(model: nn.Module) -> Family | None:
    """The family that serves a model, patched or not; None where none does."""
    cls = class_of(model)
    return next((f for f in families() if cls in f.models or cls in f.models.values()), None)


def find_family(model: nn.Module) -> Family:
    """The family that serves a model's exact class, patched or not.

    Raises:
        TypeError: no family does; the message names the class, and a served model inside it if there is one.
    """
    family = family_of(model)
    if family is not None:
        return family
    refuse_around(model)
    served = ", ".join(path_of(cls) for family in families() for cls in family.models)
    raise TypeError(
        f"{path_of(class_of(model))} is no backbone that tokenzoo can patch; it serves exactly {served} (see "
        "tokenzoo.list_backbones()); a model that wraps one: patch the wrapped module"
    )


def refuse_around(model: nn.Module) -> None:
    """Refuses a model of a class that no family serves, if there is a served one inside it.

    Raises:
        TypeError: with the way to the one inside.
    """
    paths = [] if family_of(model) is not None else list(_served_inside(model))
    if paths:
        raise TypeError(
            f"{path_of(class_of(model))} is no backbone that tokenzoo can patch, but one is wrapped in it: give "
            f"{' or '.join(paths)} instead"
        )


def _served_inside(model: nn.Module) -> Iterator[str]:
    """How to reach each served model inside one of another class: "model.visual.trunk"."""
    for name, module in model.named_modules():
        if family_of(module) is not None:
            dotted = all(part.isidentifier() for part in name.split("."))
            yield f"model.{name}" if dotted else f"model.get_submodule({name!r})"
