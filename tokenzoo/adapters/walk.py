"""The loop over the blocks, one for all families, and what the library asks of any model, patched or not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..core.graphs import refuse_open_sizes
from ..core.recipe import Recipe
from ..core.tokens import Layout, Tokens
from ..ops.layer_macs import is_conv
from .flow import Flow
from .heads import embed_macs, head_macs
from .masks import four_dims
from .refusals import Unscriptable, refuse_symbols, refuse_vmap


class Beside(NamedTuple):
    """What runs beside the blocks, behind one of them.

    Attributes:
        name: of the row in a report.
        tokens_in: tokens before.
        tokens_out: tokens after.
        macs: multiply-adds for one image.
        reduction_macs: the part of it that reduction costs.
    """

    name: str
    tokens_in: int
    tokens_out: int
    macs: int
    reduction_macs: int = 0


class Walk(Unscriptable):
    """Mixin of all patched models: the loop over the blocks, and what is asked of a model.

    A family says how a pass starts (`start`), which sequences its blocks see (`sequences`) and how a later one begins
    (`restart`), and what its ends cost. What travels from block to block is `Tokens`, or a tuple of the family's own
    with values `x` and a `trace`, from which `walk_tokens` makes `Tokens`.
    """

    tokenzoo_recipe: Recipe
    blocks: nn.Module

    gives_tokens: bool = False  # whether `forward_tokens` has the tokens that reach the head
    takes_added: bool = False  # whether tokens may be added behind the prefix (prompts)
    takes_gates: bool = False  # whether gates and records of a method in training reach attention, head and trainer
    rebuilds: bool = False  # whether the last block gives every sequence all of its tokens back

    # ---- spelled by the family; those without a pass are asked of unpatched models too

    @property
    def served_blocks(self) -> Any:
        """The blocks that methods act in, in order; `blocks`, where it is a part of the model, may hold others too."""
        return self.blocks

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Patches (high, wide) of an image of that size; by default as `patch_embed` cuts it."""
        if is_conv(self.patch_embed):
            return tuple(side // step for side, step in zip(size, self.patch_embed.stride))
        return self.patch_embed.dynamic_feat_size(size)

    @property
    def own_grid(self) -> tuple[int, int]:
        """Patches (high, wide) of the model's own image size."""
        grid = self.patch_embed.grid_size
        if grid is None:
            raise ValueError(
                f"{type(self).__name__}.patch_embed has no grid size; call model.set_input_size(img_size=...) first"
            )
        return tuple(grid)

    def sequences(self, grid: tuple[int, int], recipe: Recipe | None) -> dict[int, Layout]:
        """What the blocks see: the first block of every sequence, block 0 in front, and its layout.

        Args:
            grid: patches of the image.
            recipe: decides which side data is tracked; None for none.
        """
        raise NotImplementedError

    def start(self, x: Tensor, mask: Tensor | None, trace: bool, dense: bool) -> tuple[Any, Any]:
        """What enters block 0, and the context of this pass (rotary tables, say), which `rope_of` gives to blocks.

        Args:
            x: images [B, C, H, W].
            mask: the user's attention mask or None.
            trace: keep the maps.
            dense: also keep the values that dropped tokens had.
        """
        raise NotImplementedError

    def rope_of(self, rope: Any, index: int) -> Any:
        """What a block gets of the context."""
        return rope

    def restart(self, tokens: Any, index: int, context: Any) -> Any:
        """What enters a block: what the one before left, or where a new sequence begins, the tokens of that one."""
        return tokens

    def head_layout(self, layout: Layout) -> Layout:
        """The sequence that the head sees, of that of the last block; another where tokens join in between."""
        return layout

    def checkpoints(self, index: int) -> bool:
        """Whether the activations of a block are computed anew in the backward pass."""
        return getattr(self, "grad_checkpointing", False)

    # ---- what the ends cost, for one image

    def embed_macs(self, grid: tuple[int, int]) -> int:
        """Multiply-adds of everything in front of block 0."""
        return embed_macs(self.patch_embed, grid)

    def head_macs(self, n: int, layout: Layout) -> int:
        """Multiply-adds of everything behind the blocks.

        Args:
            n: tokens that reach it.
            layout: the sequence that block 0 sees.
        """
        return head_macs(self, n, layout)

    def beside(self, index: int, flow: Flow) -> list[Beside]:
        """What runs behind a block and in front of the next one."""
        return []

    def copies(self, grid: tuple[int, int], layout: Layout) -> int:
        """Sequences of one image that stand side by side in the batch (windows)."""
        return 1

    def all_tokens(self, n: int, grid: tuple[int, int], layout: Layout) -> int:
        """Tokens of one image where n are in every sequence."""
        return n

    # ---- the loop

    def walk(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        last: int | None = None,
        trace: bool = False,
        dense: bool = False,
    ) -> Iterator[Any]:
        """Yields what enters every sequence, and what is left after every block up to `last`.

        Args:
            x: images [B, C, H, W].
            mask: attention mask in original positions, or None.
            last: index of the last block to run, None for all.
            trace: keep the maps.
            dense: also keep the values that dropped tokens had.
        """
        refuse_symbols(self, x)
        refuse_open_sizes(self, x)
        refuse_vmap(self.tokenzoo_recipe)
        tokens, context = self.start(x, mask, trace, dense)
        return self.follow(tokens, context, None if mask is None else four_dims(mask, mask.shape[-1]), last)

    def follow(self, tokens: Any, context: Any, mask: Tensor | None = None, last: int | None = None) -> Iterator[Any]:
        """`walk`, from what `start` gave."""
        yield tokens
        for index, block in enumerate(self.served_blocks if last is None else self.served_blocks[: last + 1]):
            entering = tokens if index == 0 else self.restart(tokens, index, context)
            if entering is not tokens:
                yield entering
            tokens, table = entering, self.rope_of(context, index)
            if self.checkpoints(index) and torch.is_grad_enabled() and not torch.jit.is_scripting():
                tokens = checkpoint(_call, block, tokens, table, mask, use_reentrant=False)
            else:
                tokens = _call(block, tokens, table, mask)
            yield tokens

    def walk_tokens(self, x: Tensor) -> Iterator[Tokens]:
        """`walk` as `Tokens` of the whole image with their trace, for pictures.

        Args:
            x: images [B, C, H, W].
        """
        return self.walk(x, trace=True)


def _call(block: nn.Module, tokens: Any, rope: Any, mask: Tensor | None) -> Any:
    return block(tokens, rope=rope, attn_mask=mask)
