"""Coordinate descent on the profile of a recipe: how strongly it acts in which block, at the same cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from ..adapters.backbone import BackboneInfo
from .budget import Fitted
from .candidates import Candidate, Part
from .halving import Ranked
from .profile import takes_profile

_FACTORS = (2.0, 0.5)
_LEAST = 0.1  # share of the largest weight that a block without any begins with


def refine(
    start: Ranked,
    fit: Callable[[Candidate], Fitted],
    look: Callable[[Fitted, int], Tensor],
    counts: tuple[int, int],
    info: BackboneInfo,
    trials: int,
    out_of_time: Callable[[], bool],
) -> Ranked:
    """A recipe that is better on the images of the search by more than one paired standard error, or the first one.

    Every change is solved for the budget again, so that what one block gains the others lose. Groups of blocks change
    first, then single ones, then the blocks that a method acts in. A change that is clearly worse on the first part of
    the images is not tried on the rest.

    Args:
        start: where to begin.
        fit: solves a candidate for the budget; raises ValueError where that cannot be.
        look: values of a candidate on the first images [n].
        counts: images of a first look, and all of them.
        info: the model.
        trials: changes to try at most.
        out_of_time: whether to stop.
    """
    best, few = start, counts[0]
    tried = {repr(best.fitted.recipe)}
    improved = True
    while improved:
        improved = False
        for move in _moves(best.fitted.candidate, info):
            if trials <= 0 or out_of_time():
                return best
            candidate = move(best.fitted.candidate)
            if candidate is None:
                continue
            try:
                fitted = fit(candidate)
            except (ValueError, TypeError):
                continue  # the budget cannot be met that way
            if repr(fitted.recipe) in tried:
                continue
            tried.add(repr(fitted.recipe))
            trials -= 1
            mean, error = _difference(look(fitted, few), best.values[:few])
            if mean < -error:
                continue
            values = look(fitted, counts[1])
            mean, error = _difference(values, best.values)
            if mean > error:
                best, improved = Ranked(fitted, values), True
    return best


def _difference(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Mean and standard error of a paired difference."""
    gain = ours - theirs
    return gain.mean().item(), gain.std().item() / len(gain) ** 0.5


Move = Callable[[Candidate], "Candidate | None"]


def _moves(candidate: Candidate, info: BackboneInfo) -> Iterator[Move]:
    """Changes to try one after the other, each applied to what is best by then."""
    for index, part in enumerate(candidate.parts):
        method = part.method()
        layers = part.layers or tuple(sorted(method.resolve_layers(info.depth)))
        if isinstance(method.layers, str):
            continue
        if not info.restarts and takes_profile(method, info.depth, info.layout):
            sizes = dict.fromkeys((max(1, -(-len(layers) // 4)), 1))  # groups, then single blocks
            for size in sizes:
                for first in range(0, len(layers), size):
                    for factor in _FACTORS:
                        yield _scaled(index, slice(first, first + size), factor, info)
        if len(layers) < info.depth:
            for k in range(len(layers)):
                for by in (-1, 1):
                    yield _shifted(index, k, by, info)


def _scaled(index: int, where: slice, factor: float, info: BackboneInfo) -> Move:
    """One part with some of its weights changed."""

    def move(candidate: Candidate) -> Candidate:
        part = candidate.parts[index]
        layers = _layers(part, info)
        weights = list(part.weights or (1.0,) * len(layers))
        top = max(weights)
        changed = [max(weight, _LEAST * top if factor > 1 else 0.0) * factor for weight in weights[where]]
        weights[where] = changed
        largest = max(weights)
        part = part._replace(layers=layers, weights=tuple(round(weight / largest, 4) for weight in weights))
        return _with(candidate, index, part)

    return move


def _shifted(index: int, k: int, by: int, info: BackboneInfo) -> Move:
    """One part with one of its blocks exchanged for a neighbour."""

    def move(candidate: Candidate) -> Candidate | None:
        part = candidate.parts[index]
        layers = list(_layers(part, info))
        layers[k] += by
        if not 0 <= layers[k] < info.depth or len(set(layers)) < len(layers) or sorted(layers) != layers:
            return None
        return _with(candidate, index, part._replace(layers=tuple(layers)))

    return move


def _layers(part: Part, info: BackboneInfo) -> tuple[int, ...]:
    return part.layers or tuple(sorted(part.method().resolve_layers(info.depth)))


def _with(candidate: Candidate, index: int, part: Part) -> Candidate:
    parts = (*candidate.parts[:index], part, *candidate.parts[index + 1 :])
    return Candidate(parts, "refined")
