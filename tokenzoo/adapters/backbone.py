"""A backbone family: which exact classes it serves, and with what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from ..core.recipe import Recipe
from ..core.tokens import Layout
from .classes import class_of, unwrapped


class BackboneInfo(NamedTuple):
    """What patching needs to know about a model.

    Attributes:
        depth: number of blocks.
        dim: channels of the residual stream.
        layout: token layout at the model's own image size.
        restarts: blocks after block 0 that a new sequence begins at, with its layout; None where one runs through.
    """

    depth: int
    dim: int
    layout: Layout
    restarts: Mapping[int, Layout] | None = None

    def sequence(self, block: int) -> tuple[Layout, int]:
        """Layout of the sequence that a block sees, and the block behind the last one that sees it."""
        firsts = sorted({0, *(self.restarts or {})})
        first = max(i for i in firsts if i <= block)
        stop = min((i for i in firsts if i > block), default=self.depth)
        return self.layout if first == 0 else self.restarts[first], stop


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
