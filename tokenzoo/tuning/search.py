"""The search for one budget: candidates, halving, pairs, refinement, and what of it gets a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..adapters.backbone import BackboneInfo
from .budget import Budget, Fitted, Fitter
from .candidates import Candidate, pairs, seeds
from .clock import Clock
from .halving import Ranked, halve, planned, rungs
from .judge import Judge
from .outcome import Finding
from .refine import refine

_KEPT = 6  # candidates that all images of the search are spent on, at least
_REFINED = 2
_FINALISTS = 2  # rows besides the winner and the best default
_PAIRED = 4  # methods that pairs are made of
_WEAKER = 2  # larger shares that the winner's schedule is shown at


class Search:
    """Runs budgets one after the other.

    Args:
        judge: scores recipes.
        fitter: solves candidates for a budget.
        info: the model.
        names: of the methods.
        paired: whether pairs are tried.
        trials: changes to try on a recipe.
        clock: says when to stop.
        bar: a progress bar.
    """

    def __init__(
        self,
        judge: Judge,
        fitter: Fitter,
        info: BackboneInfo,
        names: list[str],
        paired: bool,
        trials: int,
        clock: Clock,
        bar: Any,
    ) -> None:
        self.judge, self.fitter, self.info, self.names = judge, fitter, info, names
        self.paired, self.trials, self.clock, self.bar = paired, trials, clock, bar
        self.refused: dict[str, str] = {}
        self._looked: set[str] = set()

    @property
    def tried(self) -> int:
        """Recipes that images of the search were spent on."""
        return len(self._looked)

    def run(self, budget: Budget) -> list[Finding]:
        """What gets a row for a budget, the winner first.

        Raises:
            ValueError: no candidate can be had at this cost.
        """
        every = len(self.judge.split.search)
        self.bar.set_description(f"{budget}: strengths")
        begin = self._fitted(budget)
        if not begin:
            raise ValueError(f"no method reaches {budget} on this model ({_some(self.refused)})")
        ranked = self._halved(begin, f"{budget}: halving")
        best = [r for r in ranked if len(r.values) == len(ranked[0].values)]
        if self.paired and len(ranked[0].values) == every:
            new = [self._try(candidate, budget, self.refused) for candidate in self._pairs(ranked)]
            new = [fitted for fitted in new if fitted is not None]
            more = self._halved(new, f"{budget}: pairs") if new and not self.clock() else []
            best += [r for r in more if len(r.values) == every]
        best.sort(key=lambda r: -r.mean)
        if self.trials and len(best[0].values) == every:
            self.bar.set_description(f"{budget}: blocks")
            counts = (self.judge.cuts[max(0, len(self.judge.cuts) - 3)], every)
            better = [
                refine(r, lambda c: self.fitter.fit(c, budget), self._look, counts, self.info, self.trials, self.clock)
                for r in _one_each(best)[:_REFINED]
            ]
            known = {repr(r.fitted.recipe) for r in better}
            best = better + [r for r in best if repr(r.fitted.recipe) not in known]
            best.sort(key=lambda r: -r.mean)
        return self._findings(best, ranked, budget)

    def _pairs(self, ranked: list[Ranked]) -> list[Candidate]:
        singles = [r.fitted.candidate for r in _one_each(ranked) if len(r.fitted.candidate.parts) == 1]
        return pairs(singles[:_PAIRED], self.info)

    def _findings(self, best: list[Ranked], ranked: list[Ranked], budget: Budget) -> list[Finding]:
        every, stopped = len(self.judge.split.search), self.clock()
        chosen = [(best[0].fitted, "winner", budget)]
        taken = {repr(best[0].fitted.recipe)}
        default = next((r.fitted for r in ranked if r.fitted.candidate.schedule == "default"), None)
        others = [*([(default, "default")] if default else []), *((r.fitted, "finalist") for r in best[1:])]
        for fitted, role in others:
            if repr(fitted.recipe) not in taken and len(chosen) < 2 + _FINALISTS:
                taken.add(repr(fitted.recipe))
                chosen.append((fitted, role, budget))
        for k in range(1, 1 if stopped else _WEAKER + 1):
            larger = Budget(budget.kind, round(budget.share + (1 - budget.share) * k / (_WEAKER + 1), 3))
            fitted = self._try(best[0].fitted.candidate, larger, {})
            if fitted is not None and repr(fitted.recipe) not in taken:
                taken.add(repr(fitted.recipe))
                chosen.append((fitted, "weaker", larger))
        seen = {repr(r.fitted.recipe): r.values for r in (*ranked, *best)}
        if not stopped:
            seen = {repr(fitted.recipe): self._look(fitted, every) for fitted, *_ in chosen}
        searched = [seen[repr(fitted.recipe)] for fitted, *_ in chosen]
        return [Finding(*choice, (x.mean().item(), len(x))) for choice, x in zip(chosen, searched)]

    def _fitted(self, budget: Budget) -> list[Fitted]:
        """All candidates that the budget can be met with, every method as it comes first."""
        columns: dict[str, list[Candidate]] = {}
        for name in self.names:
            try:
                columns[name] = list(seeds(name, self.info))
            except (ValueError, TypeError) as error:
                self.refused[name] = str(error)
        longest = max((len(column) for column in columns.values()), default=0)
        found: dict[str, Fitted] = {}
        missed: dict[str, dict[str, str]] = {name: {} for name in columns}
        for row in range(longest):
            for name, column in columns.items():
                if row < len(column) and not (self.clock() and found):
                    fitted = self._try(column[row], budget, missed[name])
                    if fitted is not None:
                        found.setdefault(repr(fitted.recipe), fitted)
        for name, reasons in missed.items():
            if reasons and len(reasons) == len(columns[name]):  # once is enough
                reasons = {name: next(iter(reasons.values()))}
            self.refused.update({what: why for what, why in reasons.items() if what not in self.refused})
        return list(found.values())

    def _try(self, candidate: Candidate, budget: Budget, reasons: dict[str, str]) -> Fitted | None:
        """A candidate at its budget; None, with the reason noted, where it cannot be had."""
        try:
            return self.fitter.fit(candidate, budget)
        except (ValueError, TypeError) as error:
            reasons[candidate.label] = " ".join(str(error).split())
            return None

    def _halved(self, candidates: list[Fitted], word: str) -> list[Ranked]:
        self.bar.set_description(word)
        counts = rungs(len(candidates), len(self.judge.split.search), _KEPT)
        self._expect(planned(len(candidates), counts, _KEPT))
        group = self.judge.state.world.size
        ahead = None if group == 1 else self._ahead
        return halve(candidates, self._look, counts, _KEPT, self.clock, ahead, group)

    def _ahead(self, candidates: Sequence[Fitted], count: int) -> None:
        self.judge.ahead([fitted.recipe for fitted in candidates], count)

    def _expect(self, images: int) -> None:
        """Gives the bar a length: what halving takes, and about what follows it."""
        searched, held_out = len(self.judge.split.search), len(self.judge.split.held_out)
        rest = _REFINED * self.trials * searched // 2 + (_FINALISTS + _WEAKER + 3) * held_out
        self.bar.total = self.bar.n + images + rest
        self.bar.refresh()

    def _look(self, fitted: Fitted, count: int) -> Tensor:
        self._looked.add(repr(fitted.recipe))
        return self.judge.search(fitted.recipe, count)


def _some(reasons: dict[str, str], most: int = 3) -> str:
    """A few reasons, those about the budget first, and how many more there are."""
    order = sorted(reasons, key=lambda name: "reached" not in reasons[name])
    more = f"; and {len(order) - most} more" if len(order) > most else ""
    return "; ".join(f"{name}: {reasons[name]}" for name in order[:most]) + more


def _one_each(ranked: list[Ranked]) -> list[Ranked]:
    """The best schedule of every method, best first."""
    return list({r.fitted.candidate.name: r for r in reversed(ranked)}.values())[::-1]
