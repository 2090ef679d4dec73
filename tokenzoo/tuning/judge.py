"""Runs recipes over images and keeps what every image said of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..apply.patch import patched
from ..evaluation.memory import Pieces
from ..evaluation.runs import Precision
from . import scores
from .halving import halvings
from .images import Split
from .scores import Answer, Score, answer_of
from .state import Job, State


class Judge:
    """Scores of recipes, image by image.

    Args:
        own: a model that may be patched for a while.
        images: [N, C, H, W], on the host.
        labels: [N] or None.
        split: which images search, and which report.
        score: what is compared.
        precision: number formats.
        batch_size: images per step.
        forward: what runs the model.
        state: where measurements are kept.
        tick: called with the number of images that went through a model.
    """

    def __init__(
        self,
        own: nn.Module,
        images: Tensor,
        labels: Tensor | None,
        split: Split,
        score: Score,
        precision: Precision,
        batch_size: int,
        forward: Callable[[nn.Module, Tensor], Any],
        state: State,
        tick: Callable[[int], Any] = lambda count: None,
    ) -> None:
        self.own, self.images, self.labels, self.score = own, images, labels, score
        self.split, self.cuts = split, halvings(len(split.search))
        self.seconds, self.seen = 0.0, 0  # that answers took here, and of how many images
        self.precision, self.batch_size, self.forward = precision, batch_size, forward
        self.state, self.tick = state, tick
        self.device = next(own.parameters()).device
        self._pieces = Pieces(self.device)
        self._reference: dict[int, Tensor] = {}  # of the unpatched model, by image

    def search(self, recipe: dict[str, Any], count: int) -> Tensor:
        """What a search goes by, of the first images that it may look at [count]; count is one of the cuts."""
        found = self.state.values(self._of_search(recipe, count))
        return torch.tensor([value for part in found for value in part], dtype=torch.float64)

    def final(self, recipe: dict[str, Any] | None) -> Tensor:
        """What is reported, of all images that no search looked at [n]."""
        images = self.split.held_out
        found = self.state.values(self._jobs("held out", scores.final, recipe, images, [0, len(images)]))
        return torch.tensor([value for part in found for value in part], dtype=torch.float64)

    def ahead(self, recipes: Sequence[dict[str, Any]], count: int) -> None:
        """Measures what `search` will be asked for, all recipes at once: so several processes have something to do."""
        self.state.values([job for recipe in recipes for job in self._of_search(recipe, count)])

    def _of_search(self, recipe: dict[str, Any], count: int) -> list[Job]:
        bounds = [0, *(cut for cut in self.cuts if cut <= count)]
        return self._jobs("search", scores.search, recipe, self.split.search, bounds)

    def _jobs(
        self, what: str, function: Callable, recipe: dict[str, Any] | None, images: Sequence[int], bounds: Sequence[int]
    ) -> list[Job]:
        jobs = []
        for start, stop in zip(bounds, bounds[1:]):
            for first in range(start, stop, self.batch_size):
                last = min(stop, first + self.batch_size)
                measure = partial(self._measure, function, recipe, list(images[first:last]))
                jobs.append(Job(f"{what}, images {first} to {last}", recipe, measure))
        return jobs

    def _measure(self, function: Callable, recipe: dict[str, Any] | None, images: list[int]) -> list[float]:
        reference = self._of_unpatched(images) if self.score.agreement else None
        labels = None if self.labels is None else self.labels[images]
        answer = self.answer(recipe, images).values
        return [round(value, 6) for value in function(self.score, answer, reference, labels).tolist()]

    def _of_unpatched(self, images: list[int]) -> Tensor:
        missing = [i for i in images if i not in self._reference]
        if missing:
            self._reference.update(zip(missing, self.answer(None, missing).values))
        return torch.stack([self._reference[i] for i in images])

    def answer(self, recipe: dict[str, Any] | None, images: list[int]) -> Answer:
        """What the model says of some images under a recipe, None for unpatched."""

        def step(piece: Tensor) -> Answer:
            with self.precision.autocast(self.device):
                output = self.forward(self.own, piece.to(self.device, self.precision.dtype))
            return answer_of(output, self.own)

        start = time.monotonic()
        with torch.inference_mode(), nullcontext() if recipe is None else patched(self.own, recipe):
            parts = self._pieces.run(step, self.images[images], "unpatched" if recipe is None else str(recipe))
        self.seconds, self.seen = self.seconds + time.monotonic() - start, self.seen + len(images)
        self.tick(len(images))
        return Answer(torch.cat([part.values for part in parts]), parts[0].classes)
