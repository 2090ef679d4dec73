"""What a recorded forward pass may not hold: counts of tokens that belong to the images it was recorded with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_one_image: ContextVar[bool] = ContextVar("tokenzoo_one_image", default=False)


@contextmanager
def of_one_image() -> Iterator[None]:
    """Context in which what is recorded is meant for one image alone, so that its own counts may go in (costs)."""
    token = _one_image.set(True)
    try:
        yield
    finally:
        _one_image.reset(token)


def why_counts_are_unknown(x: Tensor) -> str | None:
    """Why counts that depend on the images cannot be read from a tensor now, None where they can.

    Args:
        x: values of the tokens.
    """
    if x.is_meta:
        return "which the meta device, where tensors hold no values, cannot tell"
    if torch.jit.is_tracing() and not _one_image.get():
        return "which tracing (torch.jit.trace, ONNX by TorchScript) would fix at those of the example"
    return None
