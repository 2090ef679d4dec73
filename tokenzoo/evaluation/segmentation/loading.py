"""Reading segmentation samples in processes, with broken ones handed on instead of raised, and crops for measuring."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..broken import Broken
from .inference import Predictor
from .samples import BrokenSample, Sample, SegmentationDataset


class _Reader(torch.utils.data.Dataset):
    """Samples, or what is wrong with them."""

    def __init__(self, dataset: SegmentationDataset, indices: Sequence[int]) -> None:
        self.dataset = dataset
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample | Broken:
        try:
            return self.dataset[self.indices[index]]
        except BrokenSample as error:
            return Broken(error.name, error.reason)


def _same(sample: Any) -> Any:
    return sample


def read_samples(dataset: SegmentationDataset, indices: Sequence[int], workers: int) -> Iterator[Sample | Broken]:
    """Samples in order, or what is wrong with them.

    Args:
        dataset: what to read from.
        indices: which ones.
        workers: processes that decode, 0 decodes in this one.
    """
    reader = _Reader(dataset, indices)
    return iter(torch.utils.data.DataLoader(reader, None, num_workers=min(workers, len(indices)), collate_fn=_same))


def first_crops(dataset: SegmentationDataset, predictor: Predictor, count: int) -> Tensor:
    """What goes into the model for the first images that can be read, brought to the size of the first one's.

    Args:
        dataset: what to read from.
        predictor: prepares images.
        count: how many images at most.

    Returns:
        Normalised [n, 3, h, w].

    Raises:
        ValueError: no image can be read.
    """
    crops: list[Tensor] = []
    first: Broken | None = None
    for sample in read_samples(dataset, range(len(dataset)), 0):
        if isinstance(sample, Broken):
            first = first or sample
            continue
        size = tuple(crops[0].shape[-2:]) if crops else predictor.inference.crop_size(sample.image)
        image = predictor.normalised(predictor.inference.resized(sample.image))
        if predictor.inference.mode != "whole" and all(n >= m for n, m in zip(image.shape[-2:], size)):
            crops.append(image[:, :, : size[0], : size[1]])
        else:
            crops.append(torch.nn.functional.interpolate(image, size, mode="bilinear", align_corners=False))
        if len(crops) == count:
            break
    if not crops:
        raise ValueError(f"none of the {len(dataset)} images can be used; the first: {first.reason}")
    return torch.cat(crops)
