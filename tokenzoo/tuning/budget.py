"""What a candidate may cost: its strength solved for a share of the multiply-adds, or of measured time."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..apply.expected import solve_expected
from ..apply.patch import patched, recipe, solve
from ..core.recipe import Recipe
from ..cost.report import report
from ..evaluation.runs import Precision
from ..evaluation.timing import clock_for, interleave
from .candidates import BY_IMAGE, Candidate
from .state import State

KINDS = ("flops", "latency")
_TRIES = 5
_LEAST = 0.03  # share of the multiply-adds below which no strength is tried


class Fitted(NamedTuple):
    """A candidate at the strength that its budget allows.

    Attributes:
        candidate: what it is.
        recipe: what `tokenzoo.patch_model` takes.
        share: share of the unpatched model's multiply-adds.
        time: share of the unpatched model's time, None where none was measured.
    """

    candidate: Candidate
    recipe: dict[str, Any]
    share: float
    time: float | None = None


class Budget(NamedTuple):
    """A share that nothing exceeds.

    Attributes:
        kind: "flops" or "latency".
        share: in (0, 1].
    """

    kind: str
    share: float

    def __str__(self) -> str:
        return f"{self.kind}={self.share:g}"


class Timer:
    """Time of a patched model over that of the unpatched one, both timed in turn; what was measured is in the state.

    Args:
        plain: the unpatched model.
        own: a copy of it that is patched for the measurement.
        images: the batch that is timed.
        precision: number formats.
        rounds: how often each of the two runs.
        state: where measurements are kept.
        forward: what runs the models.
    """

    def __init__(
        self,
        plain: nn.Module,
        own: nn.Module,
        images: Tensor,
        precision: Precision,
        rounds: int,
        state: State,
        forward: Callable[[nn.Module, Tensor], Any],
    ) -> None:
        self.plain, self.own, self.images = plain, own, images
        self.precision, self.rounds, self.state = precision, rounds, state
        self.clock, self.forward = clock_for(images.device)[0], forward

    def ratio(self, recipe: dict[str, Any]) -> float:
        """Median over the rounds of the patched model's time over the unpatched model's."""
        return self.state.value(f"time over {self.rounds} rounds", recipe, partial(self._measure, recipe))

    def _measure(self, recipe: dict[str, Any]) -> float:
        with torch.inference_mode(), patched(self.own, recipe), self.precision.autocast(self.images.device):
            steps = [partial(self.forward, model, self.images) for model in (self.plain, self.own)]
            interleave(steps, 1, self.clock)
            base, own = interleave(steps, self.rounds, self.clock)
        return round(statistics.median(b / a for a, b in zip(base, own)), 4)


class Fitter:
    """Solves candidates for a budget.

    Args:
        own: a model that may be patched for a while.
        img_size: height and width that multiply-adds are counted at.
        dense: whether recipes give all tokens back.
        timer: needed for time.
        images: some that the search may look at, for what is measured on images.
    """

    def __init__(
        self,
        own: nn.Module,
        img_size: tuple[int, int],
        dense: bool = False,
        timer: Timer | None = None,
        images: Tensor | None = None,
    ) -> None:
        self.own, self.img_size, self.dense, self.timer, self.images = own, img_size, dense, timer, images
        self._overhead: dict[str, float] = {}  # time beyond the share of multiply-adds, as last seen of each method

    def fit(self, candidate: Candidate, budget: Budget) -> Fitted:
        """The candidate, as strong as it has to be and no stronger.

        Raises:
            ValueError, TypeError: a method that the model refuses or that needs training, or a budget out of reach.
        """
        if budget.kind == "flops":
            return self._at(candidate, budget.share)
        return self._within_time(candidate, budget.share)

    def _at(self, candidate: Candidate, share: float) -> Fitted:
        if candidate.schedule == BY_IMAGE:
            return self._by_image(candidate, share)
        solved = solve(self.own, candidate.recipe(self.dense), share, self.img_size)
        before = {name for name, _ in self.own.named_parameters()}
        with patched(self.own, solved):
            added = [name for name, _ in self.own.named_parameters() if name not in before]
            if added:
                raise ValueError(f"{candidate.name} brings parameters that are not trained ({added[0]}, ...)")
            return Fitted(candidate, recipe(self.own), report(self.own, self.img_size).ratio)

    def _by_image(self, candidate: Candidate, share: float) -> Fitted:
        if self.images is None:
            raise ValueError(f"{candidate.label} is measured on images, and none were given")
        asked = Recipe.parse(candidate.parts[0].method(), dense=self.dense)
        cost, solved = solve_expected(self.own, asked, share, self.images, patched, at_most=True)
        if cost > share:
            raise ValueError(f"{share:g} of the multiply-adds cannot be reached by {candidate.label}")
        with patched(self.own, solved):
            return Fitted(candidate, recipe(self.own), cost)

    def _within_time(self, candidate: Candidate, share: float) -> Fitted:
        overhead = self._overhead.get(candidate.name, 0.0)
        reached, why = "", ""
        for _ in range(_TRIES):
            target = min(1.0, share - overhead)
            if target < _LEAST:
                break
            try:
                fitted = self._at(candidate, target)
            except ValueError as error:
                if not reached:
                    raise
                why = f"; {error}"
                break
            fitted = fitted._replace(time=self.timer.ratio(fitted.recipe))
            self._overhead[candidate.name] = overhead = fitted.time - target + 0.002
            if fitted.time <= share:
                return fitted
            reached = f", which takes {fitted.time:.3f} of the time at {fitted.share:.3f} of the multiply-adds"
        raise ValueError(f"latency={share:g} was not reached by {candidate.label}{reached}{why}")
