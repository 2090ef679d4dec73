"""Counts of a step at the model's own image size, worked out when a recipe is put on."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .tokens import Layout

_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # torch 2.6 lacks it


class Resolved(NamedTuple):
    """What the strength of a step comes to where the model's own image size leads, as plain integers.

    Compiled code is guarded by what it reads: by these numbers, not by the rate that they follow from.

    Attributes:
        n: tokens that enter, prefix included.
        grid: patches (high, wide) of the image.
        n_out: tokens that leave.
        count: what `Method.count` says of n tokens.
        fewer: the same of 0 to n - 1 tokens, for images with padding; empty where no method of the recipe pads.
    """

    n: int
    grid: tuple[int, int]
    n_out: int
    count: Any
    fewer: tuple[Any, ...] = ()

    def holds(self, layout: Layout) -> bool:
        """Whether the counts are those of a sequence; an exported program with open height and width keeps the rule."""
        return not _exporting() and tuple(layout.grid) == self.grid
