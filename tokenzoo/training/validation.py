"""Accuracy on the evaluation pictures while a model trains, parted among the processes without counting any twice."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.inspect import is_patched
from ..apply.patch import unpatch_model
from ..evaluation.broken import Broken
from ..evaluation.data import Pictures
from ..evaluation.distributed import World
from ..evaluation.loading import PictureLoader
from ..evaluation.runs import Precision, shared_copy
from .data import Splits


class ValBatches:
    """This process's part of the evaluation pictures.

    Args:
        splits: from `open_splits`.
        config: from `tokenzoo.evaluation.data_config`.
        args: options of the run.
        world: this process among all; a stream is read by the first process alone.
    """

    def __init__(self, splits: Splits, config: dict[str, Any], args: argparse.Namespace, world: World) -> None:
        pictures, self.input_size = splits.val, config["input_size"]
        self.index, self.idle = splits.val_index, False
        if isinstance(pictures, Pictures):
            pictures = _Part(pictures, world.rank, world.size)
        else:
            self.idle = not world.main
            reader = pictures.source.reader
            if world.size > 1 and hasattr(reader, "dist_num_replicas"):  # timm would repeat pictures to even out
                reader.dist_rank, reader.dist_num_replicas = 0, 1
        size = args.validation_batch_size or args.batch_size
        self.loader = PictureLoader(pictures, config, size, args.workers, skip_broken=True)

    def __iter__(self) -> Any:
        for images, target in () if self.idle else self.loader:
            yield images, target if self.index is None else self.index[target]


class _Part(Pictures):
    """Every n-th picture."""

    def __init__(self, pictures: Pictures, rank: int, size: int) -> None:
        super().__init__(pictures.source, pictures.num_classes)
        self.places = range(rank, len(pictures), size)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | Broken:
        return super().__getitem__(self.places[index])


@torch.no_grad()
def validate(
    model: nn.Module,
    batches: ValBatches,
    precision: Precision,
    world: World,
    sharded: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, float]:
    """Cross-entropy and accuracies in percent, over all processes.

    Args:
        model: without a DDP wrapper; its mode is put back afterwards.
        batches: this process's part.
        precision: number formats.
        world: this process among all.
        sharded: what runs the model in all processes at once, where its weights are parted among them.

    Raises:
        ValueError: no picture could be read.
    """
    was = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)  # pictures, loss, top-1, top-5
    forward = model if sharded is None else sharded
    for images, target in batches if sharded is None else _in_step(batches, world):
        with precision.autocast(world.device):
            logits = forward(images.to(world.device))
        if target is None:
            continue
        logits = logits.float().cpu()
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == target.unsqueeze(1)
        loss = F.cross_entropy(logits, target, reduction="sum").double()
        sums += torch.stack([torch.tensor(len(target)).double(), loss, hits[:, 0].sum(), hits.any(1).sum()])
    model.train(was)
    count, loss, top1, top5 = world.total(sums).tolist()
    if count == 0:
        raise ValueError("none of the evaluation pictures can be read; check --data-dir and --val-split")
    return {"loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count, "count": int(count)}


def _in_step(batches: ValBatches, world: World) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The batches, and images without targets as long as any other process has some left."""
    own, images = iter(batches), torch.zeros(1, *batches.input_size)
    while True:
        found = next(own, None)
        if world.total(torch.tensor([float(found is not None)])).item() == 0:
            return
        yield (images, None) if found is None else found


def unpatched_view(model: nn.Module) -> nn.Module:
    """The same weights without reduction; parameters are shared, a method's own are left out."""
    view = shared_copy(model) if is_patched(model) else copy.copy(model)
    return unpatch_model(view) if is_patched(view) else view
