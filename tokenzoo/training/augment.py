"""How a training picture becomes an image: timm's transform, in the colours that the model takes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from PIL import Image


def training_transform(config: dict[str, Any], args: argparse.Namespace) -> Callable[[Image.Image], Any]:
    """A PIL image to a uint8 tensor or array [C, H, W]; normalising and erasing follow on the device.

    Args:
        config: from `tokenzoo.evaluation.data_config`.
        args: options of the run.

    Raises:
        ValueError: an auto-augment string that timm does not read.
    """
    from timm.data import create_transform

    try:
        transform = create_transform(
            config["input_size"], is_training=True, no_aug=args.no_aug, train_crop_mode=args.train_crop_mode,
            scale=args.scale, ratio=args.ratio, hflip=args.hflip, vflip=args.vflip, color_jitter=args.color_jitter,
            auto_augment=args.aa, interpolation=args.train_interpolation, mean=config["mean"], std=config["std"],
            use_prefetcher=True,
        )  # fmt: skip
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(
            f"timm cannot build the augmentation ({type(error).__name__}: {error}); check --aa {args.aa!r}, "
            f"--train-crop-mode {args.train_crop_mode!r} and --train-interpolation {args.train_interpolation!r}"
        ) from error
    for operation in _operations(transform.transforms):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = Posterize(operation.aug_fn)
    return Colours(config["input_size"][0], transform)


def _operations(steps: Iterable[Any]) -> Iterator[Any]:
    """The operations of timm's augmentation policies, which are lists of lists."""
    from timm.data.auto_augment import AugmentOp

    for step in steps:
        if isinstance(step, AugmentOp):
            yield step
        elif isinstance(step, (list, tuple)):
            yield from _operations(step)
        else:
            yield from _operations([getattr(step, "ops", ()), getattr(step, "policy", ())])


class Posterize:
    """timm's operation where it keeps no bit at all, which recent Pillow refuses: a black image, as before.

    Args:
        kept: timm's function for one bit and more.
    """

    def __init__(self, kept: Callable[..., Image.Image]) -> None:
        self.kept = kept

    def __call__(self, image: Image.Image, bits: int, **options: Any) -> Image.Image:
        return self.kept(image, bits, **options) if bits > 0 else image.point(lambda _: 0)


class Colours:
    """The number of channels that the model takes, then the rest.

    Args:
        channels: 1 for grey images, else 3.
        rest: what follows.
    """

    def __init__(self, channels: int, rest: Callable[[Image.Image], Any]) -> None:
        self.mode, self.rest = "L" if channels == 1 else "RGB", rest

    def __call__(self, image: Image.Image) -> Any:
        return self.rest(image.convert(self.mode))
