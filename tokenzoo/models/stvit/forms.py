"""The two published forms of a semantic unit: for maps of two windows a side, and for maps of any size.

A form knows which rows every query reads; all parameters are those of the blocks that it is given.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.cells.neighbourhoods import from_windows, pad_to_windows, pool_windows, rows_around, to_windows
from .masks import bin_starts, exact_bias, released_bias


class Seen(NamedTuple):
    """Rows that the windows of a map see.

    Attributes:
        rows: [M, K] int64.
        bias: added to the logits of these [M, K]; None for nothing.
    """

    rows: Tensor
    bias: Tensor | None = None


class Places(NamedTuple):
    """What each step of a unit reads, for one size of the map.

    Attributes:
        generate: rows of the image that windows see when tokens are made.
        refine: when they are refined; None for all.
        local: semantic tokens of the same window, rows in the order of windows.
        among: what is added to the logits of all semantic tokens [1, m]; None for nothing.
        restore: semantic tokens that the image tokens of a window see; None for all.
    """

    generate: Seen
    refine: Seen | None
    local: Seen
    among: Tensor | None = None
    restore: Seen | None = None


class Whole(NamedTuple):
    """The form for classification: all semantic tokens read all image tokens, and are read by them.

    Attributes:
        window: tokens of a window's side; the map has two windows a side.
        sample: semantic tokens of a window's side.
    """

    window: int
    sample: int

    def check(self, grid: tuple[int, int]) -> None:
        """Refuses maps of another size than two windows a side.

        Raises:
            ValueError: with what to use instead.
        """
        if tuple(grid) != (2 * self.window, 2 * self.window):
            raise ValueError(
                f"STViTR: form 'classification' needs a map of two windows of {self.window} a side in the third stage, "
                f"not {tuple(grid)}: images of {32 * self.window} pixels, or form='dense', which takes any size"
            )

    def places(self, grid: tuple[int, int], like: Tensor) -> Places:
        """What each step reads on a map of this size (high, wide); `like` gives the device."""
        self.check(grid)
        side, device = self.window, like.device
        reach = side + 3  # published: a window and three more rows and columns towards the centre
        rows = torch.arange(reach, device=device)
        starts = torch.arange(2, device=device) * (side - 3)
        along = starts[:, None] + rows  # [2, reach]
        patches = (along[:, None, :, None] * grid[1] + along[None, :, None, :]).flatten(2).flatten(0, 1)
        local = torch.arange(4 * self.sample**2, device=device).view(4, -1)
        pooled = local + grid[0] * grid[1]  # a window's own pooled tokens stand behind the rows of the map
        return Places(Seen(torch.cat([pooled, patches], 1)), None, Seen(local))

    def generate(self, block: nn.Module, x: Tensor, places: Places) -> Tensor:
        """Map [B, H, W, C] -> semantic tokens in the order of windows [B, M * sample ** 2, C]."""
        s = windowed(pool_windows(x, self.window, self.sample), self.sample)
        return block(s, torch.cat([x.flatten(1, 2), s], 1), *places.generate)

    def refine(self, block: nn.Module, s: Tensor, x: Tensor, places: Places, prompt: Tensor | None) -> Tensor:
        """Semantic tokens, plus a prompt in raster order [1, m, C], read themselves and the map."""
        rows = torch.cat([s, x.flatten(1, 2)], 1)
        if prompt is not None:
            side = 2 * self.sample
            s = s + windowed(prompt.unflatten(1, (side, side)), self.sample)
        return block(s, rows)

    def restore(self, block: nn.Module, x: Tensor, s: Tensor, places: Places) -> Tensor:
        """Image tokens read the semantic ones: map -> map."""
        return block(x.flatten(1, 2), s).unflatten(1, (x.shape[1], x.shape[2]))


class Windowed(NamedTuple):
    """The form for dense prediction: every step reads what lies around a window, on maps of any size.

    Attributes:
        window: tokens of a window's side.
        sample: semantic tokens of a window's side.
        reach: sides of what the windows read when tokens are made and refined, in image tokens, and when the image
            tokens read them, in semantic tokens.
        mask: which keys are hidden. "released": as the released code does, those of the rectangle in the lower right
            corner where both paddings meet (everything where there is no padding), on the semantic grid one of as many
            rows and columns, and what lies outside of the map. "exact": everything that no image token is part of.
            None: nothing.
    """

    window: int
    sample: int
    reach: tuple[int, int, int] = (14, 21, 27)
    mask: str | None = "released"

    def check(self, grid: tuple[int, int]) -> None:
        """Any map will do."""

    def places(self, grid: tuple[int, int], like: Tensor) -> Places:
        """What each step reads on a map of this size (high, wide); `like` gives device and number format."""
        side, sample = self.window, self.sample
        high, wide = (-(-size // side) for size in grid)
        whole, small = (high * side, wide * side), (high * sample, wide * sample)
        local = torch.arange(high * wide * sample**2, device=like.device).view(high * wide, -1)
        image, semantic = self._biases(grid, whole, small, like)
        restore = _seen(rows_around(small, sample, self.reach[2], like.device), semantic)
        of_window = among = None
        if self.mask == "exact":  # the released code hides nothing among semantic tokens
            of_window = to_windows(semantic[:-1].view(1, *small, 1), sample)[0, :, :, 0]
            among = of_window.flatten()[None]
        first, second = (_seen(rows_around(whole, side, reach, like.device), image) for reach in self.reach[:2])
        return Places(first, second, Seen(local, of_window), among, restore)

    def _biases(
        self, grid: tuple[int, int], whole: tuple[int, int], small: tuple[int, int], like: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """What is added to the logits of the places of the padded map and of the semantic grid, outside last."""
        if self.mask is None:
            return None, None
        if self.mask == "released":
            pads = whole[0] - grid[0], whole[1] - grid[1]
            return released_bias(whole, pads, like), released_bias(small, pads, like)
        rows, columns = (torch.arange(size, device=like.device) for size in whole)
        down, right = (bin_starts(size, self.window, self.sample, like.device) for size in whole)
        return exact_bias((rows, columns), grid, like), exact_bias((down, right), grid, like)

    def generate(self, block: nn.Module, x: Tensor, places: Places) -> Tensor:
        """Map [B, H, W, C] -> semantic tokens in the order of windows [B, M * sample ** 2, C]."""
        x = pad_to_windows(x, self.window)
        return block(windowed(pool_windows(x, self.window, self.sample), self.sample), _rows(x), *places.generate)

    def refine(self, block: nn.Module, s: Tensor, x: Tensor, places: Places, prompt: Tensor | None) -> Tensor:
        """Semantic tokens read the map around their window once more."""
        return block(s, _rows(pad_to_windows(x, self.window)), *places.refine)

    def restore(self, block: nn.Module, x: Tensor, s: Tensor, places: Places) -> Tensor:
        """Image tokens read the semantic ones around their window: map -> map."""
        high, wide = x.shape[1], x.shape[2]
        whole = pad_to_windows(x, self.window)
        down, right = whole.shape[1] // self.window, whole.shape[2] // self.window
        grid = from_windows(s.unflatten(1, (down * right, -1)), (down * self.sample, right * self.sample), self.sample)
        out = block(windowed(whole, self.window), _rows(grid), *places.restore).unflatten(1, (down * right, -1))
        return from_windows(out, (whole.shape[1], whole.shape[2]), self.window)[:, :high, :wide]


def windowed(x: Tensor, side: int) -> Tensor:
    """A map [B, H, W, C] as rows in the order of windows [B, H * W, C]."""
    return to_windows(x, side).flatten(1, 2)


def _rows(x: Tensor) -> Tensor:
    """A map [B, H, W, C] as rows, and one of zeros for what lies outside [B, H * W + 1, C]."""
    return F.pad(x.flatten(1, 2), [0, 0, 0, 1])


def _seen(rows: Tensor, added: Tensor | None) -> Seen:
    """Rows [M, K] with what is added to each place [m + 1]; a constant of all keys of a window is left away."""
    if added is None:
        return Seen(rows)
    bias = added[rows]
    return Seen(rows, bias - bias.amax(1, keepdim=True))
