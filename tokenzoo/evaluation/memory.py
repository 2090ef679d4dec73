"""Out-of-memory: telling it from other errors, and running a batch in the largest pieces that fit."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

_log = logging.getLogger(__name__)
_PHRASES = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")
T = TypeVar("T")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on an accelerator or on the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in _PHRASES)


def free_memory(device: torch.device) -> None:
    """Gives cached blocks back, so that a smaller try meets an empty device."""
    gc.collect()
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


class Pieces:
    """Runs batches in pieces; when memory runs out, the size is halved for good and the same images are tried again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.size: int | None = None  # no limit yet

    def run(self, step: Callable[[Tensor], T], images: Tensor, label: str = "model") -> list[T]:
        """Results of `step` on consecutive pieces of the images.

        Args:
            step: called with [b, C, H, W], b at most the size that fitted so far.
            images: [B, C, H, W].
            label: what is running, for the messages.

        Raises:
            ValueError: not even one image fits.
        """
        out: list[T] = []
        start = 0
        while start < len(images):
            piece = images[start : start + (self.size or len(images))]
            reason = None
            try:
                out.append(step(piece))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0] or type(error).__name__
            # outside of the handler: the traceback held the tensors that did not fit
            if reason is None:
                start += len(piece)
                continue
            if len(piece) == 1:
                raise ValueError(
                    f"{label}: not even one image of {tuple(piece.shape[1:])} fits into the memory of {self.device} "
                    f"({reason}); use a smaller --img-size, a smaller model or another --device"
                )
            self.size = (len(piece) + 1) // 2
            _log.warning("%s: out of memory at batch %d, going on with %d", label, len(piece), self.size)
            free_memory(self.device)
        return out
