"""What a search found, as a table of figures from images that it did not look at."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from torch import Tensor

from ..evaluation.classification import Estimate, estimate
from ..evaluation.results import number, table
from .budget import Budget, Fitted
from .images import Split
from .scores import Score

ROLES = {
    "unpatched": "the model as it is",
    "winner": "best on the images of the search",
    "default": "best method as it comes, without a schedule of its own",
    "finalist": "next best",
    "weaker": "the winner's schedule for a larger share",
}


class Row(NamedTuple):
    """One recipe, judged by images that the search did not look at.

    Attributes:
        label: methods and schedule.
        role: one of `ROLES`.
        budget: what it was solved for, "" for the unpatched model.
        recipe: what `tokenzoo.patch_model` takes, None for the unpatched model.
        share: share of the unpatched model's multiply-adds.
        time: share of its time, None where it was not measured.
        value: mean and standard error; percent for accuracy.
        difference: to the unpatched model on the same images, likewise; None for it.
        against_default: to the row "default" of the same budget, likewise; None where there is none.
        front: no other row was both cheaper and better on the images of the search.
    """

    label: str
    role: str
    budget: str
    recipe: dict[str, Any] | None
    share: float
    time: float | None
    value: Estimate
    difference: Estimate | None
    against_default: Estimate | None
    front: bool

    @property
    def cost(self) -> float:
        """Time where it was measured, else multiply-adds."""
        return self.share if self.time is None else self.time


class Finding(NamedTuple):
    """A recipe that gets a row.

    Attributes:
        fitted: the recipe and its cost.
        role: one of `ROLES`.
        budget: what it was solved for.
        searched: mean on the images of the search, and how many of them.
    """

    fitted: Fitted
    role: str
    budget: Budget
    searched: tuple[float, int]


def values_of(values: Tensor, score: Score) -> Estimate:
    """Mean and standard error of values per image [n], in percent where they are shares."""
    found = estimate(values)
    scale = 1 if score.percent else 100
    return Estimate(found.mean / scale, None if found.se is None else found.se / scale)


def make_rows(findings: list[Finding], final: Any, score: Score) -> list[Row]:
    """The table, dearest first.

    Args:
        findings: what gets a row.
        final: gives the values [n] of a recipe on the images that the search did not look at, None for unpatched.
        score: what is compared.
    """
    plain = final(None)
    defaults = {f.budget: final(f.fitted.recipe) for f in findings if f.role == "default"}
    time = 1.0 if any(f.fitted.time is not None for f in findings) else None
    rows = [Row("unpatched", "unpatched", "", None, 1.0, time, values_of(plain, score), None, None, True)]
    for found in findings:
        fitted, own = found.fitted, final(found.fitted.recipe)
        default = None if found.role in ("default", "weaker") else defaults.get(found.budget)
        rows.append(
            Row(
                label=fitted.candidate.label,
                role=found.role,
                budget=str(found.budget),
                recipe=fitted.recipe,
                share=fitted.share,
                time=fitted.time,
                value=values_of(own, score),
                difference=values_of(own - plain, score),
                against_default=None if default is None else values_of(own - default, score),
                front=not any(_beats(other, found) for other in findings),
            )
        )
    return sorted(rows, key=lambda row: (-row.cost, list(ROLES).index(row.role)))


def _beats(other: Finding, found: Finding) -> bool:
    costs = [f.fitted.share if f.fitted.time is None else f.fitted.time for f in (other, found)]
    (theirs, seen), (ours, count) = other.searched, found.searched
    as_good = costs[0] <= costs[1] and theirs >= ours and seen == count
    return as_good and (costs[0] < costs[1] or theirs > ours)


@dataclass(frozen=True)
class Tuning:
    """What `tokenzoo.tune` found.

    Attributes:
        rows: the unpatched model and the recipes, dearest first; figures from the held-out images alone.
        refused: methods that took no part, and candidates that missed the budget, with the reason.
        score: what is compared: "accuracy", "kl" or "cosine".
        title: its name in the table.
        split: which images searched, and which reported.
        tried: recipes that were judged by the images of the search.
        stopped: whether the time was up before the search was through.
        seconds: that the measurements took, those of an earlier start included.
    """

    rows: tuple[Row, ...]
    refused: dict[str, str]
    score: str
    title: str
    split: Split
    tried: int
    stopped: bool
    seconds: float

    @property
    def winners(self) -> tuple[Row, ...]:
        """The best recipe of every budget by the images of the search, in the order of the budgets."""
        return tuple(row for row in self.rows if row.role == "winner")

    @property
    def recipe(self) -> dict[str, Any]:
        """The winning recipe, that of the smallest budget where there are several."""
        return self.winners[-1].recipe

    def __str__(self) -> str:
        timed = any(row.time is not None for row in self.rows)
        header = ("recipe", "chosen as", "GMACs %", *(("time %",) if timed else ()), self.title, "to unpatched")
        header = (*header, "to best default", "front")
        body = [
            (
                row.label,
                f"{row.role} {row.budget}".strip(),
                number(100 * row.share, 1),
                *((number(None if row.time is None else 100 * row.time, 1),) if timed else ()),
                self._said(row.value),
                self._said(row.difference, sign=True),
                self._said(row.against_default, sign=True),
                "*" if row.front else "",
            )
            for row in self.rows
        ]
        lines = [
            f"{len(self.split.held_out)} held-out images, none of the {len(self.split.search)} that the search went by "
            f"({self.tried} recipes); differences are paired, ± one standard error",
            table(body, header),
            "front: no row of the table was cheaper and better on the images of the search",
        ]
        if self.stopped:
            lines.append("the time was up before the search was through; the state goes on from here, with more of it")
        if self.refused:
            lines += ["not in the search:", *(f"  {name}: {why}" for name, why in self.refused.items())]
        return "\n".join(lines)

    def _said(self, value: Estimate | None, sign: bool = False) -> str:
        digits = 2 if self.score == "accuracy" else 4
        return "-" if value is None else f"{number(value.mean, digits, sign)} ± {number(value.se, digits)}"

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON-safe values."""
        rows = [
            {k: v._asdict() if isinstance(v, Estimate) else v for k, v in row._asdict().items()} for row in self.rows
        ]
        keys = ("refused", "score", "tried", "stopped", "seconds")
        split = {name: list(images) for name, images in self.split._asdict().items()}
        return {"rows": rows, "split": split, **{key: getattr(self, key) for key in keys}}

    def save(self, folder: str | Path, environment: dict[str, Any] | None = None) -> list[Path]:
        """Writes `best.yaml` (the winner; `best_flops=0.6.yaml` each of several), the other recipes, and `tune.json`.

        Args:
            folder: made where it is missing.
            environment: what the figures depend on besides, from `tokenzoo.evaluation.environment`.

        Returns:
            The files.
        """
        folder = Path(folder)
        (folder / "recipes").mkdir(parents=True, exist_ok=True)
        files = []
        several = len(self.winners) > 1
        for row in self.winners:
            files.append(_write(folder / (f"best_{row.budget}.yaml" if several else "best.yaml"), self._yaml(row)))
        for i, row in enumerate(self.rows):
            if row.recipe is not None:
                name = row.label.replace(", ", "_").replace(" ", "_")
                files.append(_write(folder / "recipes" / f"{i:02d}_{name}.yaml", self._yaml(row)))
        text = json.dumps({"environment": environment or {}, **self.to_dict()}, indent=2)
        return [*files, _write(folder / "tune.json", text + "\n")]

    def _yaml(self, row: Row) -> str:
        about = (
            f"# {row.label}, found by tokenzoo.tune for {row.budget}: {100 * row.share:.1f} % of the multiply-adds\n"
            f"# {self.title} {self._said(row.value)}, {self._said(row.difference, sign=True)} to the unpatched model, "
            f"on {len(self.split.held_out)} images that the search did not look at\n"
        )
        return about + yaml.safe_dump(row.recipe, sort_keys=False, default_flow_style=None)


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path
