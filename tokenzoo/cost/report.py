"""Reports: what a model costs block by block, exact about tokens, without running it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, overload

from torch import nn

from ..adapters.flow import Flow
from ..adapters.inspect import block_names, describe, running_steps
from ..adapters.registry import find_family
from ..adapters.wholes import whole_of
from ..adapters.wrappers import backbone_of, known_of
from ..core.recipe import Placed
from .rows import BlockRow, block_rows, read_costs


@dataclass(frozen=True)
class Report:
    """What a model costs, block by block, for one image.

    Attributes:
        rows: embed, the blocks, head.
        unpatched: multiply-adds of the same model without reduction.
        data_dependent: counts depend on the images, the rows are upper bounds.
        one_direction: multiply-adds of models that scan, and of the same model without reduction, with one direction of
            the scan counted, as most of their papers do; None for all other models.
    """

    rows: tuple[BlockRow, ...]
    unpatched: int
    data_dependent: bool = False
    one_direction: tuple[int, int] | None = None

    @property
    def total(self) -> int:
        """Multiply-adds of the whole model for one image."""
        return sum(row.macs for row in self.rows)

    @property
    def ratio(self) -> float:
        """Share of the unpatched model's multiply-adds."""
        return self.total / self.unpatched

    @property
    def tokens_out(self) -> int:
        """Tokens that reach the head, prefix included."""
        return self.rows[-1].tokens_in

    @property
    def attn_impl(self) -> str:
        """ "fused" if every block attends on the fused kernel, else "unfused"; "none" for models that scan."""
        if self.one_direction is not None:
            return "none"
        return "unfused" if any(row.attention.startswith("unfused") for row in self.rows) else "fused"

    def __str__(self) -> str:
        head = ("block", "method", "tokens", "GMACs", "attention")
        body = []
        for row in self.rows:
            same = row.tokens_in == row.tokens_out
            tokens = f"{row.tokens_in}" if same else f"{row.tokens_in} -> {row.tokens_out}"
            body.append((row.name, row.methods, tokens, f"{row.macs / 1e9:.3f}", row.attention))
        share = f"{self.total / 1e9:.3f}"
        bound = "at most " if self.data_dependent else ""
        body.append(("total", "", "", share, f"{bound}{self.ratio:.1%} of {self.unpatched / 1e9:.3f} unpatched"))
        if self.one_direction is not None:
            own, whole = self.one_direction
            what = f"{bound}{own / whole:.1%} of {whole / 1e9:.3f} unpatched"
            body[-1] = ("total", "all directions", *body[-1][2:])
            body.append(("total", "one direction", "", f"{own / 1e9:.3f}", what))
        widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in (head, *body)]
        return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


@overload
def report(model: nn.Module, img_size: int | tuple[int, int] | None = None) -> Report: ...
@overload
def report(model: nn.Module, img_size: int | tuple[int, int] | None = None, **options: Any) -> Any: ...
def report(model: nn.Module, img_size: int | tuple[int, int] | None = None, **options: Any) -> Any:
    """Tokens, multiply-adds and attention path of a model, block by block, by formula.

    Args:
        model: a served model, patched or not.
        img_size: image (height, width) or one side; None for the model's own.
        **options: of vision-language models: `text` and `images`, see `tokenzoo.vlm.report.vlm_report`.

    Returns:
        A `Report`; of vision-language models a `VlmReport`.

    Raises:
        TypeError: a model that is not served.
        ValueError: the recipe cannot be met at this size.
    """
    whole = whole_of(known_of(model))
    if whole is not None:
        if img_size is not None:
            raise ValueError(f"img_size={img_size!r}: a {whole.name} counts images by their rows; give images=[...]")
        return whole.report(known_of(model), **options)
    if options:
        raise TypeError(f"report() got {sorted(options)}, which are options of vision-language models")
    backbone = backbone_of(model)
    recipe = getattr(backbone, "tokenzoo_recipe", None)
    if recipe is not None:  # what runs, which may have lost blocks since it was patched
        recipe = Placed.of(recipe, running_steps(backbone))
    family = find_family(backbone)
    grid = None
    if img_size is not None:
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        grid = tuple(family.view(backbone).grid_of(size))
    info = describe(backbone, grid, recipe)
    costs = read_costs(backbone, family, info, block_names(model))
    unpatched = sum(row.macs for row in block_rows(costs, None))
    data_dependent = recipe is not None and any(m.data_dependent for m in recipe.methods)
    one = None
    if family.scans:
        one = tuple(sum(row.macs for row in block_rows(costs, r, _one_direction)) for r in (recipe, None))
    return Report(block_rows(costs, recipe), unpatched, data_dependent, one)


def _one_direction(block: Any, flow: Flow) -> int:
    return block.cost(flow, directions=1)
