"""What takes part in a search: every method that needs no training, under several schedules, and pairs of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from ..adapters.backbone import BackboneInfo
from ..core.learned import needs_training
from ..core.method import Method
from ..core.registry import create_method, declaring, list_methods, method_class
from .profile import Profiled, takes_profile

BY_IMAGE = "by image"
OUTSIDE = ("embed", "norm", "maps")  # places that no block of a list can move


class Part(NamedTuple):
    """One method of a candidate.

    Attributes:
        name: of the method.
        layers: blocks to act in, None for the method's own.
        weights: one per block, see `Profiled`; None for the method's own dial.
    """

    name: str
    layers: tuple[int, ...] | None = None
    weights: tuple[float, ...] | None = None

    def method(self) -> Method:
        """The method, its strength still open."""
        options = {} if self.layers is None else {"layers": self.layers}
        return create_method(self.name, **options)


class Candidate(NamedTuple):
    """Methods with their schedules; how strong they are is left to the budget.

    Attributes:
        parts: the methods.
        schedule: a word for tables: "default", "every block", "early", "late", "refined", or "by image", where the
            images decide how many tokens stay and the cost is what they come to on average.
    """

    parts: tuple[Part, ...]
    schedule: str = "default"

    @property
    def name(self) -> str:
        """Names of the methods."""
        return "+".join(part.name for part in self.parts)

    @property
    def label(self) -> str:
        """Names and schedule."""
        return self.name if self.schedule == "default" else f"{self.name}, {self.schedule}"

    def recipe(self, dense: bool = False) -> Profiled:
        """The recipe that a budget solves for."""
        methods = tuple(part.method() for part in self.parts)
        return Profiled(methods=methods, dense=dense, profiles=tuple(part.weights for part in self.parts))


def chosen_methods(names: Sequence[str] | None) -> list[str]:
    """The methods to search over, all registered ones by default.

    Raises:
        ValueError: an unknown name, or none.
    """
    if names is None:
        return list_methods()
    if isinstance(names, str) or not names:
        raise ValueError(f"methods={names!r}; give a list with at least one name of tokenzoo.list_methods()")
    for name in names:
        method_class(name)
    return list(dict.fromkeys(names))


def seeds(name: str, info: BackboneInfo) -> Iterator[Candidate]:
    """One method as it comes, and where its blocks can be others: in every block, early, late.

    Args:
        name: of the method.
        info: the model.

    Raises:
        ValueError, TypeError: a method that needs training, or options that have no default.
    """
    if needs_training(method_class(name)):
        raise ValueError(f"{name} learns what to decide, and is not trained here; see docs/learned.md")
    method = create_method(name)
    depth, layout = info.depth, info.layout
    if method.closes_span:  # it gives back what another one took
        yield from (Candidate((Part(opener), Part(name))) for opener in declaring("opens_span"))
        return
    yield Candidate((Part(name),))
    if not info.restarts and method.image_dial(0.5, depth, layout) is not None:
        yield Candidate((Part(name),), BY_IMAGE)
    if method.place in OUTSIDE or isinstance(method.layers, str):
        return
    own = tuple(sorted(method.resolve_layers(depth)))
    everywhere = tuple(range(min(own[0], 1), depth))  # in the first block many methods have nothing to go by
    shaped = not info.restarts and takes_profile(_in(method, everywhere), depth, layout)
    if len(own) < depth:
        shift = max(1, depth // 6)
        if shaped and everywhere != own:
            yield Candidate((Part(name, everywhere, (1.0,) * len(everywhere)),), "every block")
        yield from _moved(name, own, -shift, depth, "early")
        yield from _moved(name, own, shift, depth, "late")
    elif shaped and depth > 1:
        falling = tuple(round(1 - 0.9 * i / (depth - 1), 4) for i in range(depth))
        yield Candidate((Part(name, everywhere, falling),), "early")
        yield Candidate((Part(name, everywhere, falling[::-1]),), "late")
    elif depth > 1:
        yield Candidate((Part(name, everywhere[: (depth + 1) // 2]),), "early")
        yield Candidate((Part(name, everywhere[depth // 2 :]),), "late")


def pairs(singles: Sequence[Candidate], info: BackboneInfo) -> list[Candidate]:
    """Two methods in one model: one in the first half of the blocks, the other in the second, in both orders.

    Args:
        singles: candidates of one method each, the best ones first.
        info: the model.
    """
    half = info.depth // 2
    first, second = tuple(range(half)), tuple(range(half, info.depth))
    names = dict.fromkeys(c.name for c in singles)
    able = [name for name in names if _fits(name, first, info) and _fits(name, second, info)]
    return [
        Candidate((Part(a, first, (1.0,) * len(first)), Part(b, second, (1.0,) * len(second))), "halves")
        for a in able for b in able if a != b
    ]  # fmt: skip


def _fits(name: str, layers: tuple[int, ...], info: BackboneInfo) -> bool:
    method = _in(create_method(name), layers)
    return not info.restarts and method is not None and takes_profile(method, info.depth, info.layout)


def _moved(name: str, own: tuple[int, ...], by: int, depth: int, word: str) -> Iterator[Candidate]:
    layers = tuple(block + by for block in own if 0 <= block + by < depth)
    if layers and layers != own:
        yield Candidate((Part(name, layers),), word)


def _in(method: Method, layers: tuple[int, ...]) -> Method | None:
    """The method in other blocks, None where it refuses them."""
    try:
        return replace(method, layers=layers)
    except ValueError:
        return None
