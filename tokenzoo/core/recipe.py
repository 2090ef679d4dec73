"""Recipes: which methods act on a model and how, as objects, keywords, dicts, or YAML files, and back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from .cutting import cannot_cut, pinned
from .dial import dial_in_parts
from .handover import refuse_beyond
from .lift import Fill
from .method import PLACES, Method, Step
from .mixins import Restoring
from .recipe_files import read_yaml, take_flops
from .registry import create_method, list_methods
from .tokens import Layout, TraceStep

__all__ = ["MERGED_POSITIONS", "Placed", "Recipe", "take_flops"]

MERGED_POSITIONS = ("destination", "mean")
ORDERS = ("method", "raster")


@dataclass(frozen=True)
class Recipe:
    """Methods in order, and what holds for all of them.

    Args:
        methods: methods in list order; at the same place of the same block they run in this order.
        merged_positions: rotary position of a merged token: "destination" keeps the row of the token it merged into,
            "mean" rebuilds it from the mass-weighted mean coordinate.
        dense: `forward_features` gives all tokens back, for dense heads.
        fill: what dropped tokens get on the way back to the full grid: a name ("stash", "nearest", "zero"), the options
            of `tokenzoo.core.lift.Fill` as a dict, or a Fill.
        protect: tokens that are added behind the model's own prefix by a hook or by hand (prompts), which no method
            touches; every sequence has to hold that many more.
        order: how patches stand after a reduction: as the method leaves them ("method"), or row by row as they stood
            in the image, a merged one at the place of the token it merged into ("raster").
    """

    methods: tuple[Method, ...]
    merged_positions: str = "destination"
    dense: bool = False
    fill: Fill = Fill()
    protect: int = 0
    order: str = "method"

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError("a recipe needs at least one method; see tokenzoo.list_methods()")
        if self.merged_positions not in MERGED_POSITIONS:
            raise ValueError(f"merged_positions={self.merged_positions!r}; use one of {MERGED_POSITIONS}")
        if self.order not in ORDERS:
            raise ValueError(f"order={self.order!r}; use one of {ORDERS}")
        if not isinstance(self.dense, bool):
            raise TypeError(f"dense={self.dense!r}; give True (all tokens come back) or False")
        if type(self.protect) is not int:
            raise TypeError(f"protect={self.protect!r}; give the number of tokens added behind the prefix")
        if self.protect < 0:
            raise ValueError(f"protect={self.protect} is negative; give the number of tokens added behind the prefix")
        object.__setattr__(self, "fill", Fill.parse(self.fill))

    @property
    def keeps_trace(self) -> bool:
        """Whether every forward pass has to remember its maps."""
        return any(m.keeps_trace for m in self.methods)

    @property
    def data_dependent(self) -> bool:
        """Whether token counts depend on the images."""
        return any(m.data_dependent for m in self.methods)

    @property
    def restores_maps(self) -> bool:
        """Whether dense models run their decoder on the reduced tokens and restore what it gives."""
        return any(m.decodes_reduced for m in self.methods)

    def lift_trace(self, trace: tuple[TraceStep, ...]) -> tuple[TraceStep, ...]:
        """The trace with the options that methods have for the way back."""
        for method in self.methods:
            trace = method.lift_trace(trace) if isinstance(method, Restoring) else trace
        return trace

    @property
    def track_size(self) -> bool:
        """Whether token sizes are kept."""
        return any(m.uses_size for m in self.methods)

    @property
    def proportional(self) -> bool:
        """Whether attention adds log sizes."""
        return any(m.proportional for m in self.methods)

    @property
    def mass_weighted_pool(self) -> bool:
        """Whether average pooling weighs tokens by size."""
        return any(m.mass_weighted_pool for m in self.methods)

    @property
    def track_positions(self) -> bool:
        """Whether the original index of each token is kept for a method's sake."""
        return self.order == "raster" or any(m.uses_positions for m in self.methods)

    def steps(self, depth: int) -> dict[int, tuple[Step, ...]]:
        """The steps of every block: by place, then in list order.

        Raises:
            ValueError: a layer outside the model, or two methods with layers="others".
        """
        named = {i for m in self.methods if m.layers != "others" for i in m.resolve_layers(depth)}
        rest = tuple(i for i in range(depth) if i not in named)
        found: dict[int, list[Step]] = defaultdict(list)
        scorers = -1  # each method that carries or remembers something has its own
        for order, method in enumerate(self.methods):
            scorers += method.scores_tokens or method.remembers
            resolved = replace(method, layers=rest) if method.layers == "others" else method
            for block, strength in resolved.strengths(depth).items():
                key = f"tokenzoo_{order}_{method.name}"
                found[block].append(Step(method, block, strength, key, max(0, scorers), order=order))
        return {
            block: tuple(sorted(steps, key=lambda s: PLACES.index(s.method.place))) for block, steps in found.items()
        }

    def token_counts(
        self, depth: int, layout: Layout, restarts: Mapping[int, Layout] | None = None
    ) -> list[list[tuple[Step, int, int]]]:
        """(step, tokens before, tokens after) of every block in the order in which they run.

        Args:
            depth: blocks of the model.
            layout: the sequence that block 0 sees.
            restarts: blocks that a new sequence begins at, or that tokens join in front of, with its layout; None where
                one runs through all blocks.

        Raises:
            ValueError: a strength that cannot be reached at this number of tokens.
        """
        steps, n, rows = self.steps(depth), layout.num_prefix + layout.num_patches, []
        opened: list[int] = []  # tokens in front of the spans that are still open
        for block in range(depth):
            if restarts and block in restarts:
                layout = restarts[block]
                opened = [before + layout.joined for before in opened] if layout.joined else []
                n = n + layout.joined if layout.joined else layout.num_prefix + layout.num_patches
            row = []
            inside: dict[str, int] = {}  # tokens inside each branch that something merges around
            for step in steps.get(block, ()):
                for branch in step.branches:
                    inside[branch] = step.method.tokens_inside(inside.get(branch, n), step, layout)
                if step.method.opens_span:
                    opened.append(n)
                closes = step.method.closes_span and bool(opened)
                after = opened.pop() if closes else step.tokens_out(n, layout)
                row.append((step, n, after))
                n = after
            rows.append(row)
        return rows

    def cut(self, depth: int, left: int) -> Recipe:
        """What a recipe for `depth` blocks does in the first `left` of them, as a recipe for that many.

        Raises:
            ValueError: nothing, or options of a method that follow from all blocks.
        """
        steps, kept = self.steps(depth), []
        opened = any(m.opens_span and min(m.resolve_layers(depth)) < left for m in self.methods)
        for method in self.methods:
            outside = method.place in ("embed", "norm", "maps")
            acting = [s for i in range(left) for s in steps.get(i, ()) if s.method is method]
            closes = isinstance(method, Restoring)
            if outside or acting:
                if not closes or opened:
                    kept.append(method if outside else pinned(method, acting, left))
            elif closes and opened:  # it rebuilds in a block that is gone, and says how maps are lifted
                raise cannot_cut(method, left)
        if not kept:
            raise ValueError(f"the recipe {self.to_dict()} acts in none of the {left} blocks that are left of {depth}")
        return replace(self, methods=tuple(kept))

    def dial(self, t: float, depth: int, layout: Layout, restarts: Mapping[int, Layout] | None = None) -> Recipe:
        """The same recipe with every method at relative strength t in [0, 1]; see `token_counts` for the rest."""
        restarts = {block: own for block, own in (restarts or {}).items() if not own.joined}
        if not restarts:
            return replace(self, methods=tuple(m.dial(t, depth, layout) for m in self.methods))
        layouts = {0: layout, **restarts}
        return replace(self, methods=tuple(dial_in_parts(m, t, depth, layouts) for m in self.methods))

    def image_dial(self, t: float, depth: int, layout: Layout) -> Recipe:
        """As `dial`, with the methods that have one in the form in which the images decide how many tokens stay."""
        return replace(
            self, methods=tuple(m.image_dial(t, depth, layout) or m.dial(t, depth, layout) for m in self.methods)
        )

    def to_dict(self) -> dict[str, Any]:
        """A flat dict that `Recipe.parse` and `patch_model` take back; JSON and YAML safe."""
        extra: dict[str, Any] = {}
        if self.merged_positions != "destination":
            extra["merged_positions"] = self.merged_positions
        if self.dense:
            extra["dense"] = True
        if self.fill != Fill():
            extra["fill"] = self.fill.to_plain()
        if self.protect:
            extra["protect"] = self.protect
        if self.order != "method":
            extra["order"] = self.order
        if len(self.methods) == 1:
            return {**self.methods[0].to_dict(), **extra}
        return {"method": [m.to_dict() for m in self.methods], **extra}

    @classmethod
    def parse(cls, method: Any, **options: Any) -> Recipe:
        """Reads a recipe from a name, a method object, a list of those, a dict, a YAML file, or a recipe.

        Args:
            method: "tome", ToMe(r=8), ["evit", ToMe(r=8)], {"method": "tome", "r": 8}, "recipe.yaml" or a Recipe.
            **options: options of the method when it is given by name, and `merged_positions`, `dense`, `fill`,
                `protect`, `order`.

        Raises:
            ValueError, TypeError: with the offending name, value or line.
        """
        common = {k: options.pop(k) for k in ("merged_positions", "dense", "fill", "protect", "order") if k in options}
        if isinstance(method, Recipe):
            _no_options(options, "a Recipe")
            return replace(method, **common)
        if isinstance(method, (str, Path)) and str(method).endswith((".yaml", ".yml")):
            _no_options(options, f"the file {method}")
            return cls.parse(read_yaml(Path(method)), **common)
        if isinstance(method, Mapping):
            given = {**method, **options}
            name = given.pop("method", None)
            if name is None:
                raise ValueError(f"a recipe dict needs the key 'method'; this one has {sorted(map(str, given))}")
            return cls.parse(name, **{**given, **common})
        if isinstance(method, Method):
            _no_options(options, f"the method object {method.name}")
            return cls((method,), **common)
        if not isinstance(method, str) or method not in list_methods():
            refuse_beyond(method)
        if isinstance(method, str):
            return cls((create_method(method, **options),), **common)
        if isinstance(method, Sequence):
            _no_options(options, "a list of methods")
            return cls(tuple(m for item in method for m in cls.parse(item).methods), **common)
        raise TypeError(
            f"method={method!r} of type {type(method).__name__}: give a name, a method object, a list of them, a dict "
            "or the path of a YAML file"
        )


@dataclass(frozen=True)
class Placed(Recipe):
    """A recipe whose steps are settled, whatever the number of blocks: that of a model which may have lost some since.

    Args:
        placed: the steps of each block.
    """

    placed: Mapping[int, tuple[Step, ...]] = field(default_factory=dict)

    def steps(self, depth: int) -> dict[int, tuple[Step, ...]]:
        return {block: steps for block, steps in self.placed.items() if block < depth}

    @classmethod
    def of(cls, recipe: Recipe, steps: Mapping[int, tuple[Step, ...]]) -> Placed:
        """The recipe with its steps."""
        options = {each.name: getattr(recipe, each.name) for each in fields(Recipe)}
        return cls(**options, placed=steps)


def _no_options(options: dict[str, Any], what: str) -> None:
    if options:
        raise ValueError(f"options {sorted(options)} cannot be combined with {what}; set them there")
