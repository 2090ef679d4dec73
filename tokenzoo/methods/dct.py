"""dct: the low frequencies of the sequence of patches."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.filtering import filtered
from ..core.keep_rate import KeepRate
from ..core.method import BlockShape, Step
from ..core.registry import register
from ..core.schedule import kept_of, kept_patches
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens
from ..core.traits import Traits
from ..maps import TokenMap


@register
@dataclass(frozen=True, kw_only=True)
class DCT(KeepRate):
    """Keeps the low frequencies of the sequence of patches, row by row, as a shorter sequence.

    A cosine transform (DCT-II) along the sequence in raster order, its lowest frequencies, and the inverse transform at
    the shorter length, scaled so that constants stay as they are: a matrix of fixed weights for all pairs of old and
    new patches, the same for every image. `fourier` does it along both axes of the grid, which is cheaper and keeps
    rows apart. The way back interpolates.

    Source: He, Yang, Feng, Yin, Wang, Leng, Lin, "Fourier Transformer: Fast Long Range Modeling by Removing Sequence
    Redundancy with FFT Operator", Findings of ACL 2023, for sequences of text; between attention and MLP of vision
    transformers as a baseline of later work on merging.
    """

    prop_attn: bool = False

    name = "dct"
    source = "Fourier Transformer, He et al., Findings of ACL 2023"
    kind = "merge"
    traits = Traits(
        sizes=lambda m: m.prop_attn, positions=True, proportional=lambda m: m.prop_attn,
        products=lambda m, before, after, layout: ((before - layout.num_prefix) * (after - layout.num_prefix),) * 2,
    )  # fmt: skip

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        if kept_patches(tokens.length, step, tokens.layout) == tokens.num_patches:
            return None  # so it is for images that have fewer
        return filtered(tokens, None, kept_of(step, tokens.layout))

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        return (n - layout.num_prefix) * (n_out - layout.num_prefix) * shape.dim
