"""Batches on the device: normalised, erased and mixed there, with random numbers of their own."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..evaluation.broken import Broken
from ..evaluation.distributed import World
from .augment import training_transform
from .data import Splits
from .sampling import Augmented, EpochOrder, Streamed, collate
from .seeds import BATCH, ORDER, seed_everything, seed_host

_log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """What one forward pass takes.

    Attributes:
        index: number of the batch in the epoch.
        images: [B, C, H, W] float32, normalised.
        target: class indices [B], or soft targets [B, K] where images are mixed.
    """

    index: int
    images: Tensor
    target: Tensor


class TrainBatches:
    """The batches of the training set, from any place of any epoch on.

    Args:
        splits: from `open_splits`.
        config: from `tokenzoo.evaluation.data_config`.
        args: options of the run.
        world: this process among all.

    Attributes:
        broken: pictures that could not be read so far, by name.
    """

    def __init__(self, splits: Splits, config: dict[str, Any], args: argparse.Namespace, world: World) -> None:
        self.args, self.world, self.num_classes = args, world, splits.num_classes
        self.broken: dict[str, str] = {}
        transform = training_transform(config, args)
        if splits.stream:
            self.order = None
            self.dataset = Streamed(splits.train, transform, args.seed, world.rank)
            self._length = len(splits.train) // args.batch_size
        else:
            self.order = EpochOrder(
                len(splits.train), args.batch_size, args.seed, world.rank, world.size, args.aug_repeats
            )
            self.dataset = Augmented(splits.train, transform, args.seed)
            self._length = self.order.batches
        # workers of a stream start anew with every epoch: their readers know the epoch then
        self.loader = DataLoader(
            self.dataset, args.batch_size, sampler=self.order, num_workers=args.workers, collate_fn=collate,
            drop_last=True, pin_memory=world.device.type == "cuda",
            persistent_workers=args.workers > 0 and not splits.stream,
        )  # fmt: skip
        shape = (1, -1, 1, 1)
        self.mean = torch.tensor(config["mean"], device=world.device).mul(255).view(shape)
        self.std = torch.tensor(config["std"], device=world.device).mul(255).view(shape)
        self.erase, self.mix = _erasing(args, world), _mixing(args, splits.num_classes)

    def __len__(self) -> int:
        return self._length

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from number `first` on.

        Raises:
            ValueError: a target that the classifier has no class for, or a stream that ends early.
        """
        device, mixes = self.world.device, self.mix is not None and not self._mixed_enough(epoch)
        seed_host(self.args.seed, ORDER, epoch, self.world.rank)  # the loader seeds its workers from here
        if self.order is not None:
            self.order.start(epoch, first)
            batches, skipped = iter(self.loader), 0
        else:
            self.dataset.start(epoch)
            batches, skipped = islice(iter(self.loader), len(self)), first
        index = first - skipped - 1
        for index, (images, target, broken) in enumerate(batches, first - skipped):
            self._note(broken)
            if index < first:  # a stream can only be read through
                continue
            self._check(target)
            # what follows, the model's own draws included, depends on the batch alone
            seed_everything(self.args.seed, BATCH, epoch, index, self.world.rank)
            images = images.to(device, non_blocking=True).float().sub_(self.mean).div_(self.std)
            target = target.to(device, non_blocking=True)
            if self.erase is not None:
                images = self.erase(images)
            if mixes:
                images, target = self.mix(images, target)
            if self.args.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            yield Batch(index, images, target)
        if index + 1 < len(self):
            raise ValueError(
                f"epoch {epoch} ended after {index + 1} of {len(self)} batches: {self.args.train_split!r} in "
                f"{self.args.data_dir} has shards that cannot be read, or a reader without a readable one"
            )

    def _mixed_enough(self, epoch: int) -> bool:
        return 0 < self.args.mixup_off_epoch <= epoch

    def _note(self, broken: list[Broken]) -> None:
        for name, reason in broken:
            if name not in self.broken:
                self.broken[name] = reason
                _log.warning("picture %s cannot be read (%s); training goes on without it", name, reason)

    def _check(self, target: Tensor) -> None:
        low, high = int(target.min()), int(target.max())
        if low < 0 or high >= self.num_classes:
            raise ValueError(
                f"class count mismatch: a picture has class index {low if low < 0 else high}, the classifier "
                f"{self.num_classes} classes; give --num-classes, or a --class-map"
            )


def _erasing(args: argparse.Namespace, world: World) -> Any:
    from timm.data.random_erasing import RandomErasing

    if args.reprob == 0 or args.no_aug:
        return None
    return RandomErasing(args.reprob, mode=args.remode, max_count=args.recount, device=world.device)


def _mixing(args: argparse.Namespace, num_classes: int) -> Any:
    from timm.data import Mixup

    if args.mixup == 0 and args.cutmix == 0 and args.cutmix_minmax is None:
        return None
    return Mixup(
        args.mixup, args.cutmix, args.cutmix_minmax, args.mixup_prob, args.mixup_switch_prob, args.mixup_mode,
        label_smoothing=args.smoothing, num_classes=num_classes,
    )  # fmt: skip
