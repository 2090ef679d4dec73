"""fourier: the low frequencies of the grid of patches, on a smaller grid."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.filtering import filtered
from ..core.method import BlockShape, Method, Step
from ..core.options import pair, sides
from ..core.registry import register
from ..core.schedule import Grid, cells_of
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens
from ..core.traits import BEFORE, Traits
from ..maps import TokenMap


@register
@dataclass(frozen=True, kw_only=True)
class Fourier(Method):
    """Keeps the low spatial frequencies of the patches, as a smaller grid of tokens, at chosen blocks.

    A cosine transform (DCT-II) along both axes of the grid, its lowest frequencies, and the inverse transform at the
    smaller size: the same fixed weights for every image, two small matrices in all. Where the patches no longer form
    the full grid (after another reduction), their sequence in raster order is filtered as `dct` does. The way back
    interpolates.

    Args:
        stride: patches per token, (down, right) or one number for both.
        grid: tokens (down, right) instead of a stride.
        rescale: constants stay as they are; False is the published transform, between orthonormal bases, in which they
            grow with the square root of the reduction, for models that were trained with it.
        layers: blocks to act in, before attention; by default one, at a quarter of the depth.

    Source: Wang et al., "Fourier-VLM: Compressing Vision Tokens in the Frequency Domain for Large Vision-Language
    Models", 2025, where it stands between tower and language model.
    """

    stride: int | tuple[int, int] = pair(2, "both numbers must be at least 1")
    grid: tuple[int, int] | None = pair(None, "both numbers must be at least 1", none=True, both=True)
    rescale: bool = True
    prop_attn: bool = False

    name = "fourier"
    source = "Fourier-VLM, Wang et al., 2025"
    kind = "merge"
    schedule = Grid(
        layers=lambda depth: (depth // 4,), cells=lambda m, layout: cells_of(sides(m.stride), layout),
        size=lambda m: None if m.grid is None and m.stride == 1 else m.grid or sides(m.stride), instead=("stride",),
    )  # fmt: skip
    traits = Traits(
        place=BEFORE, sizes=lambda m: m.prop_attn, positions=True, proportional=lambda m: m.prop_attn,
        products=lambda m, before, after, layout: (_products(m, before, after, layout),) * 2,
    )  # fmt: skip

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        cells = step.count(tokens.length, tokens.layout)
        return filtered(tokens, cells, lambda n: self.schedule.remaining(n, step, tokens.layout), self.rescale)

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        return _products(self, n, n_out, layout) * shape.dim


def _products(method: Fourier, n: int, n_out: int, layout: Layout) -> int:
    """Multiply-adds per channel: along both axes of a full grid, else along the sequence."""
    (high, wide), (down, right) = layout.grid, method.grid or cells_of(sides(method.stride), layout)
    if n - layout.num_prefix != layout.num_patches:
        return (n - layout.num_prefix) * (n_out - layout.num_prefix)
    return high * down * wide + down * wide * right
