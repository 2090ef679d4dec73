"""FastVGGT: tokens of several images merge in front of attention, above all into the first one, and come apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.frames import merge_frames, merge_frames_by_image
from ..core.method import BlockShape, Method, Step
from ..core.options import number, pair
from ..core.registry import register
from ..core.schedule import FrameShare
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens
from ..core.traits import Traits, around
from ..maps import TokenMap
from ..ops.attention import full_precision


@register
@dataclass(frozen=True, kw_only=True)
class FastVGGT(Method):
    """Merges tokens of several images around attention, into the first image and a few patches of the others.

    The images stand in one sequence: they are stacked in rows, `frames` of equal height, and read as one image by the
    model. All patches of the first are destinations, in each other one patch per cell of the grid; all others may merge
    into their most similar destination. Evenly spread tokens are protected: they do not merge, and one that is a
    destination stands twice inside of attention, once merged and once as it is, and reads its own output. The residual
    stream keeps its length, and sizes play no part. Training-free.

    The released code merges queries, keys and values behind their norms and rotations. Here the map acts in front of
    the projections: the same numbers where these are all there is in between, since they are affine; with rotary tables
    or norms of queries and keys, merged tokens are rotated as the destination and normed as they are merged. Similarity
    is in float32 instead of bfloat16. Prefix tokens neither merge nor receive (VGGT's five special tokens per image
    receive; the op takes them). Where the patches no longer form the full grid (after another reduction), the first
    1 / `frames` of the tokens that are left, in raster order, take the place of the first image, and stretches of as
    many tokens as a cell has that of cells.

    Args:
        ratio: share of all tokens to merge, in [0, 1).
        frames: images in the sequence, stacked in rows; it has to divide the rows of patches.
        stride: size of a cell, (down, right) or one number for both.
        protected: share of all tokens that are protected, in [0, 1).
        seed: draws the destination of each cell, in another way in every block; None takes the top left patch.
        clip: merge fewer where the ratio exceeds what can merge, instead of refusing. On by default, as in the released
            code: its ratio of 0.9 is more than can merge with cells of 2 x 2, so all merge that can.

    Source: Shen et al., "FastVGGT: Training-Free Acceleration of Visual Geometry Transformer", arXiv 2025.
    """

    ratio: float = number(0.9, "give the share of the tokens to merge, such as 0.5", least=0, below=1)
    frames: int = number(2, "give the number of images in the sequence, 2 or more", least=2, whole=True)
    stride: int | tuple[int, int] = pair(2, "use 2 or more", area=2, fault="makes cells of one patch")
    protected: float = number(0.1, "give the share of the tokens to protect, such as 0.1", least=0, below=1)
    seed: int | None = number(33, "give a whole number, or None for the top left patch", whole=True, none=True)
    clip: bool = True

    name = "vggt"
    source = "Shen et al., 2025"
    kind = "merge"
    schedule = FrameShare()
    traits = Traits(place=around("attention"), positions=True)

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        self.tokens_out(tokens.length, step, tokens.layout)  # refuses what cannot be
        metric, found = signals.branch_input, step.count(tokens.length, tokens.layout)
        with torch.no_grad(), full_precision(metric):
            if tokens.valid is not None:
                return merge_frames_by_image(tokens, metric, step)
            return merge_frames(tokens, metric, found, step) if found.merged else None

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        found = step.count(n, layout)
        return (found.sources * found.destinations + found.merged) * shape.dim if found.merged else 0
