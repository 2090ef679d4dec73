"""A backbone family: which exact classes it serves, and with what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..recipes import Recipe
from ..tokens import Layout


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


def linear_macs(module: nn.Module) -> int:
    """Multiply-adds a token of all linear layers inside a module."""
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def families() -> tuple[Family, ...]:
    """All families, imported when first asked for."""
    from . import eva, plain_mamba, sam, svit, vim, vit, vit_stems

    return vit.FAMILY, eva.FAMILY, vit_stems.FAMILY, svit.FAMILY, sam.FAMILY, vim.FAMILY, plain_mamba.FAMILY


def find_family(model: nn.Module) -> Family:
    """The family that serves a model's exact class.

    Raises:
        TypeError: no family does; the message names the class.
    """
    for family in families():
        if type(model) in family.models:
            return family
    served = ", ".join(cls.__name__ for family in families() for cls in family.models)
    raise TypeError(
        f"{type(model).__module__}.{type(model).__qualname__} is no backbone that tokenzoo can patch; it serves "
        f"exactly {served} (see tokenzoo.list_backbones()); a model that wraps one: patch the wrapped module"
    )
