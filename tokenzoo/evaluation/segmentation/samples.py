"""Images with class masks read one by one, every fault of a file named."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from .confusion import IGNORE, reduce_zero_label
from .files import Files
from .kinds import KINDS
from .readers import Pair


class Sample(NamedTuple):
    """One image.

    Attributes:
        image: RGB, as stored: no rotation by EXIF, as in the reference pipelines.
        mask: class of every pixel [H, W] uint8, 255 for ignored ones; None without masks.
        name: path below the folder of images, without suffix.
    """

    image: Image.Image
    mask: np.ndarray | None
    name: str


class BrokenSample(ValueError):
    """An image or a mask that cannot be used.

    Attributes:
        name: of the sample.
        reason: file and what is wrong with it.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class SegmentationDataset:
    """Images and masks, read one by one; item i is image i or raises `BrokenSample`.

    Args:
        files: where they lie.
        pairs: what belongs together.
        kind: a key of `segmentation_kinds.KINDS`.
        split: as asked for.
        classes: names by index, None if unknown.
        num_classes: how many there are, None if unknown.
        palette: a colour (r, g, b) for each class; 255 of them if their number is unknown.
        ignore: values in the mask files that become 255.
        zero_label: after that, 0 becomes 255 and the others are numbered from 0.
        masks: read masks; False gives None for them.
    """

    def __init__(
        self,
        files: Files,
        pairs: Sequence[Pair],
        kind: str,
        split: str | None,
        classes: list[str] | None,
        num_classes: int | None,
        palette: tuple[tuple[int, int, int], ...],
        ignore: tuple[int, ...] = (),
        zero_label: bool = False,
        masks: bool = True,
    ) -> None:
        self.files, self.pairs, self.kind, self.split = files, list(pairs), kind, split
        self.classes, self.num_classes, self.palette = classes, num_classes, palette
        self.ignore, self.zero_label, self.masks = ignore, zero_label, masks

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Sample:
        pair = self.pairs[index]
        image = self._decode(pair, pair.image, "image")
        if image.mode.startswith(("I", "F")):  # 16-bit and float values would be cut off at 255
            raise BrokenSample(
                pair.name, f"image {self._path(pair.image)} has values beyond 8 bits ({image.mode}); store 8 bits"
            )
        image = image.convert("RGB")
        if not self.masks:
            return Sample(image, None, pair.name)
        mask = self._mask(pair)
        if mask.shape != (image.height, image.width):
            height, width = mask.shape
            raise BrokenSample(
                pair.name,
                f"image {self._path(pair.image)} is {image.width}x{image.height}, its mask {self._path(pair.mask)} "
                f"is {width}x{height} (width x height); give masks of the size of their images",
            )
        return Sample(image, mask, pair.name)

    @property
    def without_mask(self) -> list[str]:
        """Names of images for which no mask was found."""
        return [pair.name for pair in self.pairs if pair.mask is None]

    def subset(self, indices: Sequence[int]) -> SegmentationDataset:
        """The same data set with some of its images.

        Args:
            indices: which ones.
        """
        pairs = [self.pairs[i] for i in indices]
        return SegmentationDataset(
            self.files, pairs, self.kind, self.split, self.classes, self.num_classes, self.palette, self.ignore,
            self.zero_label, self.masks,
        )  # fmt: skip

    def sizes(self) -> list[tuple[int | None, int | None]]:
        """Bytes of each image and of its mask; None for a file that is not there."""
        return [(self._size(pair.image), self._size(pair.mask)) for pair in self.pairs]

    def _size(self, name: str | None) -> int | None:
        try:
            return None if name is None else self.files.size(name)
        except OSError:
            return None

    def _path(self, name: str) -> str:
        return f"{self.files}/{name}"

    def _decode(self, pair: Pair, name: str, what: str) -> Image.Image:
        try:
            image = Image.open(io.BytesIO(self.files.read(name)))
            image.load()
        except MemoryError:
            raise
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error and more
            unknown = isinstance(error, UnidentifiedImageError)  # its text names a file object
            reason = "not an image in a format that Pillow knows" if unknown else f"{type(error).__name__}: {error}"
            raise BrokenSample(pair.name, f"{what} {self._path(name)} cannot be read ({reason})") from error
        return image

    def _mask(self, pair: Pair) -> np.ndarray:
        if pair.mask is None:
            raise BrokenSample(
                pair.name, f"image {self._path(pair.image)} has no mask; expected {KINDS[self.kind].layout}"
            )
        mask, path = self._decode(pair, pair.mask, "mask"), self._path(pair.mask)
        values = np.asarray(mask)  # palette files give indices
        if values.ndim != 2:
            raise BrokenSample(
                pair.name,
                f"mask {path} has colours (mode {mask.mode}), not class indices; give a PNG with one channel or "
                "a palette",
            )
        if values.size and (values.min() < 0 or values.max() > 255 or values.dtype.kind == "f"):
            raise BrokenSample(pair.name, f"mask {path} (mode {mask.mode}) holds values outside 0 to 255")
        values = values.astype(np.uint8)
        if pair.table is not None:
            values = pair.table[values]
        if self.ignore:
            values = np.where(np.isin(values, self.ignore), np.uint8(IGNORE), values)
        if self.zero_label:
            values = reduce_zero_label(values)
        if self.num_classes is not None:
            wrong = values[(values >= self.num_classes) & (values != IGNORE)]
            if wrong.size:
                raise BrokenSample(pair.name, f"mask {path} holds {_above(int(wrong.max()), self)}")
        return values


def _above(label: int, dataset: SegmentationDataset) -> str:
    shifted = f" (value {label + 1} in the file)" if dataset.zero_label else ""
    return (
        f"class {label}{shifted}, there are only {dataset.num_classes}; name further values to ignore, or give the "
        "right number of classes"
    )
