"""Successive halving: all candidates on few images, the better half of them on twice as many, and so on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from .budget import Fitted

FEWEST = 32  # images that a candidate is judged by at first


class Ranked(NamedTuple):
    """A candidate and what the search saw of it.

    Attributes:
        fitted: the candidate.
        values: per image [n]; more images for those that came further.
    """

    fitted: Fitted
    values: Tensor

    @property
    def mean(self) -> float:
        """The figure that the search goes by."""
        return self.values.mean().item()


def halvings(images: int) -> tuple[int, ...]:
    """All numbers of images that a round may look at, rising by factors of two to all of them."""
    counts = [images]
    while counts[0] // 2 >= FEWEST:
        counts.insert(0, counts[0] // 2)
    return tuple(counts)


def rungs(candidates: int, images: int, keep: int) -> tuple[int, ...]:
    """Numbers of images of the rounds.

    Args:
        candidates: how many begin.
        images: how many there are.
        keep: how many should be left for the last round.
    """
    rounds = 1 + max(0, math.ceil(math.log2(max(1, candidates) / max(1, keep))))
    return halvings(images)[-rounds:]


def planned(candidates: int, counts: Sequence[int], keep: int) -> int:
    """Images that go through models in all rounds together."""
    total, before = 0, 0
    for count in counts:
        total, before = total + candidates * (count - before), count
        candidates = min(candidates, _left(candidates, keep))
    return total


def _left(candidates: int, keep: int) -> int:
    return max(keep, math.ceil(candidates / 2))


def halve(
    candidates: Sequence[Fitted],
    look: Callable[[Fitted, int], Tensor],
    counts: Sequence[int],
    keep: int,
    out_of_time: Callable[[], bool],
    ahead: Callable[[Sequence[Fitted], int], None] | None = None,
    group: int = 1,
) -> list[Ranked]:
    """All candidates, best first: those that came further before those that were left behind.

    Args:
        candidates: where two are equally good, the earlier one is preferred.
        look: values of a candidate on the first images [n].
        counts: from `rungs`.
        keep: candidates of the last round at least.
        out_of_time: whether to stop; a round that was begun then does not count, unless it is the first.
        ahead: is told which candidates will be looked at on the first images [n], a group at a time.
        group: candidates of a group.
    """
    alive, behind = list(candidates), []
    ranked: list[Ranked] = []
    for count in counts:
        seen: list[Ranked] = []
        for index, fitted in enumerate(alive):
            if out_of_time() and (ranked or seen):
                break
            if ahead is not None and index % group == 0:
                ahead(alive[index : index + group], count)
            seen.append(Ranked(fitted, look(fitted, count)))
        if ranked and len(seen) < len(alive):
            break
        behind = ranked[len(alive) :] + behind
        ranked = sorted(seen, key=lambda r: -r.mean)  # stable
        if len(seen) < len(alive):
            break
        alive = [r.fitted for r in ranked[: _left(len(ranked), keep)]]
    return ranked + behind
