"""A backbone family: which exact classes it serves, and what they become when they reduce tokens.

The contract has three parts, and no fourth: this record (classes and refusals), the reducing model (`Walk` in walk.py,
or `ReducingModel` in model.py for models that answer with tokens), and the reducing block (block.py). Everything that
the library asks of a model, patched or not, it asks of these. docs/backbones.md tells how to write them.
"""

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
        layout: the sequence that block 0 sees.
        restarts: blocks after block 0 that a new sequence begins at, or that tokens join in front of, with its layout.
        grid: patches (high, wide) of the image.
    """

    depth: int
    layout: Layout
    restarts: Mapping[int, Layout]
    grid: tuple[int, int]

    def sequence(self, block: int) -> tuple[Layout, int]:
        """Layout of the sequence that a block sees, and the block behind the last one that sees it."""
        first = max(i for i in (0, *self.restarts) if i <= block)
        stop = min((i for i in self.restarts if i > block), default=self.depth)
        return self.restarts.get(first, self.layout), stop


class Around(NamedTuple):
    """A model around a backbone of a family, which is patched by giving the whole of it.

    Attributes:
        path: where the backbone is inside it, "vision_model".
        kind: the class that it has while the backbone is patched, a subclass of its own, where it pools the tokens of
            the backbone itself; None leaves it as it is.
    """

    path: str
    kind: type | None = None


@dataclass(frozen=True, kw_only=True)
class Family:
    """One backbone family.

    Args:
        name: short name.
        summary: what it covers, for the table of backbones.
        models: exact model class -> reducing subclass.
        blocks: exact block class -> reducing subclass.
        attentions: exact class of an attention layer inside a block -> reducing subclass.
        check: raises ValueError for settings of a model that cannot be served.
        check_block: returns an inner module of a block that is not exactly known, None if all are; None looks at the
            attention layers.
        check_recipe: raises ValueError for recipes that a model of the family cannot follow.
        parts: exact class of a module of the model outside of its blocks -> subclass that it has while patched (a
            pooling that has to know sizes).
        around: exact class of a model around one of the family -> where that is; the whole is then patched, reported
            and undone as its backbone would be.
        tried: versions of the package that the family was tried on, for lists and tables.
        scans: blocks scan their tokens instead of attending.
        bypassed: (name, module, what to do instead) of the modules that the unpatched model calls and the patched one
            does not, running their parts one by one: hooks on them would never fire.
    """

    name: str
    models: Mapping[type, type]
    blocks: Mapping[type, type]
    attentions: Mapping[type, type] = field(default_factory=dict)
    parts: Mapping[type, type] = field(default_factory=dict)
    around: Mapping[type, Around] = field(default_factory=dict)
    summary: str = ""
    tried: str = ""
    check: Callable[[nn.Module], None] = lambda model: None
    check_block: Callable[[nn.Module], nn.Module | None] | None = None
    check_recipe: Callable[[nn.Module, Recipe], None] = lambda model, recipe: None
    scans: bool = False
    bypassed: Callable[[nn.Module], list[tuple[str, nn.Module, str]]] = lambda model: []

    def model_kind(self, model: nn.Module) -> type:
        """The reducing class of a model, patched or not."""
        return _kind(self.models, model)

    def block_kind(self, block: nn.Module) -> type:
        """The reducing class of a block, patched or not, wrapped or not."""
        return _kind(self.blocks, unwrapped(block))

    def around_of(self, model: nn.Module) -> Around | None:
        """What the family knows of a model around one of its own, patched or not; None for all others."""
        cls = class_of(model)
        return next((known for plain, known in self.around.items() if cls in (plain, known.kind)), None)

    def view(self, model: nn.Module) -> Any:
        """A model, patched or not, as its reducing class sees it: for questions, not to be run or changed."""
        return _seen_as(model, self.model_kind(model))

    def block_view(self, block: nn.Module) -> Any:
        """A block, patched or not, wrapped or not, as its reducing class sees it; see `view`."""
        return _seen_as(unwrapped(block), self.block_kind(block))

    def unknown_part(self, block: nn.Module) -> nn.Module | None:
        """An inner module of an unpatched block that is no exactly known class, None if all are."""
        if self.check_block is not None:
            return self.check_block(block)
        view = self.block_view(block)
        layers = [layer for layer in view.attention_layers() if layer is not view]
        return next((layer for layer in layers if type(layer) not in self.attentions), None)


def _kind(table: Mapping[type, type], module: nn.Module) -> type:
    cls = class_of(module)
    return cls if cls in table.values() else table[cls]


def _seen_as(module: nn.Module, kind: type) -> nn.Module:
    if isinstance(module, kind):
        return module
    view = kind.__new__(kind)
    vars(view).update(vars(module))  # the same parameters and parts, under the methods of the reducing class
    return view
