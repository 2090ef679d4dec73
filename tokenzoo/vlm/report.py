"""Reports of vision-language models: tower, hand-over, and every layer of the language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..adapters.registry import family_of
from ..cost.report import Report, report
from ..ops.layer_macs import linear_macs
from .counting import LmRow, image_sizes, kept_rows, lm_rows
from .family import VLMFamily, vlm_family_of
from .plans import layer_plans


@dataclass(frozen=True)
class VlmReport:
    """What one prompt costs while it is read.

    Attributes:
        tower: of one crop, None where the tower is of no family that counts it.
        crops: crops of all images.
        selector: name of what chooses rows, "" where nothing does.
        images: rows of each image, before and after.
        handover: multiply-adds of the projector for all rows, and of deciding.
        layers: of the language model.
        unpatched: multiply-adds of the language model's layers without reduction.
        unpatched_bytes: of its cache.
        bounded: counts depend on the images or the prompt, the rows are upper bounds.
    """

    tower: Report | None
    crops: int
    selector: str
    images: tuple[tuple[int, int], ...]
    handover: int
    layers: tuple[LmRow, ...]
    unpatched: int
    unpatched_bytes: int
    bounded: bool = False

    @property
    def prefill(self) -> int:
        """Multiply-adds of the language model's layers."""
        return sum(row.macs for row in self.layers)

    @property
    def ratio(self) -> float:
        """Share of the unpatched language model's multiply-adds."""
        return self.prefill / self.unpatched

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache behind the prompt."""
        return sum(row.cache_bytes for row in self.layers)

    @property
    def rows_out(self) -> int:
        """Rows that leave the last layer."""
        return self.layers[-1].rows_out

    def __str__(self) -> str:
        head = ("part", "method", "rows", "GMACs", "cache MiB", "attention")
        body = []
        if self.tower is not None:
            for row in self.tower.rows:
                tokens = _arrow(row.tokens_in, row.tokens_out)
                body.append((f"tower.{row.name}", row.methods, tokens, _giga(row.macs * self.crops), "", row.attention))
        rows = _arrow(sum(n for n, _ in self.images), sum(k for _, k in self.images))
        body.append(("hand-over", self.selector, rows, _giga(self.handover), "", ""))
        for row in self.layers:
            rows = _arrow(row.rows_in, row.rows_out)
            body.append((row.name, row.methods, rows, _giga(row.macs), _mega(row.cache_bytes), row.attention))
        bound = "at most " if self.bounded else ""
        share = f"{bound}{self.ratio:.1%} of {_giga(self.unpatched)} unpatched"
        kept = f"{bound}{self.cache_bytes / self.unpatched_bytes:.1%} of {_mega(self.unpatched_bytes)}"
        share = f"{share}; cache {kept} MiB"
        body.append(("language model", "", "", _giga(self.prefill), _mega(self.cache_bytes), share))
        widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in (head, *body)]
        return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _arrow(before: int, after: int) -> str:
    return str(before) if before == after else f"{before} -> {after}"


def _giga(macs: int) -> str:
    return f"{macs / 1e9:.3f}"


def _mega(held: int) -> str:
    return f"{held / 2**20:.2f}"


def vlm_report(model: nn.Module, text: int = 64, images: Sequence[int] | int | None = None) -> VlmReport:
    """Rows, multiply-adds, cache and attention path of a vision-language model for one prompt, by formula.

    Args:
        model: of a served family, patched or not.
        text: rows of the prompt that are no image's.
        images: rows of each image; None for one image at the tower's own size.

    Raises:
        ValueError: a count that is not positive.
    """
    family = vlm_family_of(model)
    inner, recipe = family.inner(model), getattr(model, "tokenzoo_recipe", None)
    sizes = image_sizes(family, inner, images)
    if text < 0:
        raise ValueError(f"text={text}; give the rows of the prompt that are no image's")
    selector = None if recipe is None else recipe.selector
    kept = kept_rows(selector, sizes)
    layers = lm_rows(family, inner, layer_plans(family, inner, recipe), sum(kept), text)
    plain = lm_rows(family, inner, layer_plans(family, inner, None), sum(sizes), text)
    tower = family.vision_tower(inner)
    parts = [] if recipe is None else [part for part in (selector, *recipe.droppers) if part is not None]
    return VlmReport(
        tower=report(tower) if family_of(tower) is not None else None,
        crops=family.crops(inner, sizes),
        selector="" if selector is None else selector.name,
        images=tuple(zip(sizes, kept)),
        handover=_handover(family, inner, selector, sizes, kept),
        layers=tuple(layers),
        unpatched=sum(row.macs for row in plain),
        unpatched_bytes=sum(row.cache_bytes for row in plain),
        bounded=any(part.data_dependent for part in parts),
    )


def _handover(family: VLMFamily, inner: nn.Module, selector: Any, sizes: Sequence[int], kept: Sequence[int]) -> int:
    """Multiply-adds of the projector, and of deciding."""
    lm = family.language_model(inner)
    macs = 0 if family.projector is None else linear_macs(inner.get_submodule(family.projector)) * sum(sizes)
    if selector is not None:
        heads = family.tower_width(inner)
        macs += sum(selector.macs(n, k, lm.config.hidden_size, heads) for n, k in zip(sizes, kept) if k < n)
    return macs
