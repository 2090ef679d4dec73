"""The two kinds of method that act where images meet a language model: selectors and droppers.

A selector acts once per image, on the rows that the language model would see. A dropper acts in front of some layers of
the language model, while the prompt is read. Both decide; what follows from a decision (placeholders, masks, positions,
caches, labels) is the library's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..core.method import plain
from ..core.options import check_fields, option
from ..maps import TokenMap
from .rows import NewRows, VisualRows

if TYPE_CHECKING:
    from .layer_signals import LayerRows, LayerSignals, Left
    from .signals import VisualSignals

POSITIONS = ("original", "contiguous")


def _budget(name: str, field: str, value: Any) -> int | float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: {field}={value!r}; give a number of rows per image (64) or a share of them (0.25)")
    if isinstance(value, float) and not 0 < value <= 1:
        raise ValueError(f"{name}: {field}={value} is outside (0, 1]; shares lie there, counts are whole numbers")
    if value < 1 and not isinstance(value, float):
        raise ValueError(f"{name}: {field}={value}; give a positive number of rows")
    return value


def _total(name: str, field: str, value: Any) -> int | None:
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"{name}: {field}={value!r}; give the number of rows that all images of a prompt share")
    return value


def shares_of(name: str, field: str, value: Any) -> tuple[float, ...]:
    """One share per stage, each in (0, 1], none above the one before; a check for `core.options.option`."""
    shares = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not shares or any(isinstance(s, bool) or not isinstance(s, (int, float)) for s in shares):
        raise TypeError(f"{name}: {field}={value!r}; give one share of the visual rows per layer, such as (0.5, 0.25)")
    if any(not 0 <= s <= 1 for s in shares) or any(b > a for a, b in zip(shares, shares[1:])):
        raise ValueError(f"{name}: {field}={shares}; give shares in [0, 1], none above the one before")
    return shares


class Named:
    """Options as plain data, for dataclasses with a `name`."""

    name: ClassVar[str] = ""
    source: ClassVar[str] = ""
    kind: ClassVar[str] = ""

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def options(cls) -> dict[str, Any]:
        """Option names and their defaults."""
        return {f.name: f.default for f in dataclasses.fields(cls)}

    def to_dict(self) -> dict[str, Any]:
        """The options that differ from their defaults, JSON safe, with the name first."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"method": self.name, **{k: plain(v) for k, v in given.items() if v != self.options()[k]}}


@dataclass(frozen=True, kw_only=True)
class Selector(Named):
    """Base of all selectors: decides which rows of an image the language model sees, and what they are made of.

    A subclass is registered by `register_selector`, declares `name`, `source` and `kind`, and defines `map`. It never
    names a model. Attributes of the class say what else the library has to know.

    Attributes:
        unit: "crop": asked for every crop, tile or frame alone, which share the budget in proportion to their rows;
            "image": asked for all rows of an image or video at once.
        reads: what it looks at: some of "tower" (attention, queries or keys of the tower's layers), "features" (rows in
            front of the projector), "text" (the words of the prompt).
        class_row: whether it works only on towers with a class token.
        in_tower_space: the map mixes rows as the tower gives them, in front of the projector, where the family has
            one row per patch there; else rows of the language model are mixed.
        takes_class: whether it wants what the tower gives for the class token, `rows.class_token`.
        data_dependent: whether counts depend on the images; `count` then says the most.
        positions: where the authors put the rows that are left: "original" or "contiguous" (renumbered).

    Args:
        keep: rows to keep per image: a count, or a share in (0, 1].
        keep_total: rows to keep per prompt instead, spread over its images in proportion to their rows.
    """

    keep: int | float | None = option(None, _budget)
    keep_total: int | None = option(None, _total)

    unit: ClassVar[str] = "crop"
    reads: ClassVar[tuple[str, ...]] = ()
    class_row: ClassVar[bool] = False
    in_tower_space: ClassVar[bool] = False
    takes_class: ClassVar[bool] = False
    positions: ClassVar[str] = "contiguous"
    data_dependent: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None and self.keep_total is not None:
            raise ValueError(f"{self.name}: give keep (per image) or keep_total (per prompt), not both")

    def count(self, n: int) -> int:
        """Rows that stay of an image with n; all where a count asks for more (images differ in their numbers of rows).

        Raises:
            ValueError: no budget was given.
        """
        if self.keep is None:
            raise ValueError(f"{self.name} has no budget; give keep=64 (rows per image), keep=0.25 or keep_total=640")
        return min(n, max(1, round(self.keep * n)) if isinstance(self.keep, float) else self.keep)

    def layers(self, depth: int) -> tuple[int, ...]:
        """Layers of the tower whose attention, queries or keys `map` reads; negative ones count from the end.

        Args:
            depth: layers of the tower.
        """
        return (-2,) if "tower" in self.reads else ()

    def map(self, rows: VisualRows, signals: VisualSignals, keep: int) -> TokenMap | NewRows:
        """Decides for a batch of images, crops or frames of equal size.

        Args:
            rows: the rows, B of N each.
            signals: lazy view of the tower and of the prompt, for the same rows.
            keep: rows that have to be left, 1 <= keep < N.

        Returns:
            A map [B, N -> keep] whose `heads` say which old row lends a new one its place, or `NewRows`.
        """
        raise NotImplementedError(f"{type(self).__name__} decides no map: define map(rows, signals, keep)")

    def macs(self, n: int, keep: int, dim: int, heads: int) -> int:
        """Multiply-adds of deciding, for one image of n rows.

        Args:
            n: rows of the image.
            keep: rows that stay.
            dim: channels of the rows.
            heads: heads of the tower.
        """
        return 0

    def dial(self, t: float) -> Selector:
        """The same selector at relative strength t: 0 keeps all rows, towards 1 it keeps one."""
        return dataclasses.replace(self, keep=max(1.0 - t, 1e-9), keep_total=None)


@dataclass(frozen=True, kw_only=True)
class Dropper(Named):
    """Base of all droppers: decides which visual rows leave the language model between its layers.

    A subclass is registered by `register_dropper`, declares `name`, `source` and `kind`, and defines `count` and
    `score` (or `decide`). Text is never dropped.

    Attributes:
        scored_by: "previous": attention of the layer in front of the cut; "own": what the queries and keys of the layer
            behind the cut say about all rows that reach it; "none".
        positions: what the authors do with positions: "original" or "contiguous" (renumbered after every cut).

    Args:
        layers: layers that rows are dropped in front of, one stage each; None for the method's default.
    """

    layers: tuple[int, ...] | None = None

    scored_by: ClassVar[str] = "previous"
    positions: ClassVar[str] = "original"
    data_dependent: ClassVar[bool] = False

    def __post_init__(self) -> None:
        layers = (self.layers,) if type(self.layers) is int else self.layers
        if layers is not None:
            if not isinstance(layers, Sequence) or isinstance(layers, str) or any(type(i) is not int for i in layers):
                raise TypeError(f"{self.name}: layers={self.layers!r}; give indices such as (8, 16, 24)")
            layers = tuple(layers)
            if list(layers) != sorted(set(layers)) or layers[:1] < (1,):
                raise ValueError(
                    f"{self.name}: layers={layers}; give rising indices from 1 on (in front of layer 0 a selector acts)"
                )
        object.__setattr__(self, "layers", layers)
        super().__post_init__()

    def default_layers(self, depth: int) -> tuple[int, ...]:
        """Layers to act in front of when the user names none.

        Args:
            depth: layers of the language model.
        """
        raise NotImplementedError(f"{type(self).__name__} names no layers: define default_layers(depth)")

    def count(self, n: int, stage: int) -> int:
        """Visual rows that stay behind a stage (the most, where it depends on the prompt).

        Args:
            n: visual rows of a prompt that entered the language model.
            stage: 0 for the first of the layers.
        """
        raise NotImplementedError(f"{type(self).__name__} says no counts: define count(n, stage)")

    def score(self, rows: LayerRows, signals: LayerSignals, stage: int) -> Tensor:
        """How much a row matters [B, N] float32; those of text and padding are ignored."""
        raise NotImplementedError(f"{type(self).__name__} scores nothing: define score(...) or decide(...)")

    def decide(self, rows: LayerRows, signals: LayerSignals, stage: int) -> Left:
        """Which rows stay, and new values for them where rows are merged.

        By default the `count` rows with the highest `score`; of equal ones the first.

        Args:
            rows: what reaches the layer; `rows.keep` has the counts of each prompt.
            signals: lazy view of attention.
            stage: 0 for the first of the layers.
        """
        return rows.best(self.score(rows, signals, stage))

    def shrinks_caches(self) -> bool:
        """Whether rows that go also leave the caches of earlier layers, from the one in front of the first cut on.

        For droppers that are scored by the layer in front of the cut; prefill is as without, later steps are not.
        """
        return False

    def macs(self, n: int, text: int, dim: int, heads: int, stage: int) -> int:
        """Multiply-adds of deciding, for one prompt; by default one row of attention with its projections left out.

        Args:
            n: visual rows that reach the layer.
            text: other rows.
            dim: channels.
            heads: query heads times their width.
            stage: 0 for the first of the layers.
        """
        return (n + text) * heads if self.scored_by != "none" else 0

    def dial(self, t: float) -> Dropper:
        """The same dropper at relative strength t: 0 drops nothing, 1 as much as it can."""
        raise ValueError(f"{self.name} has no dial, so that prefill= cannot be solved for it; give its options instead")
