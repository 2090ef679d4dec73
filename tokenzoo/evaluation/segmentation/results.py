"""What runs over a segmentation data set reached, with standard errors, as objects and as rows of a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ...adapters.inspect import is_patched
from ...apply.patch import recipe
from ..broken import Broken
from ..classification import Estimate, estimate
from ..runs import Run, param_count
from ..timing import Spread
from .confusion import Scores, scores
from .costs import DenseMacs, DenseSpeed
from .inference import Inference
from .paired import bootstrap_miou, standard_error

SEGMENT_COLUMNS = (
    "model", "data", "split", "method", "method_kwargs", "miou", "miou_se", "diff_miou", "diff_miou_se", "macc",
    "pixel_acc", "diff_pixel_acc", "diff_pixel_acc_se", "agreement", "tokens_out", "attn_impl", "gmacs",
    "gmacs_encoder", "gmacs_decoder", "crop", "img_per_sec", "speedup", "speedup_q1", "speedup_q3", "speed_batch",
    "rounds", "clock", "param_count", "inference", "n_images", "n_skipped", "precision", "iou", "acc",
)  # fmt: skip


class Outcome(NamedTuple):
    """What was counted for one run.

    Attributes:
        run: which one.
        model: its model.
        area: right, predicted and labelled pixels by image and class [n, 3, K].
        agreeing: labelled pixels with the unpatched model's prediction.
        macs: multiply-adds of one crop, None if unknown.
    """

    run: Run
    model: nn.Module
    area: np.ndarray
    agreeing: int
    macs: DenseMacs | None


@dataclass(frozen=True)
class Segmentation:
    """What one run reached.

    Attributes:
        method: names of the methods, "unpatched" without one.
        method_kwargs: options as given.
        label: both in one short text.
        recipe: what `tokenzoo.patch_model` takes to get this run again; None if unpatched.
        n_images: images seen.
        scores: over the whole data set, as shares.
        miou: percent, with its standard error over bootstrap draws of the images.
        diff_miou: this run minus the unpatched model in the same draws; None for the unpatched model.
        diff_pixel_acc: mean over the images of the difference in pixel accuracy, percent points; None likewise.
        agreement: percent of the labelled pixels with the unpatched model's prediction.
        macs: multiply-adds of one crop, None if unknown.
        speed: times, None if not measured.
        param_count: millions.
    """

    method: str
    method_kwargs: dict[str, Any]
    label: str
    recipe: dict[str, Any] | None
    n_images: int
    scores: Scores
    miou: Estimate
    diff_miou: Estimate | None
    diff_pixel_acc: Estimate | None
    agreement: float
    macs: DenseMacs | None
    speed: DenseSpeed | None
    param_count: float

    @property
    def img_per_sec(self) -> float | None:
        """Crops per second, median over the rounds; None if not measured."""
        return None if self.speed is None else self.speed.batch_size / Spread.of(self.speed.step_times).median

    def row(self, classes: Sequence[str]) -> dict[str, Any]:
        """Flat values in percent; None where there is nothing to judge by.

        Args:
            classes: names by index.
        """
        macs, speed = self.macs, self.speed
        ratio = None if speed is None else Spread.of(speed.speedups)
        return {
            "method": self.method,
            "method_kwargs": self.method_kwargs,
            "miou": _rounded(self.miou.mean),
            "miou_se": _rounded(self.miou.se),
            "diff_miou": self.diff_miou and _rounded(self.diff_miou.mean),
            "diff_miou_se": self.diff_miou and _rounded(self.diff_miou.se),
            "macc": _rounded(100 * self.scores.macc),
            "pixel_acc": _rounded(100 * self.scores.aacc),
            "diff_pixel_acc": self.diff_pixel_acc and _rounded(self.diff_pixel_acc.mean),
            "diff_pixel_acc_se": self.diff_pixel_acc and _rounded(self.diff_pixel_acc.se),
            "agreement": _rounded(self.agreement),
            "tokens_out": macs and _rounded(macs.tokens_out, 2),
            "attn_impl": macs.attn_impl if macs else "",
            "gmacs": macs and _rounded((macs.encoder + macs.decoder) / 1e9, 6),
            "gmacs_encoder": macs and _rounded(macs.encoder / 1e9, 6),
            "gmacs_decoder": macs and _rounded(macs.decoder / 1e9, 6),
            "img_per_sec": _rounded(self.img_per_sec, 2),
            "speedup": ratio and _rounded(ratio.median),
            "speedup_q1": ratio and _rounded(ratio.q1),
            "speedup_q3": ratio and _rounded(ratio.q3),
            "speed_batch": speed and speed.batch_size,
            "rounds": speed and len(speed.step_times),
            "clock": speed.clock if speed else "",
            "param_count": self.param_count,
            "n_images": self.n_images,
            "iou": {name: _rounded(100 * value) for name, value in zip(classes, self.scores.iou)},
            "acc": {name: _rounded(100 * value) for name, value in zip(classes, self.scores.acc)},
            "recipe": self.recipe,
        }


class SegmentationReport(NamedTuple):
    """Results of all runs over one data set.

    Attributes:
        results: one a run, the unpatched model first.
        skipped: images left out, with reasons.
        resumed: images whose counts were there already.
        classes: names by index.
        crop: height and width that multiply-adds and speed are of.
        inference: how images went through.
    """

    results: list[Segmentation]
    skipped: list[Broken]
    resumed: int
    classes: list[str]
    crop: tuple[int, int]
    inference: Inference

    def rows(self) -> list[dict[str, Any]]:
        """Flat values, one dict a run."""
        common = {"crop": f"{self.crop[0]}x{self.crop[1]}", "inference": str(self.inference)}
        return [{**common, "n_skipped": len(self.skipped), **r.row(self.classes)} for r in self.results]


def _rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None or math.isnan(value) else round(float(value), digits)


def summarize(
    outcomes: Sequence[Outcome], speeds: Sequence[DenseSpeed] | None, resamples: int, seed: int
) -> list[Segmentation]:
    """Scores, paired differences and standard errors.

    Args:
        outcomes: of all runs over the same images in the same order, the unpatched model first.
        speeds: of the same runs, None if not measured.
        resamples: bootstrap draws.
        seed: of the draws.
    """
    results = []
    base, base_draws, base_acc = None, None, None
    for index, outcome in enumerate(outcomes):
        total = scores(outcome.area.sum(0))
        draws = 100 * bootstrap_miou(outcome.area, resamples, seed)
        by_picture = 100 * scores(outcome.area).aacc
        if base is None:
            base, base_draws, base_acc = total, draws, by_picture
        results.append(
            Segmentation(
                method=outcome.run.name,
                method_kwargs=outcome.run.settings(),
                label=outcome.run.label,
                recipe=recipe(outcome.model) if is_patched(outcome.model) else None,
                n_images=len(outcome.area),
                scores=total,
                miou=Estimate(100 * float(total.miou), standard_error(draws)),
                diff_miou=Estimate(100 * float(total.miou - base.miou), standard_error(draws - base_draws))
                if index
                else None,
                diff_pixel_acc=_mean_difference(by_picture - base_acc) if index else None,
                agreement=_share(outcome.agreeing, outcome.area[:, 2].sum()),
                macs=outcome.macs,
                speed=speeds[index] if speeds else None,
                param_count=param_count(outcome.model),
            )
        )
    return results


def _mean_difference(differences: np.ndarray) -> Estimate:
    """Over the images that have a labelled pixel."""
    there = differences[~np.isnan(differences)]
    return estimate(torch.from_numpy(there / 100)) if len(there) else Estimate(math.nan, None)


def _share(part: float, whole: float) -> float:
    return 100 * part / whole if whole else math.nan
