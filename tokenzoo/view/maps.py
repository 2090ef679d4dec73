"""Pictures of token maps: which patches each remaining token stands for; and curves of a comparison."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..adapters.inspect import is_patched
from ..adapters.wrappers import backbone_of
from ..core.tokens import Inside, TraceStep
from ..maps import TokenMap
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


def draw_token_maps(
    image: Image.Image, maps: TokenMaps, index: int = 0, columns: int | None = None, side: int = 256, title: str = ""
) -> Image.Image:
    """Draws the picture and one panel a reducing block, with captions and a legend of what occurs.

    Args:
        image: the picture as the model saw it (resized and cropped).
        maps: from `token_maps`.
        index: which image of the batch.
        columns: panels per row; about as many as rows by default.
        side: pixels of a panel's longer side, at least.
        title: line above everything.
    """
    cell = max(4, math.ceil(side / max(maps.grid)))
    high, wide = maps.grid[0] * cell, maps.grid[1] * cell
    resample = Image.Resampling.NEAREST if 3 * image.width < wide else Image.Resampling.LANCZOS
    picture = image.convert("RGB").resize((wide, high), resample)
    pixels = np.asarray(picture, dtype=np.float64) / 255
    tokens = int(maps.blocks[0].tokens_in[index]) if maps.blocks else maps.grid[0] * maps.grid[1]
    panels, seen = [(picture, "picture", f"{tokens} tokens")], []
    for block in maps.blocks:
        assign, origin = block.assign[index].cpu().numpy(), block.origin[index].cpu().numpy()
        kind = patch_kinds(assign, origin)
        labels, kinds = (pixel_labels(values, maps.grid, (high, wide)) for values in (assign, kind))
        panel = paint(pixels, labels, kinds, token_colors(assign, origin), max(1, cell // 12))
        counts = f"{int(block.tokens_in[index])} -> {int(block.tokens_out[index])} tokens"
        counts += " inside" if block.inside else ""
        panels.append((to_image(panel), f"block {block.block}: {block.method}", counts))
        seen.append(set(kind.tolist()))
    legend = [(swatch(kind), LEGEND[kind]) for kind in sorted(set().union(*seen))]
    return compose(panels, legend, title, columns)


def plot_curves(
    rows: Sequence[Mapping[str, Any]],
    path: str | Path,
    x: str = "gmacs",
    y: str = "top1",
    error: str | None = None,
    xlabel: str | None = None,
    ylabel: str | None = None,
    title: str = "",
) -> None:
    """Draws one curve a method, with error bars, and the unpatched model as a star with a line through it.

    Args:
        rows: one mapping a run with `method` ("unpatched" for none) and the columns named; rows whose x or y is
            missing or None are left out.
        path: picture to write; the suffix decides the format.
        x: column across, for instance gmacs or infer_samples_per_sec.
        y: column upwards, for instance top1.
        error: column of the half length of the error bars; by default `y` + "_se" where there is one.
        xlabel: text for x; the column's name by default.
        ylabel: text for y.
        title: line above.

    Raises:
        ValueError: no row has both columns.
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ImportError("curves need matplotlib; pip install 'tokenzoo[plot]'") from missing
    rows = [row for row in rows if row.get(x) is not None and row.get(y) is not None]
    if not rows:
        raise ValueError(f"no row has both {x!r} and {y!r}: there is no curve to draw")
    error = f"{y}_se" if error is None else error
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    marks = "osD^vPX<>hp*"
    names = [n for n in dict.fromkeys(row["method"] for row in rows) if n != "unpatched"]
    for number, name in enumerate(names):
        own = sorted((row for row in rows if row["method"] == name), key=lambda row: row[x])
        axes.errorbar(
            [row[x] for row in own],
            [row[y] for row in own],
            yerr=[row.get(error) or 0.0 for row in own],
            color=colormaps["tab20"](2 * number % 20 + number // 10 % 2),  # ten strong colours, then their light ones
            marker=marks[number % len(marks)],
            markersize=5,
            linewidth=1.4,
            elinewidth=0.9,
            capsize=2.5,
            label=name,
        )
    for row in (row for row in rows if row["method"] == "unpatched"):
        axes.axhline(row[y], color="0.6", linewidth=0.9, linestyle="--", zorder=0)
        axes.errorbar(
            row[x], row[y], yerr=row.get(error) or 0.0, color="black", marker="*", markersize=12, capsize=2.5,
            linestyle="none", label="unpatched",
        )  # fmt: skip
    axes.set_xlabel(xlabel or x)
    axes.set_ylabel(ylabel or y)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=150)
