"""What a recorded forward pass can hold of the images that it was recorded with, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import TransformType, retrieve_all_functorch_interpreters

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


def may_look(x: Tensor) -> bool:
    """Whether the host can read values of the tokens now: not in graphs, nor inside of vmap."""
    if torch.compiler.is_compiling() or why_counts_are_unknown(x) is not None:
        return False
    return all(level.key() != TransformType.Vmap for level in retrieve_all_functorch_interpreters())


def refuse_open_sizes(model: object, images: Tensor) -> None:
    """Refuses to export with an open height or width: the patch grid decides maps and counts, as plain integers.

    Args:
        model: the patched model.
        images: [B, C, H, W].

    Raises:
        ValueError: height or width is a symbol.
    """
    if torch.compiler.is_compiling() and any(isinstance(side, torch.SymInt) for side in images.shape[2:]):
        raise ValueError(
            f"{type(model).__name__}: height and width of the images decide how many tokens are left, and cannot stay "
            "open in an exported graph; export one file per size (tokenzoo export keeps the batch open)"
        )
