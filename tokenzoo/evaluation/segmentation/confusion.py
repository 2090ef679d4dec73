"""Segmentation scores from counts over a whole data set: mIoU, mAcc, aAcc, and what each class contributes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

IGNORE = 255


class Scores(NamedTuple):
    """What a confusion matrix says, as shares; NaN where a class has no pixels to judge by.

    Attributes:
        aacc: right pixels among the labelled ones (aAcc).
        macc: mean of `acc` over the classes that are labelled somewhere (mAcc).
        miou: mean of `iou` over the classes that are labelled or predicted somewhere (mIoU).
        iou: intersection over union of each class [K]; 0 for a class that is predicted but never labelled.
        acc: right pixels among those labelled as the class [K].
    """

    aacc: np.ndarray
    macc: np.ndarray
    miou: np.ndarray
    iou: np.ndarray
    acc: np.ndarray


def reduce_zero_label(mask: np.ndarray) -> np.ndarray:
    """Numbers classes from 0 where a mask has 0 for "other": 0 becomes 255, k becomes k - 1, 255 stays.

    Args:
        mask: [...] uint8.
    """
    # in 8 bits 0 - 1 is 255 already; 255 - 1 has to be put back
    return np.where(mask == IGNORE, np.uint8(IGNORE), (mask.astype(np.int16) - 1).astype(np.uint8))


def confusion_matrix(prediction: np.ndarray, mask: np.ndarray, num_classes: int, ignore: int = IGNORE) -> np.ndarray:
    """Pixels by labelled class (rows) and predicted class (columns); ignored pixels are left out.

    Args:
        prediction: predicted classes [H, W], integers.
        mask: labelled classes of the same shape, integers.
        num_classes: K.
        ignore: label of pixels that do not count.

    Returns:
        [K, K] float64.

    Raises:
        ValueError: shapes differ, or a class outside 0 to K - 1.
    """
    if prediction.shape != mask.shape:
        raise ValueError(f"prediction {prediction.shape} and mask {mask.shape} differ in shape; predict at mask size")
    counted = mask != ignore
    label, answer = mask[counted].astype(np.int64), prediction[counted].astype(np.int64)
    for what, values in (("mask", label), ("prediction", answer)):
        if values.size and (values.min() < 0 or values.max() >= num_classes):
            worst = int(values.max() if values.max() >= num_classes else values.min())
            raise ValueError(
                f"the {what} holds class {worst}, there are only {num_classes}; check the number of classes, values to "
                "ignore and whether label 0 has to be reduced"
            )
    counts = np.bincount(label * num_classes + answer, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes).astype(np.float64)


def areas(confusion: np.ndarray) -> np.ndarray:
    """Right, predicted and labelled pixels of each class, all that the scores need.

    Args:
        confusion: [..., K, K], rows labelled, columns predicted.

    Returns:
        [..., 3, K].
    """
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    return np.stack([right, confusion.sum(-2), confusion.sum(-1)], axis=-2)


def scores(area: np.ndarray) -> Scores:
    """Scores of counts that were summed over the images of a whole data set.

    Args:
        area: from `areas`, summed over images [..., 3, K].

    Source: the definition of mmsegmentation.
    """
    right, predicted, labelled = np.moveaxis(np.asarray(area, np.float64), -2, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = right / (predicted + labelled - right)
        acc = right / labelled
        aacc = right.sum(-1) / labelled.sum(-1)
    return Scores(aacc, _mean(acc), _mean(iou), iou, acc)


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis without NaN; NaN where nothing is left."""
    there = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(there, values, 0).sum(-1) / there.sum(-1)
