"""Standard errors of scores over a whole data set, and of differences on the same images."""

from __future__ import annotations

import numpy as np

from .confusion import scores


def bootstrap_miou(areas: np.ndarray, resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """mIoU of data sets drawn with replacement from the images: counts are summed over each draw, then scored.

    The draws depend on the seed and the number of images only, so two runs over the same images get the same draws
    and their values can be subtracted. The error takes images as independent: for neighbouring frames of a film it
    is too small.

    Args:
        areas: counts of every image [n, 3, K], see `tokenzoo.evaluation.segmentation.confusion.areas`.
        resamples: how many data sets are drawn.
        seed: of the draws.

    Returns:
        [resamples], as shares.
    """
    count = len(areas)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    totals = draws.astype(np.float64) @ areas.reshape(count, -1)
    return scores(totals.reshape(resamples, *areas.shape[1:])).miou


def standard_error(draws: np.ndarray) -> float | None:
    """Standard deviation over bootstrap draws; None if fewer than two of them can be scored.

    Args:
        draws: [resamples], NaN for draws without a labelled pixel.
    """
    draws = draws[~np.isnan(draws)]
    return float(draws.std(ddof=1)) if len(draws) > 1 else None
