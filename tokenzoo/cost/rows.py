"""The one loop that counts multiply-adds block by block, by formula, for every family.

One multiply-add counts once. Counted are linear layers, convolutions, attention products, and what deciding and
applying a reduction costs; norms, activations, softmax and sorting are not, as usual. Blocks say what they cost for the
tokens at their stations (`adapters.flow.Flow`), models what their ends cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..adapters.backbone import BackboneInfo, Family
from ..adapters.flow import Flow, flow_through
from ..core.recipe import Recipe


@dataclass(frozen=True)
class BlockRow:
    """One row of a report.

    Attributes:
        name: where the block is in the model, "blocks.3"; "embed", "head", or what stands between two blocks.
        methods: names of the methods that act there.
        tokens_in: tokens before, prefix included.
        tokens_out: tokens after (the largest possible count where it depends on the images).
        macs: multiply-adds for one image, reduction included.
        reduction_macs: the part of it that reduction itself costs.
        attention: attention path, empty where there is none.
        block: index of the block, None for rows that are none.
    """

    name: str
    methods: str
    tokens_in: int
    tokens_out: int
    macs: int
    reduction_macs: int
    attention: str
    block: int | None = None


@dataclass(frozen=True)
class Costs:
    """A model as counting sees it, read once.

    Attributes:
        model: under its reducing class.
        blocks: the same.
        info: its sequences at the patch grid that counts.
        embed: multiply-adds in front of block 0.
        names: of the blocks.
    """

    model: Any
    blocks: tuple[Any, ...]
    info: BackboneInfo
    embed: int
    names: tuple[str, ...] = ()


def read_costs(backbone: nn.Module, family: Family, info: BackboneInfo, names: Iterable[str] = ()) -> Costs:
    """What counting needs of a model, patched or not, at the patch grid of `info`; names of blocks for a report."""
    view = family.view(backbone)
    blocks = tuple(map(family.block_view, view.served_blocks))
    return Costs(view, blocks, info, view.embed_macs(info.grid), tuple(names))


def _cost(block: Any, flow: Flow) -> int:
    return block.cost(flow)


def block_rows(costs: Costs, recipe: Recipe | None, cost: Callable[[Any, Flow], int] = _cost) -> tuple[BlockRow, ...]:
    """The rows of a report: embedding, blocks, what runs beside them, head.

    Args:
        costs: of the model.
        recipe: None for the unpatched model.
        cost: multiply-adds of a block for its tokens, where not all of them are to count.
    """
    model, info, depth = costs.model, costs.info, len(costs.blocks)
    counts = [[] for _ in range(depth)]
    if recipe is not None:
        counts = recipe.token_counts(depth, info.layout, info.restarts)
    layout, grid = info.layout, info.grid
    n = layout.num_prefix + layout.num_patches
    shown, held = model.all_tokens(n, grid, layout), ()
    # a method before block 0 embeds the image at half resolution too, a quarter of the patches
    halves = any(step.method.place == "embed" for steps in counts[:1] for step, _, _ in steps)
    half = costs.embed // 4 if halves else 0
    rows = [BlockRow("embed", "", shown, shown, costs.embed + half, half, "")]
    bias = _Bias(recipe)
    for index, (block, steps) in enumerate(zip(costs.blocks, counts)):
        if index in info.restarts:
            layout = info.restarts[index]
            if layout.joined:
                n += layout.joined
            else:
                n, held, bias = layout.num_prefix + layout.num_patches, (), _Bias(recipe)
        flow = flow_through(steps, n, layout, grid, recipe, held)
        if model.rebuilds and index == depth - 1:
            flow = flow._replace(left=layout.num_prefix + layout.num_patches)
        shape, copies = block.shape(), model.copies(grid, layout)
        reduction = sum(step.method.macs(n, n_out, shape, layout, step) for step, n, n_out in steps) * copies
        reduction += block.overhead(flow)
        names = ", ".join(step.method.name for step, _, _ in steps)
        tokens = [model.all_tokens(n, grid, layout) for n in (flow.entered, flow.left)]
        total = cost(block, flow) + reduction
        shown_as = costs.names[index] if costs.names else f"blocks.{index}"
        rows.append(BlockRow(shown_as, names, *tokens, total, reduction, bias.path(block), index))
        n, held, shown = flow.left, flow.held_behind, tokens[1]
        bias.note(flow)
        for beside in model.beside(index, flow):
            rows.append(
                BlockRow(beside.name, "", beside.tokens_in, beside.tokens_out, beside.macs, beside.reduction_macs, "")
            )
            shown = beside.tokens_out
    rows.append(BlockRow("head", "", shown, shown, model.head_macs(shown, info.layout), 0, ""))
    return tuple(rows)


class _Bias:
    """The attention path of the blocks of one sequence: what is added to the logits since its beginning."""

    def __init__(self, recipe: Recipe | None) -> None:
        self.proportional = recipe is not None and recipe.proportional
        self.sized = self.padded = False

    def note(self, flow: Flow) -> None:
        """Reductions of a block, for the blocks behind it."""
        steps = [step for step, _, _ in flow.steps]
        self.sized = self.sized or (self.proportional and any(step.method.merges for step in steps))
        self.padded = self.padded or any(step.method.pads for step in steps)

    def path(self, block: Any) -> str:
        """What a report says of a block."""
        if block.fused is None:
            return ""
        found = [*(["log-size bias"] if self.sized else []), *(["padding mask"] if self.padded else [])]
        path = block.attention_path(bool(found))
        if block.attends_among != "tokens":
            path += f" among {block.attends_among} (linear in tokens)"
        return path + (", " + " and ".join(found) if found else "")
