"""Facts about a token sequence that hold for a whole forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .misuse import refuse_attribute
from .trace import View


class Layout(NamedTuple):
    """Facts about the token sequence that hold for a whole forward pass.

    Attributes:
        num_prefix: class, distillation, register and added tokens at the front, never reduced.
        has_class: the first token is a class token.
        grid: patches (high, wide) of the image at the input of block 0.
        track_size: token sizes are kept (some method or pooling reads them).
        track_positions: the original index of each token is kept (RoPE, masks, grid methods).
        standalone: the blocks were called without their model; the last one hands back a plain tensor.
        keep_values: the trace keeps the values before every map that drops tokens, so that these can be given back.
        scan_rows: rows of the prefix tokens in the sequence that a model scans; in attention order says nothing.
        added: how many of the prefix tokens are not the model's own (prompts); pooling takes them for patches.
        watch: told what the layers see from there on, see `Tokens.tell`; None when nobody asks.
        joined: prefix tokens that join in front of what is left where the sequence begins; 0 where it begins anew.
        raster: patches stand in the order of the grid after every reduction.
        own_grids: every image has a grid of its own, which nobody knows here: `grid` is one row of all patches, padding
            behind the real ones.
    """

    num_prefix: int
    has_class: bool
    grid: tuple[int, int]
    track_size: bool = False
    track_positions: bool = False
    standalone: bool = False
    keep_values: bool = False
    scan_rows: tuple[int, ...] = ()
    added: int = 0
    watch: Callable[[View], None] | None = None
    raster: bool = False
    joined: int = 0
    own_grids: bool = False

    __getattr__ = refuse_attribute

    @property
    def num_patches(self) -> int:
        """Patch tokens at the input of block 0."""
        return self.grid[0] * self.grid[1]

    @property
    def own_prefix(self) -> int:
        """Prefix tokens that the model has by itself."""
        return self.num_prefix - self.added

    def check_length(self, length: int, model: str) -> None:
        """Refuses a sequence that is not the prefix and the grid.

        Args:
            length: tokens in the sequence.
            model: who got it, for the message.

        Raises:
            ValueError: another number of tokens.
        """
        whole = self.num_prefix + self.num_patches
        if torch.jit.is_tracing():  # the tracer hands sizes out as tensors
            length = int(length)
        if length == whole:
            return
        extra = f" (protect={self.added} of them added)" if self.added else ""
        message = (
            f"{model} got a sequence of {length} tokens, but {self.num_prefix} prefix tokens{extra} and a grid of "
            f"{self.grid[0]} x {self.grid[1]} patches make {whole}; "
        )
        if length > whole - self.added:
            message += (
                f"if prompts were added behind the class token, patch with protect={length - whole + self.added}; "
            )
        raise ValueError(
            f"{message}if the image size has changed, call model.set_input_size(img_size=...); between blocks hand on "
            "what the block before returned, not its values"
        )
