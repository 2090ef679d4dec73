"""What a method is: options, the blocks it acts in, how many tokens it leaves, and the map it decides."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

from torch import Tensor, nn

from ..maps import TokenMap
from .declared import Declared
from .options import check_fields
from .renamed import follow_old_names
from .schedule import Schedule
from .signals import Signals
from .step import BlockShape, Step
from .tokens import Layout, Tokens
from .traits import PLACES, Traits

__all__ = ["PLACES", "BlockShape", "Method", "Step", "plain"]


@dataclass(frozen=True, kw_only=True)
class Method(Declared):
    """Base of all methods: a frozen dataclass of options, with one function that decides the map.

    A subclass declares its name, source and kind, its `traits` (what the code around it has to know) and its `schedule`
    (how its options become one strength per block, and how many tokens that leaves), and decides the map (`map`). It
    never names a backbone. Options check themselves, see `core.options`.

    Args:
        layers: blocks to act in; None for the method's default; "others" for the blocks no other method of the recipe
            names.
    """

    layers: tuple[int, ...] | str | None = None

    name: ClassVar[str] = ""
    source: ClassVar[str] = ""
    kind: ClassVar[str] = ""
    traits: ClassVar[Traits] = Traits()
    schedule: ClassVar[Schedule] = Schedule()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        follow_old_names(cls)

    def __post_init__(self) -> None:
        layers = self.layers
        if isinstance(layers, int) and not isinstance(layers, bool):
            layers = (layers,)
        if layers is not None and layers not in ("others", *self.schedule.layer_names):
            if isinstance(layers, str) or not isinstance(layers, Sequence) or any(type(i) is not int for i in layers):
                raise TypeError(f"{self.name}: layers={self.layers!r}; give indices such as (3, 6, 9) or 'others'")
            if len(set(layers)) != len(layers):
                raise ValueError(f"{self.name}: layers={tuple(layers)} names a block twice")
            layers = tuple(layers)
        object.__setattr__(self, "layers", layers)
        for name, value in self.schedule.parse(self).items():
            object.__setattr__(self, name, value)
        check_fields(self)

    # ---- where and how much: declared as data, or defined here

    def default_layers(self, depth: int) -> tuple[int, ...]:
        """Blocks to act in when the user names none."""
        return self.schedule.default_layers(depth)

    def strengths(self, depth: int) -> dict[int, Any]:
        """Strength per block index, blocks without reduction left out."""
        return self.schedule.strengths(self, self.resolve_layers(depth))

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        """Tokens after the step, prefix included (the largest possible count if it depends on the images).

        Around branches: tokens inside of them.

        Raises:
            ValueError: a strength that cannot be reached.
        """
        return self.schedule.tokens_out(n, step, layout)

    def count(self, n: int, step: Step, layout: Layout) -> Any:
        """The rule of one block for n tokens, prefix included, as plain integers (patches to keep, cells, ...).

        For methods whose strength is no count: maps, and `tokens_out`, read it through `step.count`. Not checked.
        """
        return self.schedule.count(n, step, layout)

    def dial(self, t: float, depth: int, layout: Layout) -> Method:
        """The same method at relative strength t: 0 removes nothing, 1 as much as it can.

        Args:
            t: 0 to 1.
            depth: blocks of the model.
            layout: token layout at the resolution that counts.
        """
        return dataclasses.replace(self, **self.schedule.dial(self, t, self.resolve_layers(depth), layout))

    @final
    def image_dial(self, t: float, depth: int, layout: Layout) -> Method | None:
        """The same method in the form in which the images decide how many tokens stay; None where it has none.

        Args:
            t: relative strength, 0 to 1.
            depth: blocks of the model.
            layout: token layout at the resolution that counts.
        """
        options = self.schedule.image_dial(self, t, self.resolve_layers(depth), layout)
        return None if options is None else dataclasses.replace(self, **options)

    # ---- the map

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        """Decides the map for these tokens; None leaves them alone.

        Args:
            tokens: the tokens at the method's place.
            signals: lazy view of the block's attention.
            step: this method in this block.
        """
        raise NotImplementedError(f"{type(self).__name__} decides no map: define map(tokens, signals, step)")

    def carry(self, tokens: Tokens, signals: Signals, token_map: TokenMap | None, step: Step) -> Tensor | None:
        """Scores of all tokens after the attention of a block [B, N] float32; for methods with the trait `carries`.

        Args:
            tokens: all tokens, with the scores of the block before.
            signals: lazy view of the attention that ran.
            token_map: the map to the tokens that attended, None when all did.
            step: this method in this block.
        """
        raise NotImplementedError(f"{type(self).__name__} carries scores: define carry(...)")

    def check(self, layout: Layout, model: str) -> None:
        """Refuses models that the method cannot work on; called before anything is patched.

        Args:
            layout: token layout of the model.
            model: name of its class, for the message.
        """

    def module(self, dim: int, step: Step) -> nn.Module | None:
        """The learned module of one block, None for methods without parameters.

        Args:
            dim: channels of the residual stream.
            step: this method in this block; `step.known` holds the tokens that enter and leave it at the model's own
                image size, for modules with a row per token.
        """
        return None

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        """Multiply-adds of deciding and applying the map, for one image."""
        return 0

    @final
    def resolve_layers(self, depth: int) -> tuple[int, ...]:
        """The blocks to act in, checked against the depth of the model."""
        if self.layers in self.schedule.layer_names:
            return (depth - 1,)
        layers = self.default_layers(depth) if self.layers is None else self.layers
        for index in layers:
            if not 0 <= index < depth:
                raise ValueError(f"{self.name}: layers names block {index}, but the model has blocks 0 to {depth - 1}")
        return tuple(layers)

    # ---- options as plain data

    @final
    @classmethod
    def options(cls) -> dict[str, Any]:
        """Option names and their defaults."""
        return {f.name: f.default for f in dataclasses.fields(cls)}

    @final
    def to_dict(self) -> dict[str, Any]:
        """The options that differ from their defaults, as JSON-safe values, with the method's name first."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed = {key: plain(value) for key, value in given.items() if value != self.options()[key]}
        return {"method": self.name, **changed}


def plain(value: Any) -> Any:
    """Tuples as lists, deeply: what JSON and YAML can hold."""
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    return value
