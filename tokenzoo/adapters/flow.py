"""How many tokens run through one block, station by station, in plain integers: what a block's cost follows from."""

from __future__ import annotations

from typing import NamedTuple

from ..core.method import PLACES, Step
from ..core.recipe import Recipe
from ..core.tokens import Layout

Acting = tuple[Step, int, int]  # a step, tokens before and after it


class Flow(NamedTuple):
    """Tokens of one block.

    Attributes:
        steps: what acts in the block.
        layout: the sequence that it sees.
        grid: patches (high, wide) of the image.
        recipe: None for the unpatched model.
        entered: tokens that enter.
        projected: tokens that queries and keys are projected of.
        values: tokens that values are projected of, and that a mixer without attention reads.
        pairs: pairs of a query and a key.
        attended: tokens that leave attention.
        mlp_entered: tokens in front of the MLP.
        mlp: tokens inside it.
        left: tokens that leave the block.
        looked: tokens whose queries and keys are projected once more, for a decision in front of attention.
        held: reductions that are in force when tokens enter, since their sequence began.
        held_inside: the same in front of the MLP.
        held_behind: the same when tokens leave.
    """

    steps: tuple[Acting, ...]
    layout: Layout
    grid: tuple[int, int]
    recipe: Recipe | None
    entered: int
    projected: int
    values: int
    pairs: int
    attended: int
    mlp_entered: int
    mlp: int
    left: int
    looked: int
    held: tuple[Acting, ...]
    held_inside: tuple[Acting, ...]
    held_behind: tuple[Acting, ...]

    @property
    def held_attended(self) -> tuple[Acting, ...]:
        """The same behind attention, in front of methods between it and the MLP."""
        early = PLACES.index("between")
        return _in_force(self.held, [found for found in self.steps if PLACES.index(found[0].method.place) < early])


def flow_through(
    steps: list[Acting],
    n: int,
    layout: Layout,
    grid: tuple[int, int],
    recipe: Recipe | None = None,
    held: tuple[Acting, ...] = (),
) -> Flow:
    """Follows n tokens through a block.

    Args:
        steps: what acts in it, in the order in which it runs.
        n: tokens that enter, prefix included.
        layout: the sequence.
        grid: patches of the image.
        recipe: of the model.
        held: reductions that are in force.
    """
    entered, by_place = n, {}
    for step, before, after in steps:
        by_place.setdefault(step.method.place, []).append((step, before, after))

    def through(place: str, n: int) -> int:
        return by_place[place][-1][2] if place in by_place else n

    around = by_place.get("around", [])
    looked = sum(n for step, n, _ in (*by_place.get("before", ()), *around) if step.method.reads_attention)
    n = through("before", through("embed", n))
    values = through("ahead", n)
    again = n if values < n and any(step.method.traits.carries_values for step, _, _ in steps) else 0
    attended = through("queries", values)
    inside = _inside("attention", around, n, layout)
    if inside is None:
        stations = n, values + again, n * n if "ahead" in by_place else attended * n, attended
    else:
        stations = inside, inside, inside * inside, inside
    for step, _, _ in by_place.get("between", ()):
        if step.method.attends and inside is None:
            stations = (*stations[:2], step.method.pairs(n, layout, step), stations[3])
    between = through("between", attended)
    mlp = _inside("mlp", around, between, layout)
    left = through("norm", through("after", between))
    late = ("after", "norm")
    inside_block = _in_force(held, [found for found in steps if found[0].method.place not in late])
    behind = _in_force(inside_block, [found for found in steps if found[0].method.place in late])
    return Flow(
        tuple(steps), layout, grid, recipe, entered, *stations, between, between if mlp is None else mlp, left, looked,
        held, inside_block, behind,
    )  # fmt: skip


def _inside(branch: str, around: list[Acting], n: int, layout: Layout) -> int | None:
    """Tokens inside a branch that n tokens enter, None where nothing merges around it."""
    steps = [step for step, _, _ in around if branch in step.branches]
    for step in steps:
        n = step.method.tokens_inside(n, step, layout)
    return n if steps else None


def _in_force(held: tuple[Acting, ...], steps: list[Acting]) -> tuple[Acting, ...]:
    """The reductions in force after further steps: restoring takes those of its span off."""
    kept = list(held)
    for found in steps:
        method = found[0].method
        if method.closes_span:
            openings = [i for i, (step, _, _) in enumerate(kept) if step.method.opens_span]
            del kept[openings[-1] if openings else len(kept) :]
        elif method.place != "around":
            kept.append(found)
    return tuple(kept)
