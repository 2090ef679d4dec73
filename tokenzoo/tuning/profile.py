"""Recipes whose methods act more strongly in some blocks than in others, at one strength that a budget solves for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..core.method import PLACES, Method, Step
from ..core.recipe import Recipe
from ..core.tokens import Layout

_HALVINGS = 7  # of a strength that a block cannot follow


@dataclass(frozen=True, kw_only=True)
class Profiled(Recipe):
    """A recipe with a profile per method: relative strengths of the blocks it acts in.

    Args:
        profiles: per method one weight per block of its `layers`, in their order; None for the method's own dial.
    """

    profiles: tuple[tuple[float, ...] | None, ...] = ()

    def dial(self, t: float, depth: int, layout: Layout, restarts: Mapping[int, Layout] | None = None) -> Recipe:
        """A plain recipe: every block at t times its weight (the largest weight counting as 1), or what it can follow.

        See `Recipe.dial` for the rest.
        """
        plain = Recipe(
            self.methods, self.merged_positions, self.dense, self.fill, self.protect, self.order
        )  # options of the recipe itself do not change
        if all(profile is None for profile in self.profiles):
            return plain.dial(t, depth, layout, restarts)
        if restarts:
            raise ValueError("profiles follow one sequence through all blocks; this model begins new ones")
        return replace(plain, methods=_followed(self.methods, self.profiles, t, depth, layout))


def takes_profile(method: Method | None, depth: int, layout: Layout) -> bool:
    """Whether a method's blocks can have strengths of their own, under the options that its dial sets; not for None."""
    if method is None:
        return False
    try:
        layers = method.resolve_layers(depth)
        if len(layers) < 2 or method.layers == "others":
            return False
        shares = [0.3 * (k + 1) / len(layers) for k in range(len(layers))]
        parts = [_alone(method, block, share, depth, layout) for block, share in zip(layers, shares)]
        _composed(method, layers, parts, depth, layout)
    except ValueError:
        return False
    return True


def _followed(
    methods: Sequence[Method], profiles: Sequence[Sequence[float] | None], t: float, depth: int, layout: Layout
) -> tuple[Method, ...]:
    """The methods at strength t, block by block in the order in which they act."""
    layers = [method.resolve_layers(depth) for method in methods]
    order = sorted(range(len(methods)), key=lambda i: PLACES.index(methods[i].place))
    parts: list[dict[int, Method]] = [{} for _ in methods]
    n = layout.num_prefix + layout.num_patches
    for block in range(depth):
        for i in order:
            if block not in layers[i]:
                continue
            profile = profiles[i] or (1.0,) * len(layers[i])
            share = t * profile[layers[i].index(block)] / (max(profile) or 1.0)
            parts[i][block], n = _reachable(methods[i], share, block, n, depth, layout)
    return tuple(
        _composed(method, blocks, [found[block] for block in blocks], depth, layout)
        for method, blocks, found in zip(methods, layers, parts)
    )


def _reachable(method: Method, share: float, block: int, n: int, depth: int, layout: Layout) -> tuple[Method, int]:
    """The method at the largest strength up to a share that a block of n tokens can follow, and what that leaves."""

    def tried(share: float) -> tuple[Method, int]:
        part = _alone(method, block, share, depth, layout._replace(grid=(1, max(1, n - layout.num_prefix))))
        strength = part.strengths(depth).get(block)
        return part, n if strength is None else Step(part, block, strength).tokens_out(n, layout)

    try:
        return tried(share)
    except ValueError:
        low, high = 0.0, share
    found = tried(0.0)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        try:
            found, low = tried(middle), middle
        except ValueError:
            high = middle
    return found


def _composed(method: Method, layers: Sequence[int], parts: Sequence[Method], depth: int, layout: Layout) -> Method:
    """One method with the strength that each part has in its block.

    Raises:
        ValueError: its options cannot say so.
    """
    weak, strong = method.dial(0.25, depth, layout), method.dial(0.75, depth, layout)
    varying = [name for name in method.options() if getattr(weak, name) != getattr(strong, name)]
    values = {name: tuple(_entry(getattr(part, name)) for part in parts) for name in varying}
    wanted = {b: p.strengths(depth)[b] for b, p in zip(layers, parts) if b in p.strengths(depth)}
    try:
        whole = replace(weak, **values)
        said = whole.strengths(depth)
    except TypeError as error:  # an option that takes no list
        raise ValueError(f"{method.name} has one strength for all blocks ({error})") from error
    if said != wanted:
        raise ValueError(f"{method.name} has one strength for all blocks, so that no profile can shape it")
    return whole if len(varying) else weak


def _entry(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) and len(value) == 1 else value


def _alone(method: Method, block: int, share: float, depth: int, layout: Layout) -> Method:
    """The method in one block, at a strength that is a share of what could go of the tokens there."""
    return replace(method, layers=(block,)).dial(share, depth, layout)
