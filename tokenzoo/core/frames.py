"""Merging between several images in one sequence, for tokens in any order and for sequences with padding (FastVGGT).

Shen, Zhang, Qu, Cao, "FastVGGT: Training-Free Acceleration of Visual Geometry Transformer", arXiv 2025.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..maps import BesideMap, ChainMap, KeepMap, MergeMap, TokenMap
from ..ops.draw import fixed_draw
from ..ops.matching.frames import frame_destinations, frame_parts, stretch_destinations
from ..ops.matching.strided import best_destination, split_pairs
from ..ops.rows import known_rows, stable_order
from .adaptive import merge_pairs
from .options import sides
from .schedule.frame_share import FrameCounts, draw_seed, frame_grid, parts_of_grid
from .selection import own_values, raster_order
from .step import Step
from .tokens import Layout, Tokens


def merge_frames(tokens: Tokens, metric: Tensor, found: FrameCounts, step: Step) -> TokenMap:
    """Tokens of all images merge into their destinations; the new order is [prefix, others, destinations, protected].

    Args:
        tokens: the tokens, none of them padding.
        metric: what similarity is measured on [B, N, D].
        found: what the options come to for as many tokens.
        step: the method in its block, with the options `frames`, `stride` and `seed`.
    """
    src, dst, kept = _known_parts(tokens, found, step) or _parts(tokens, found, step)
    pairs = split_pairs(metric, src, dst, found.merged, tokens.layout.num_prefix, tokens.visible)
    merge = MergeMap.of_pairs(pairs, tokens.length)
    return merge if kept.shape[1] == 0 else BesideMap(merge, kept.expand(tokens.x.shape[0], -1))


def _known_parts(tokens: Tokens, found: FrameCounts, step: Step) -> tuple[Tensor, ...] | None:
    """Sources, destinations and protected tokens [1, ...] where plain integers say so: images in their grids."""
    layout, prefix, method = tokens.layout, tokens.layout.num_prefix, step.method
    if tokens.num_patches != layout.num_patches or raster_order(tokens) is not None:
        return None
    first = _first_protected(prefix, found) * found.step
    kept = range(first - prefix, found.kept * found.step - prefix, found.step or 1)

    def numbers() -> tuple[int, ...]:
        grid, seed = frame_grid(method, layout), draw_seed(method, step.block)
        src, dst = parts_of_grid(method.frames, grid, sides(method.stride), seed, kept)
        return (*src, *dst, *kept)

    rows = known_rows(numbers, tokens.x.device)
    sizes = (found.sources, found.destinations, len(kept))
    return None if rows is None else (rows + prefix).unsqueeze(0).split(sizes, dim=1)


def _first_protected(prefix: int, found: FrameCounts) -> int:
    """Number of the first protected token that is no prefix: those stand for themselves anyway."""
    return -(-prefix // max(1, found.step))


def _parts(tokens: Tokens, found: FrameCounts, step: Step) -> tuple[Tensor, ...]:
    """The same by operations, for tokens in any order [B or 1, ...]."""
    prefix, patches, device = tokens.layout.num_prefix, tokens.num_patches, tokens.x.device
    if patches == tokens.layout.num_patches:
        receives = _grid_destinations(tokens.layout, step, device)
    else:
        index = torch.arange(patches, device=device)
        receives = stretch_destinations(index, found.first, _cell(step.method))
    start = _first_protected(prefix, found)
    kept = torch.arange(start, max(start, found.kept), device=device) * found.step - prefix
    parts = [*frame_parts(receives, kept, found.sources, found.destinations), kept]
    by_place = raster_order(tokens)
    return tuple(prefix + (part.unsqueeze(0) if by_place is None else by_place[:, part]) for part in parts)


def merge_frames_by_image(tokens: Tokens, metric: Tensor, step: Step) -> TokenMap:
    """Sequences with padding merge as they would alone; real tokens are in front of padding again.

    Args:
        tokens: the tokens; some are padding.
        metric: what similarity is measured on [B, N, D].
        step: see `merge_frames`.
    """
    layout, patches, prefix = tokens.layout, tokens.num_patches, tokens.layout.num_prefix
    rule = [step.count(prefix + i, layout) for i in range(patches + 1)]
    own = own_values(lambda i: rule[i], tokens)
    merged, twice, _, _, kept, every, first = own.split(1, dim=1)
    place = raster_order(tokens).argsort(dim=1)  # of every patch in raster order, padding last
    receives = stretch_destinations(place, first, _cell(step.method))
    if patches == layout.num_patches:  # some sequences may have all their patches
        whole = tokens.valid_patches.unsqueeze(1) == patches
        receives = torch.where(whole, _grid_destinations(layout, step, place.device)[place], receives)
    receives = receives & tokens.valid[:, prefix:]
    protected = ((place + prefix) % every.clamp(min=1) == 0) & (place + prefix < kept * every)
    protected = protected & tokens.valid[:, prefix:]
    src = torch.arange(prefix, tokens.length, device=place.device).expand(place.shape[0], -1)
    dst = stable_order(~receives)[:, : max(found.destinations for found in rule)] + prefix
    may_receive = torch.zeros_like(tokens.valid)
    may_receive = torch.cat([may_receive[:, :prefix], receives], dim=1)
    value, partner = best_destination(metric, src, dst, tokens.valid, tokens.visible, may_receive)
    # last of the real tokens that are no destinations, so that none of them merges
    value = value.masked_fill(protected & ~receives, torch.finfo(value.dtype).min)
    length = prefix + max(i - found.merged for i, found in enumerate(rule))
    merge = merge_pairs(tokens, src, dst, value, partner, merged, length, True, None, may_receive)
    most = max(found.twice for found in rule)
    if most == 0:
        return merge
    rows = stable_order(~(protected & receives))[:, :most] + prefix
    beside = BesideMap(merge, rows, torch.arange(most, device=rows.device) < twice)
    longest = prefix + max(i - found.merged + found.twice for i, found in enumerate(rule))
    order = stable_order(~beside.valid)[:, :longest]
    return ChainMap(beside, KeepMap(order, beside.n_out, beside.valid.gather(1, order)))


def _cell(method: Any) -> int:
    """Patches of a cell."""
    down, right = sides(method.stride)
    return down * right


def _grid_destinations(layout: Layout, step: Step, device: torch.device) -> Tensor:
    """[M] bool, the destinations of images that have all their patches."""
    method, (high, wide), (down, right) = step.method, frame_grid(step.method, layout), sides(step.method.stride)
    draw = None
    if method.seed is not None:
        cells = (high // down) * (wide // right)
        draw = fixed_draw((method.frames - 1) * cells, draw_seed(method, step.block), device)
        draw = draw.reshape(method.frames - 1, cells)
    return frame_destinations(method.frames, (high, wide), (down, right), device, draw)
