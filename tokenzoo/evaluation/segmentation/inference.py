"""From an image to the class of every pixel at its own size: resizing, windows, scales and flips, in this order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .windows import Model, check_stride, slide_even, slide_mmseg, slide_segmenter

MODES = ("whole", "segmenter", "mmseg", "even")


def keep_ratio_size(height: int, width: int, limits: tuple[int, int]) -> tuple[int, int]:
    """Size after resizing until the long side or the short side meets its limit, whichever comes first.

    Args:
        height: pixels.
        width: pixels.
        limits: (long, short) in pixels.

    Source: mmcv's rescaling, which Segmenter, Expedit and mmsegmentation use.
    """
    factor = min(max(limits) / max(height, width), min(limits) / min(height, width))
    return int(height * factor + 0.5), int(width * factor + 0.5)


def resize_bilinear(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear without antialiasing and rounded to whole grey values, as OpenCV resizes 8-bit images.

    Args:
        picture: [1, 3, H, W] float, 0 to 255.
        size: (height, width).
    """
    if tuple(picture.shape[-2:]) == tuple(size):
        return picture
    return F.interpolate(picture, size, mode="bilinear", align_corners=False).round()


@dataclass(frozen=True)
class Inference:
    """How an image becomes class scores.

    Args:
        mode: "whole" (one forward pass), "segmenter", "mmseg" or "even" (EoMT).
        window: side of the windows, pixels; none for "whole".
        stride: pixels between windows; none for "whole" and "even".
        limits: (long, short) for resizing before, see `keep_ratio_size`; None leaves images at their size.
        scales: factors on `limits` (on the size itself without limits), scores averaged as probabilities.
        flip: also mirrored.
        batch_size: windows at a time.
    """

    mode: str = "whole"
    window: int | None = None
    stride: int | None = None
    limits: tuple[int, int] | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    batch_size: int = 1

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"inference mode {self.mode!r} is unknown; use one of {', '.join(MODES)}")
        needs = {"whole": (), "even": ("window",)}.get(self.mode, ("window", "stride"))
        for name in ("window", "stride"):
            if (getattr(self, name) is None) is (name in needs):
                raise ValueError(f"inference mode {self.mode!r} takes {' and '.join(needs) or 'no window and stride'}")
        if self.mode in ("segmenter", "mmseg"):
            check_stride(self.window, self.window, self.stride, self.stride)
        if self.mode == "even" and (self.limits or self.scales != (1.0,)):
            raise ValueError("inference mode 'even' resizes by itself; leave limits and scales out")
        if not self.scales or min(self.scales) <= 0 or self.batch_size < 1:
            raise ValueError(f"scales {self.scales} and batch size {self.batch_size} have to be positive")

    def __str__(self) -> str:
        parts = [f"{self.mode} windows of {self.window}" if self.window else "whole images"]
        parts += [f"stride {self.stride}"] if self.stride else []
        parts += [f"resized to at most {max(self.limits)}x{min(self.limits)}"] if self.limits else []
        parts += [f"scales {', '.join(f'{s:g}' for s in self.scales)}"] if self.scales != (1.0,) else []
        return ", ".join([*parts, *(["flips"] if self.flip else [])])

    def logits(self, model: Model, image: Tensor) -> Tensor:
        """Class logits [1, K, H', W'] of one resized and normalised image [1, 3, H, W]; H', W' may be other sizes."""
        if self.mode == "whole":
            return model(image).float()
        if self.mode == "even":
            return slide_even(model, image, self.window, self.batch_size)
        slide = slide_segmenter if self.mode == "segmenter" else slide_mmseg
        return slide(model, image, self.window, self.stride, self.batch_size)

    def resized(self, picture: Image.Image, scale: float = 1.0) -> Tensor:
        """The image at the size that it goes into the windows [1, 3, H, W], 0 to 255."""
        height, width = picture.height, picture.width
        if self.mode == "even":
            factor = self.window / min(height, width)
            picture = picture.resize((round(width * factor), round(height * factor)), Image.Resampling.BILINEAR)
            return _to_tensor(picture)
        size = (height, width) if self.limits is None and scale == 1 else None
        if size is None:
            limits = self.limits or (max(height, width), min(height, width))
            size = keep_ratio_size(height, width, tuple(int(limit * scale) for limit in limits))
        return resize_bilinear(_to_tensor(picture), size)

    def crop_size(self, picture: Image.Image) -> tuple[int, int]:
        """Height and width of what goes into the model for an image, the first window where they differ."""
        if self.mode in ("segmenter", "even"):
            return self.window, self.window
        size = tuple(self.resized(picture).shape[-2:])
        return size if self.mode == "whole" else tuple(min(n, self.window) for n in size)


def _to_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).unsqueeze(0).float()


@dataclass(frozen=True)
class Predictor:
    """Class maps of images by one model.

    Args:
        model: normalised images [B, 3, h, w] -> class logits [B, K, h, w].
        mean: of red, green, blue, 0 to 1.
        std: likewise.
        inference: how.
        device: where the model runs.
        dtype: of the images.
    """

    model: Model
    mean: Sequence[float]
    std: Sequence[float]
    inference: Inference = Inference()
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32

    def normalised(self, picture: Tensor) -> Tensor:
        """An image [1, 3, H, W], 0 to 255, as the model takes it."""
        mean, std = (255 * torch.tensor(list(v), device=self.device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return ((picture.to(self.device) - mean) / std).to(self.dtype)

    def __call__(self, picture: Image.Image) -> tuple[np.ndarray, bool]:
        """Predicted classes [H, W] uint8 at the size of the image, and whether all logits were finite."""
        size, finite, total = (picture.height, picture.width), True, None
        for scale in self.inference.scales:
            image = self.normalised(self.inference.resized(picture, scale))
            for flipped in (False, True) if self.inference.flip else (False,):
                logits = self.inference.logits(self.model, image.flip(3) if flipped else image)
                finite = finite and bool(logits.isfinite().all())
                if len(self.inference.scales) == 1 and not self.inference.flip:
                    return labels_at(logits, size), finite
                part = probabilities_at(logits, size, flipped)
                total = part if total is None else total.add_(part)
        return total.argmax(1)[0].to(torch.uint8).cpu().numpy(), finite


def probabilities_at(logits: Tensor, size: tuple[int, int], flipped: bool = False) -> Tensor:
    """Probabilities at another size: logits are resized and mirrored back first, the softmax comes last.

    Args:
        logits: [1, K, H, W].
        size: (height, width).
        flipped: the logits are those of a mirrored image.

    Returns:
        [1, K, height, width].
    """
    logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    return (logits.flip(3) if flipped else logits).softmax(1)


def labels_at(logits: Tensor, size: tuple[int, int], chunk: int = 16) -> np.ndarray:
    """Most likely classes at another size, a few classes at a time: all of them may not fit for a large image.

    Args:
        logits: [1, K, H, W].
        size: (height, width).
        chunk: classes at a time.

    Returns:
        [height, width] uint8; the first class where several are equal.
    """
    best = labels = None
    for start in range(0, logits.shape[1], chunk):
        part = F.interpolate(logits[:, start : start + chunk], size, mode="bilinear", align_corners=False)
        value, index = part.max(1)
        index += start
        if best is None:
            best, labels = value, index
            continue
        better = value > best
        best, labels = torch.where(better, value, best), torch.where(better, index, labels)
    return labels[0].to(torch.uint8).cpu().numpy()
