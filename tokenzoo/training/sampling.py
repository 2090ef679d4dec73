"""Which picture comes when, and how it is augmented: by seed, epoch and place in the epoch, nothing else.

So the number of workers, of processes, and of starts after a stop does not change what is drawn, and going on inside an
epoch skips pictures without reading them.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from ..evaluation.broken import Broken
from ..evaluation.data import Pictures
from ..evaluation.streams import IN_A_ROW, StreamWatch
from .seeds import ORDER, PICTURE, seed_host, seed_of


class Key(NamedTuple):
    """A picture of an epoch.

    Attributes:
        epoch: number of the epoch.
        place: number in the epoch, over all processes.
        index: number in the data set.
    """

    epoch: int
    place: int
    index: int


class EpochOrder(Sampler):
    """The pictures of one process in one epoch; the order is the same for any number of processes.

    Args:
        count: pictures in the data set.
        batch_size: of one process.
        seed: of the run.
        rank: of the process.
        size: number of processes; each global batch is dealt out among them.
        repeats: times that a picture comes up, each time augmented anew (repeated augmentation, Hoffer et al., CVPR
            2020); an epoch keeps its length and sees fewer pictures. 0 and 1 do nothing.

    Raises:
        ValueError: fewer pictures than one global batch.
    """

    def __init__(self, count: int, batch_size: int, seed: int, rank: int = 0, size: int = 1, repeats: int = 0) -> None:
        self.batches = count // (batch_size * size)
        if self.batches == 0:
            raise ValueError(
                f"{count} training pictures are fewer than one batch of {batch_size} on {size} process"
                f"{'es' if size > 1 else ''}; lower --batch-size"
            )
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.size, self.repeats = rank, size, max(1, repeats)
        self.epoch = self.first = 0

    def start(self, epoch: int, first: int = 0) -> None:
        """Chooses the epoch and the first batch of the next pass."""
        self.epoch, self.first = epoch, first

    def __len__(self) -> int:
        return (self.batches - self.first) * self.batch_size

    def __iter__(self) -> Iterator[Key]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, ORDER, self.epoch))
        order = torch.randperm(self.count, generator=generator).tolist()
        step = self.batch_size * self.size
        for place in range(self.first * step + self.rank, self.batches * step, self.size):
            yield Key(self.epoch, place, order[place // self.repeats])


class Augmented(Dataset):
    """Pictures augmented by key; one that cannot be read gives way to the next that can, and is named.

    Args:
        pictures: from `tokenzoo.evaluation.open_pictures`.
        transform: timm's, a PIL image to a uint8 tensor or array [C, H, W].
        seed: of the run.
    """

    def __init__(self, pictures: Pictures, transform: Callable[[Any], Any], seed: int) -> None:
        pictures.transform = transform
        self.pictures, self.seed = pictures, seed

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, key: Key) -> tuple[Any, int, list[Broken]]:
        seed_host(self.seed, PICTURE, key.epoch, key.place)
        broken: list[Broken] = []
        for attempt in range(IN_A_ROW):
            item = self.pictures[(key.index + attempt) % len(self.pictures)]
            if not isinstance(item, Broken):
                return (*item, broken)
            broken.append(item)
        raise ValueError(
            f"{IN_A_ROW} pictures in a row cannot be read, the last is {broken[-1].name} ({broken[-1].reason}); "
            "repair the data set"
        )


class Streamed(IterableDataset):
    """One process's part of a stream of timm's (wds/, tfds/, hfids/), augmented by place.

    Args:
        source: timm's iterable data set, opened for training.
        transform: see `Augmented`.
        seed: of the run.
        rank: of the process.
    """

    def __init__(self, source: Any, transform: Callable[[Any], Any], seed: int, rank: int = 0) -> None:
        self.source, self.transform, self.seed, self.rank = source, transform, seed, rank
        self.epoch = 0

    def start(self, epoch: int) -> None:
        """Chooses the epoch of the next pass."""
        self.epoch = epoch
        self.source.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Any, int, list[Broken]]]:
        worker = get_worker_info()
        number = 0 if worker is None else worker.id
        # a reader keeps the state of its shuffling; a fresh one draws by epoch alone
        reader = copy.copy(self.source.reader)
        self._shuffle_shards(reader)
        watch = StreamWatch()
        for place, (image, target) in enumerate(watch.watch(reader)):
            seed_host(self.seed, PICTURE, self.epoch, self.rank, number, place)
            yield self.transform(image), -1 if target is None else int(target), watch.take()

    def _shuffle_shards(self, reader: Any) -> None:
        """Deals the shards anew in every epoch; timm's own shuffling hardly moves those far down a long list, so an
        epoch that reads a part of them would always read the same part."""
        info = getattr(reader, "split_info", None)
        if hasattr(info, "filenames"):
            generator = torch.Generator().manual_seed(seed_of(self.seed, ORDER, self.epoch))
            order = torch.randperm(len(info.filenames), generator=generator).tolist()
            reader.split_info = dataclasses.replace(info, filenames=tuple(info.filenames[i] for i in order))


def collate(items: list[tuple[Any, int, list[Broken]]]) -> tuple[Tensor, Tensor, list[Broken]]:
    """Images uint8 [B, C, H, W], targets [B], and the broken pictures met on the way."""
    from timm.data.loader import fast_collate

    images, targets = fast_collate([(image, target) for image, target, _ in items])
    return images, targets, [broken for _, _, found in items for broken in found]
