"""The hand-over: a selector is asked for every image, and rows that go are marked."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..maps import TokenMap
from ..ops.rows import scatter_values
from .base import Selector
from .budget import prompts_of, spread
from .gather import rows_at
from .passing import PROMPT, TOLD
from .reading import watch, watch_result
from .rows import NewRows, VisualRows, mark, placed, slots_of
from .signals import TowerSignals, VisualSignals
from .towers import heads_of, reader_of


class Piece(NamedTuple):
    """What a selector is asked about at once: an image, or one of its crops.

    Attributes:
        image: its number in the call.
        rows: rows of the image [N] int64, on the device of the rows.
        keep: how many have to be left.
        grid: rows (high, wide) where they form a grid.
        part: crop of each row [N]; zeros where the piece is one crop.
        place: (row, column) of each row in its crop [N, 2].
        crop: number of the crop in the call, None for several.
    """

    image: int
    rows: Tensor
    keep: int
    grid: tuple[int, int] | None
    part: Tensor
    place: Tensor
    crop: int | None


def choose(inner: Any, plan: Any, modality: str, out: Any, seen: dict[Any, Any], given: dict[str, Any]) -> None:
    """Marks the rows that go in what `get_image_features` gives, in place.

    Args:
        inner: the multimodal model.
        plan: its `VlmPlan`.
        modality: "image" or "video".
        out: what upstream gives.
        seen: what layers of the tower were given.
        given: arguments of the call.
    """
    family, selector = plan.family, plan.selector
    features = family.features(out)
    rows = list(features)
    places = family.places(inner, modality, seen, given)
    if [len(p) for p in places] != [len(r) for r in rows]:
        raise RuntimeError(
            f"the {family.name} family lays out {[len(p) for p in places]} rows per {modality}, the model "
            f"{[len(r) for r in rows]}; this release of transformers packs rows in another way than those tried "
            f"({family.tried})"
        )
    counts, device = [len(r) for r in rows], rows[0].device if rows else None
    pieces = _pieces(inner, family, selector, modality, places, counts, device)
    tower = _tower(inner, family, modality, seen, given, counts)
    new = list(rows)
    kept = [torch.ones(len(r), dtype=torch.bool, device=r.device) for r in rows]
    told = [torch.arange(len(r), device=r.device) for r in rows]
    groups: dict[Any, list[Piece]] = defaultdict(list)
    for piece in pieces:
        if piece.keep == len(piece.rows):
            continue
        if piece.keep == 0:
            kept[piece.image][piece.rows] = False
            told[piece.image][piece.rows] = -1
        else:
            groups[len(piece.rows), piece.keep, piece.grid].append(piece)
    for (_, keep, grid), group in groups.items():
        _ask(inner, family, selector, tower, rows, group, keep, grid, new, kept, told)
    new = [mark(x, keep) for x, keep in zip(new, kept)]
    family.put(out, new, isinstance(features, Tensor))
    notes = TOLD.get()
    if notes is not None:
        notes.extend((modality, *each) for each in zip(kept, told, places))


def _ask(
    inner: Any, family: Any, selector: Selector, tower: TowerSignals, rows: list[Tensor], group: list[Piece],
    keep: int, grid: tuple[int, int] | None, new: list[Tensor], kept: list[Tensor], told: list[Tensor],
) -> None:  # fmt: skip
    """Asks for pieces of equal size, and notes what becomes of their rows."""
    index = torch.stack([piece.rows for piece in group])
    where = [(piece.image, piece.rows) for piece in group]
    x = rows_at(rows, where)
    features, inside = None, False
    if selector.in_tower_space or "features" in selector.reads:
        features = tower.features(where)
        inside = family.one_to_one and selector.in_tower_space and features is not None
    crops = [piece.crop for piece in group]
    token = tower.class_tokens(crops) if selector.takes_class and None not in crops else None
    part, place = (torch.stack([getattr(piece, name) for piece in group]) for name in ("part", "place"))
    seen = VisualRows(x, grid, features, token, part, place, inside)
    found = selector.map(seen, VisualSignals(tower, where), keep)
    n = x.shape[1]
    if isinstance(found, TokenMap) and found.copies:
        slots, values = found.heads, None
    elif isinstance(found, TokenMap):
        slots = slots_of(found)
        values = family.project(inner, found.apply(seen.tower)) if inside else found.apply(x)
    else:
        slots, values = found.slots, found.x
        values = family.project(inner, values) if found.in_tower_space else values
    _check(selector, slots, keep, n)
    here = scatter_values(n, slots, torch.ones_like(slots), 0).bool()
    assign = _assigned(found, slots, n)
    moved = None if values is None else placed(values.to(x.dtype), slots, n)[0]
    for b, piece in enumerate(group):
        kept[piece.image][index[b]] = here[b]
        told[piece.image][index[b]] = torch.where(assign[b] >= 0, index[b].gather(0, assign[b].clamp(min=0)), -1)
        if moved is not None:
            new[piece.image] = new[piece.image].index_copy(0, index[b], moved[b])


def _check(selector: Selector, slots: Tensor, keep: int, n: int) -> None:
    """Refuses what a selector must not do."""
    if slots.shape[1] > n or (slots.shape[1] != keep and not selector.data_dependent):
        raise RuntimeError(f"{selector.name} left {slots.shape[1]} of {n} rows where {keep} were asked for")


def _assigned(found: TokenMap | NewRows, slots: Tensor, n: int) -> Tensor:
    """Old row whose place each old one went to [B, n], -1 for dropped ones."""
    own = scatter_values(n, slots, slots, -1)
    new = found.assign
    if new is None:
        return own
    moved = torch.where(new >= 0, slots.gather(1, new.clamp(min=0)), -1)
    return torch.where(own >= 0, own, moved)


def _pieces(
    inner: Any, family: Any, selector: Selector, modality: str, places: list[Tensor], counts: list[int], device: Any
) -> list[Piece]:
    """What a selector is asked about, with the share that each gets of the budget.

    Args:
        inner: the multimodal model.
        family: its family.
        selector: with the budget.
        modality: "image" or "video".
        places: (crop, row, column) of every row of every image [n, 3], on the host; infinity for rows that stay.
        counts: rows of every image.
        device: of the rows.
    """
    free = [torch.isfinite(place[:, 0]).nonzero().flatten() for place in places]
    sizes = [len(rows) for rows in free]
    budgets = [selector.count(n) if n else 0 for n in sizes] if selector.keep_total is None else _shared(
        inner, family, selector, modality, counts, sizes
    )  # fmt: skip
    pieces = []
    for image, (place, rows, budget) in enumerate(zip(places, free, budgets)):
        parts = place[rows, 0].round().long()
        whole = selector.unit == "image" and not family.tiles
        one = whole or bool((parts == parts[:1]).all())
        groups = [rows] if one else [rows[parts == p] for p in parts.unique().tolist()]
        own = [len(group) for group in groups]
        alone = family.tiles and selector.keep_total is None
        for group, keep in zip(groups, [selector.count(n) for n in own] if alone else spread(budget, own)):
            if len(group) == 0:
                continue
            spot, part = place[group, 1:], place[group, 0].round().long()
            crop = int(part[0]) if bool((part == part[0]).all()) else None
            part = part - part[0] if whole else torch.zeros_like(part)
            grid = None if crop is None else _grid(spot)
            pieces.append(Piece(image, group.to(device), keep, grid, part.to(device), spot.to(device), crop))
    return pieces


def _shared(
    inner: Any, family: Any, selector: Selector, modality: str, counts: list[int], sizes: list[int]
) -> list[int]:
    """Budgets of images that share that of their prompt."""
    prompt = PROMPT.get()
    if prompt is None:
        raise ValueError(
            f"{selector.name}: keep_total is shared by the images of a prompt, whose words are not known here; call "
            "the model or generate with input_ids, or give keep (per image)"
        )
    owners = prompts_of(prompt.ids, family.token_of(inner.config, modality), counts)
    budgets = [0] * len(sizes)
    for owner in set(owners):
        mine = [i for i, o in enumerate(owners) if o == owner]
        for i, share in zip(mine, spread(selector.keep_total, [sizes[i] for i in mine])):
            budgets[i] = share
    return budgets


def _grid(place: Tensor) -> tuple[int, int] | None:
    """Rows (high, wide) of places that fill a grid row by row; else None."""
    wide = int((place[:, 0] == place[:1, 0]).sum())  # rows in the first line
    if len(place) % wide:
        return None
    down, right = place.view(-1, wide, 2).unbind(-1)
    lines = (down == down[:, :1]).all() & (right == right[:1]).all()
    rising = (down[1:, 0] > down[:-1, 0]).all() & (right[0, 1:] > right[0, :-1]).all()
    return (len(down), wide) if bool(lines & rising) else None


def _tower(
    inner: Any, family: Any, modality: str, seen: dict[Any, Any], given: dict[str, Any], counts: list[int]
) -> TowerSignals:
    """Signals of this pass of the tower."""
    depth, last = len(family.tower_layers(inner)), family.feature_layer(inner)

    def heads(layer: int, queries: int | None) -> Any:
        index = layer if layer >= 0 else min(depth - 1, last + 2 + layer)
        if index not in seen:
            raise ValueError(f"layer {layer} of the tower was not read; name it in the selector's layers(depth)")
        return heads_of(seen, index, queries)

    def prompts() -> list[Tensor]:
        prompt = PROMPT.get()
        if prompt is None:
            raise ValueError(
                "the words of the prompt were asked for, but images are encoded without them here; call the model or "
                "generate with input_ids"
            )
        owners = prompts_of(prompt.ids, family.token_of(inner.config, modality), counts)
        images = torch.tensor(family.placeholders(inner.config), device=prompt.ids.device)
        words = ~torch.isin(prompt.ids, images)
        words = words if prompt.mask is None else words & prompt.mask.bool()
        embed = inner.get_input_embeddings()
        return [embed(prompt.ids[owner][words[owner]]) for owner in owners]

    return TowerSignals(
        heads,
        family.has_class(inner),
        lambda values: family.carry(inner, modality, values, given),
        lambda x: family.tower_tokens(inner, x),
        prompts,
        lambda: family.row_features(inner, modality, seen, given),
        lambda: family.class_tokens(inner, seen),
        (depth, min(depth - 1, last)),
    )


def watch_tower(inner: Any, family: Any, selector: Selector) -> None:
    """Has noted what a selector needs: inputs of layers of the tower, and what makes queries and keys in those read."""
    layers = list(family.tower_layers(inner))
    depth, last = len(layers), family.feature_layer(inner)
    read = {layer if layer >= 0 else min(depth - 1, last + 2 + layer) for layer in selector.layers(depth)}
    for index in sorted(read | {0} | ({min(depth - 1, last + 1)} if selector.takes_class else set())):
        watch(layers[index], index)
        if index in read:
            for path in reader_of(layers[index]).makes:
                watch_result(layers[index].get_submodule(path), (index, path))
    if family.projector is not None:
        watch(inner.get_submodule(family.projector), "projector")
