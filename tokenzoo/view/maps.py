"""Images of token maps: which patches each remaining token stands for."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..adapters.inspect import is_patched
from ..adapters.wrappers import backbone_of
from ..core.tokens import Inside, TraceStep
from ..maps import TokenMap
from .curves import plot_curves
from .panels import (
    LEGEND,
    compose,
    darkened,
    inner_edges,
    mean_colors,
    paint,
    patch_kinds,
    pixel_labels,
    swatch,
    to_image,
    token_colors,
)

__all__ = [
    "BlockMap", "TokenMaps", "draw_block", "draw_token_maps", "group_picture", "plot_curves", "token_maps",
]  # fmt: skip


class BlockMap(NamedTuple):
    """What the patches of the input have become after one block.

    Attributes:
        block: index of the block.
        method: names of the methods that acted there.
        tokens_in: real tokens before [B], prefix included.
        tokens_out: real tokens after [B], prefix included.
        assign: token that each patch of the input went into [B, P], -1 for dropped ones.
        origin: token of the input that heads each token [B, N'], -1 for one without (EViT's fused token).
        inside: the tokens merge around a branch of the block and come apart again after it.
    """

    block: int
    method: str
    tokens_in: Tensor
    tokens_out: Tensor
    assign: Tensor
    origin: Tensor
    inside: bool = False


class TokenMaps(NamedTuple):
    """The maps of one forward pass.

    Attributes:
        grid: patches (high, wide).
        blocks: one entry for each block that reduced something, first to last; those with `inside` leave no trace in
            the entries after them.
    """

    grid: tuple[int, int]
    blocks: tuple[BlockMap, ...]


def token_maps(model: nn.Module, images: Tensor) -> TokenMaps:
    """Runs a patched model and composes its maps: where every patch of the input is after each reducing block.

    Args:
        model: patched, on the device of the images; eval mode gives what inference does.
        images: [B, C, H, W], normalised as the model expects.

    Raises:
        ValueError: the model is not patched.
    """
    if not is_patched(model):
        raise ValueError(
            f"{type(model).__name__} is not patched, it has no token maps; call tokenzoo.patch_model first"
        )
    backbone = backbone_of(model)
    with torch.no_grad():
        # reconstruction takes its steps off the trace: the longest one on the way shows them all
        walked = list(backbone.walk_tokens(images))
        tokens = max(reversed(walked), key=lambda t: len(t.trace))
        layout, batch = tokens.layout, images.shape[0]
        total = layout.num_prefix + layout.num_patches
        origin = assign = torch.arange(total, device=images.device).expand(batch, -1)
        valid = torch.ones_like(assign, dtype=torch.bool)
        blocks: list[BlockMap] = []
        state = _State(assign, origin, valid)
        for done, step in enumerate((*tokens.trace, None)):
            for note in (note for note in tokens.inside if note.after == done):
                inner = state.through(note.map)
                blocks.append(inner.entry(note, state, layout.num_prefix, inside=True))
            if step is None:
                break
            before, state = state, state.through(step.map)
            entry = state.entry(step, before, layout.num_prefix)
            if blocks and blocks[-1].block == step.block and not blocks[-1].inside:  # several methods in one block
                last = blocks.pop()
                entry = entry._replace(tokens_in=last.tokens_in, method=f"{last.method} + {entry.method}")
            blocks.append(entry)
    return TokenMaps(tuple(layout.grid), tuple(blocks))


class _State(NamedTuple):
    """Where the tokens of the input are after some maps."""

    assign: Tensor
    origin: Tensor
    valid: Tensor

    def through(self, token_map: TokenMap) -> _State:
        """The state after one map more."""
        heads = token_map.heads
        assign = torch.where(self.assign >= 0, token_map.assign.gather(1, self.assign.clamp(min=0)), -1)
        origin = torch.where(heads >= 0, self.origin.gather(1, heads.clamp(min=0)), -1)
        valid = token_map.valid
        if valid is None:
            valid = self.valid.gather(1, heads.clamp(min=0)) | (heads < 0)
        return _State(assign, origin, valid)

    def entry(self, step: TraceStep | Inside, before: _State, prefix: int, inside: bool = False) -> BlockMap:
        """What is shown of one step."""
        counts = before.valid.sum(1), self.valid.sum(1)
        return BlockMap(step.block, step.method, *counts, self.assign[:, prefix:], self.origin, inside)


def group_picture(
    image: np.ndarray, assign: Sequence[int] | Tensor, grid: tuple[int, int], colors: np.ndarray | None = None
) -> np.ndarray:
    """Fills every group of patches with its mean colour and draws its inner edge, one pixel wide, in its own colour.

    Dropped patches are darkened, greyed and hatched.

    Args:
        image: [H, W, 3] with values from 0 to 255; H and W are multiples of the grid.
        assign: token of every patch in raster order [P], -1 for dropped ones.
        grid: patches (high, wide).
        colors: colour of token i in row i, values from 0 to 1; a seeded table by default.

    Returns:
        [H, W, 3] uint8.

    Raises:
        ValueError: a size that does not fit the grid, or too few colours.

    Source: the pictures of Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023.
    """
    labels = pixel_labels(np.asarray(assign), grid, image.shape[:2])
    count = int(labels.max(initial=0)) + 1
    if colors is None:
        seeded = random.Random(0)
        colors = np.array([[seeded.random() for _ in range(3)] for _ in range(count)])
    if len(colors) < count:
        raise ValueError(f"colors has {len(colors)} rows, the picture shows token {count - 1}; give one row per token")
    pixels = image.astype(np.float64) / 255
    out = mean_colors(pixels, labels)[labels]
    edge = inner_edges(labels, 1)
    out[edge] = np.asarray(colors, dtype=np.float64)[labels[edge]]
    dropped = labels < 0
    out[dropped] = darkened(pixels)[dropped]
    return (out * 255).astype(np.uint8)


def _on_grid(image: Image.Image, grid: tuple[int, int], side: int) -> Image.Image:
    """The image at a size that is a multiple of the grid, the longer side at least as asked."""
    cell = max(4, math.ceil(side / max(grid)))
    high, wide = grid[0] * cell, grid[1] * cell
    resample = Image.Resampling.NEAREST if 3 * image.width < wide else Image.Resampling.LANCZOS
    return image.convert("RGB").resize((wide, high), resample)


def _painted(
    picture: Image.Image, block: BlockMap, index: int, grid: tuple[int, int]
) -> tuple[Image.Image, set[int]]:
    """A panel, and which kinds of patches are on it."""
    pixels = np.asarray(picture, dtype=np.float64) / 255
    assign, origin = block.assign[index].cpu().numpy(), block.origin[index].cpu().numpy()
    kind = patch_kinds(assign, origin)
    labels, kinds = (pixel_labels(values, grid, pixels.shape[:2]) for values in (assign, kind))
    width = max(1, picture.width // grid[1] // 12)
    return to_image(paint(pixels, labels, kinds, token_colors(assign, origin), width)), set(kind.tolist())


def draw_block(image: Image.Image, maps: TokenMaps, block: int = -1, index: int = 0, side: int = 256) -> Image.Image:
    """Draws what the patches have become after one reducing block, without captions.

    Args:
        image: the picture as the model saw it (resized and cropped).
        maps: from `token_maps`.
        block: which entry of `maps.blocks`.
        index: which image of the batch.
        side: pixels of the longer side, at least.
    """
    return _painted(_on_grid(image, maps.grid, side), maps.blocks[block], index, maps.grid)[0]


def draw_token_maps(
    image: Image.Image,
    maps: TokenMaps,
    index: int = 0,
    columns: int | None = None,
    side: int = 256,
    title: str = "",
    shown: Sequence[int] | None = None,
) -> Image.Image:
    """Draws the picture and one panel a reducing block, with captions and a legend of what occurs.

    Args:
        image: the picture as the model saw it (resized and cropped).
        maps: from `token_maps`.
        index: which image of the batch.
        columns: panels per row; about as many as rows by default.
        side: pixels of a panel's longer side, at least.
        title: line above everything.
        shown: which entries of `maps.blocks` get a panel, all by default.
    """
    picture = _on_grid(image, maps.grid, side)
    tokens = int(maps.blocks[0].tokens_in[index]) if maps.blocks else maps.grid[0] * maps.grid[1]
    panels, seen = [(picture, "picture", f"{tokens} tokens")], []
    for block in maps.blocks if shown is None else [maps.blocks[k] for k in shown]:
        panel, kinds = _painted(picture, block, index, maps.grid)
        counts = f"{int(block.tokens_in[index])} -> {int(block.tokens_out[index])} tokens"
        counts += " inside" if block.inside else ""
        panels.append((panel, f"block {block.block}: {block.method}", counts))
        seen.append(kinds)
    legend = [(swatch(kind), LEGEND[kind]) for kind in sorted(set().union(*seen))]
    return compose(panels, legend, title, columns)

