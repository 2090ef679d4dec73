"""From images to batches: timm's transforms at the size of the model, and a loader that accounts for broken files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from .broken import Broken
from .data import Pictures, PictureStream
from .distributed import ALONE, World
from .runs import image_size

_log = logging.getLogger(__name__)


def data_config(
    model: nn.Module,
    img_size: Sequence[int] | None = None,
    crop_pct: float | None = None,
    crop_mode: str | None = None,
    interpolation: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> dict[str, Any]:
    """How images become tensors: timm's `resolve_data_config` at the size of the model, with overrides.

    Args:
        model: a timm model; its `pretrained_cfg` gives what is not overridden.
        img_size: one side or height and width.
        crop_pct: side of the crop over the side after resizing.
        crop_mode: "center", "squash" or "border".
        interpolation: of the resizing.
        mean: of the channels, one value or one per channel.
        std: likewise.

    Raises:
        ValueError: mean or std for another number of channels, a crop outside (0, 1].
    """
    from timm.data import resolve_data_config

    size = image_size(model, img_size)
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise ValueError(f"--crop-pct {crop_pct} is not in (0, 1]")
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) not in (1, size[0]):
            raise ValueError(
                f"--{name} has {len(values)} values; the model takes {size[0]} channels, give 1 or {size[0]}"
            )
    given = {"input_size": size, "crop_pct": crop_pct, "crop_mode": crop_mode, "interpolation": interpolation}
    given |= {"mean": mean, "std": std}
    config = resolve_data_config({k: v for k, v in given.items() if v is not None}, model=model)
    for name in ("mean", "std"):
        if len(config[name]) != size[0]:
            raise ValueError(
                f"{type(model).__name__} takes {size[0]} channels, its configuration has a {name} for "
                f"{len(config[name])}; give --{name} with 1 or {size[0]} values"
            )
    return config


class PictureLoader:
    """Batches of images and targets; broken images raise, or are left out and listed in `skipped`.

    Args:
        pictures: from `open_pictures`.
        config: from `data_config`.
        batch_size: images read together; a batch with broken ones is shorter.
        workers: processes that decode, 0 decodes in this one.
        skip_broken: leave broken images out.
        world: processes that share the images, whole batches each, so that batches are those of one process alone. All
            read a stream, and each computes every n-th batch of it.
    """

    def __init__(
        self,
        pictures: Pictures | PictureStream,
        config: dict[str, Any],
        batch_size: int = 64,
        workers: int = 0,
        skip_broken: bool = False,
        world: World = ALONE,
    ) -> None:
        from timm.data import create_transform

        if batch_size < 1:
            raise ValueError(f"--batch-size {batch_size} is not positive")
        self.pictures = pictures
        self.skip_broken = skip_broken
        self.skipped: list[Broken] = []
        pictures.transform = _Transform("L" if config["input_size"][0] == 1 else "RGB", create_transform(**config))
        self._every, self._first = 1, 0
        own: Any = pictures
        if isinstance(pictures, IterableDataset):
            workers = 0  # more would read the stream more than once
            self._every, self._first = world.size, world.rank
        elif world.size > 1:
            count = -(-len(pictures) // batch_size)
            if count < world.size and world.main:
                _log.warning(
                    "%d processes share %d batches, some have nothing to do; lower --batch-size", world.size, count
                )
            part = world.share(count)
            own = Subset(pictures, range(part.start * batch_size, min(part.stop * batch_size, len(pictures))))
        if not isinstance(own, IterableDataset):
            workers = min(workers, -(-len(own) // batch_size))
        self._loader = DataLoader(own, batch_size, num_workers=workers, collate_fn=_collate)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.skipped = []
        for index, (images, targets, broken) in enumerate(self._loader):
            if index % self._every != self._first:
                continue
            for name, reason in broken:
                if not self.skip_broken:
                    raise ValueError(
                        f"image {name} cannot be read ({reason}); repair or remove it, or leave such files out with "
                        "--skip-broken"
                    )
            self.skipped += broken
            if len(targets):
                yield images, targets
        if self.skipped:
            _log.warning("%d broken images left out: %s", len(self.skipped), ", ".join(b.name for b in self.skipped))


class _Transform:
    """Colour mode, then timm's transform."""

    def __init__(self, mode: str, rest: Callable[[Image.Image], Tensor]) -> None:
        self.mode = mode
        self.rest = rest

    def __call__(self, image: Image.Image) -> Tensor:
        return self.rest(image.convert(self.mode))


def _collate(items: list[tuple[Tensor, int] | Broken]) -> tuple[Tensor, Tensor, list[Broken]]:
    good = [item for item in items if not isinstance(item, Broken)]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    return images, torch.tensor([target for _, target in good]), [item for item in items if isinstance(item, Broken)]
