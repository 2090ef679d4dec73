"""timm's hiera.py: Hiera in its stages of global attention, see `staged`; stages of mask-unit attention stay.

Read from timm 1.0.19 to 1.0.31. Blocks 0, 1, ... of a method are those of the global stages behind their pooling ones,
in order; mask-unit stages run in front of them as they are, and the block that pools between two stages runs on all
places. Differences from upstream: the model's subclass owns the loop over the blocks, tokens stand in raster order in
the global stages (upstream keeps them unrolled until they are pooled; attention among all places sees no order),
pooling knows sizes and padding, and maps that `forward_intermediates` hands out are lifted to the full grid of their
stage. Dropping mask units (`mask`) is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from timm.models.hiera import Hiera, HieraBlock, MaskUnitAttention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...core.tokens import Layout, Tokens
from ...ops.layer_macs import conv_macs, linear_macs
from ..backbone import Family
from ..on_grid import to_map
from ..staged import StagedModel
from .blocks import ReducingGlobalAttention, ReducingHieraBlock, input_width, whole_block_macs
from .stages import behind_pooling, check, check_recipe, first_global, stages_of


class ReducingHiera(StagedModel, Hiera):
    """`Hiera` whose stages of global attention reduce tokens."""

    num_prefix_tokens = 0
    has_class = False

    @property
    def norm(self) -> nn.Module:
        """There is none behind the blocks; the head has its own behind pooling."""
        return nn.Identity()

    @property
    def pooling(self) -> str:
        return self.head.pool_type

    # ---- the stages

    def stages_of_blocks(self) -> list[tuple[nn.Module, ...]]:
        first = first_global(self)
        return [behind_pooling(stage, blocks) for stage, blocks in enumerate(stages_of(self))][first:]

    def _front(self) -> list[nn.Module]:
        """The blocks in front of the first one that methods act in."""
        first, stages = first_global(self), stages_of(self)
        return [block for blocks in stages[:first] for block in blocks] + [*stages[first][:1]] * (first > 0)

    def between_label(self, stage: int) -> str:
        return f"blocks.{self.stage_ends[first_global(self) + stage - 1] + 1}"

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        step = 2 ** first_global(self)
        return tuple(side // (stride * step) for side, stride in zip(size, self.patch_stride))

    @property
    def own_grid(self) -> tuple[int, int]:
        return tuple(side // 2 ** first_global(self) for side in self.tokens_spatial_shape)

    # ---- the pass

    def embed(self, x: Tensor) -> tuple[Tensor, None]:
        *_, (_, values) = self._front_values(x)
        return values, None

    def _front_values(self, images: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(block, values [B, N, C] in raster order) of all blocks in front of block 0; -1 for what enters the first.

        Raises:
            ValueError: images of another size than the model's own, which fixes its mask units.
        """
        own = [side * stride for side, stride in zip(self.tokens_spatial_shape, self.patch_stride)]
        if list(images.shape[-2:]) != own:
            raise ValueError(
                f"{type(self).__name__} is built for images of {own[0]} x {own[1]} pixels, not of "
                f"{images.shape[-2]} x {images.shape[-1]}; create it with img_size"
            )
        x = self._pos_embed(self.patch_embed(images))
        yield -1, x
        front = self._front()
        if front:
            x = self.unroll(x)
        for index, block in enumerate(front):
            x = self._whole(block, x)
            yield index, self.reroll(x, index).flatten(1, 2)

    def _whole(self, block: nn.Module, x: Tensor) -> Tensor:
        """A block that runs as it is."""
        if self.grad_checkpointing and torch.is_grad_enabled() and not torch.jit.is_scripting():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)

    def between(self, x: Tensor, stage: int, grid: tuple[int, int]) -> Tensor:
        high, wide = grid[0] // 2, grid[1] // 2
        # the four places that become one stand behind each other, as the pooling block wants them
        x = x.reshape(x.shape[0], high, 2, wide, 2, -1).permute(0, 2, 4, 1, 3, 5).flatten(1, 4)
        return self._whole(stages_of(self)[first_global(self) + stage][0], x)

    # ---- ends

    def stage_width(self, stage: int) -> int:
        return input_width(self.stages_of_blocks()[stage][0].attn)

    def embed_macs(self, grid: tuple[int, int]) -> int:
        places = grid[0] * grid[1] * 4 ** first_global(self)
        total = conv_macs(self.patch_embed.proj) * places
        for block in self._front():
            total += whole_block_macs(block, places)
            places //= block.attn.q_stride
        return total

    def between_macs(self, stage: int, grid: tuple[int, int]) -> int:
        return whole_block_macs(stages_of(self)[first_global(self) + stage][0], grid[0] * grid[1])

    def head_macs(self, n: int, layout: Layout) -> int:
        own = linear_macs(self.head.pre_logits) + linear_macs(self.head.fc)
        return own if self.pooling else own * n

    def forward_head(self, x: Tensor | Tokens, pre_logits: bool = False) -> Tensor:
        """Pooling and timm's head behind it.

        Args:
            x: what `forward_tokens` or `forward_features` returned.
            pre_logits: stop in front of the classifier.
        """
        pooled = self.pool(x)
        # any pooling of one row is that row, so hooks on the head see it called
        return self.head(pooled.unsqueeze(1) if self.pooling else pooled, pre_logits=pre_logits)

    # ---- what upstream's arguments ask for

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Class scores of images [B, C, H, W]; dropping mask units (`mask`) is refused."""
        self._refuse_units(mask)
        return super().forward(x)

    def forward_features(self, x: Tensor, mask: Tensor | None = None, return_intermediates: bool = False) -> Any:
        """Tokens of images [B, C, H, W] that are left, of which `forward_head` makes what `forward` does.

        Args:
            x: images.
            mask: refused.
            return_intermediates: also give the maps of all stages [B, H, W, C].
        """
        self._refuse_units(mask)
        return self.forward_intermediates(x, output_fmt="NHWC") if return_intermediates else super().forward_features(x)

    def _refuse_units(self, mask: Tensor | None) -> None:
        if mask is not None:
            raise ValueError(
                f"{type(self).__name__} is patched, and a mask that drops whole mask units leaves its stages no grid; "
                "call it without one, or unpatch it for masked pre-training"
            )

    def forward_intermediates(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = True,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        coarse: bool = True,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """timm's `forward_intermediates`; all maps are lifted to the full grid of their stage.

        Args:
            x: images [B, C, H, W].
            mask: refused.
            indices: stages, or blocks of the model with `coarse=False`; a number takes the last ones, None all.
            norm: refused, as in timm.
            stop_early: do not run blocks behind the last chosen one.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: return the maps alone.
            coarse: indices are those of stages.

        Raises:
            ValueError: a mask, a norm, or another format.
        """
        from timm.models._features import feature_take_indices

        self._refuse_units(mask)
        name = type(self).__name__
        if norm:
            raise ValueError(f"norm=True: the norm of {name} stands behind pooling, maps have none; leave it out")
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt={output_fmt!r}: {name} hands out maps; use 'NCHW' or 'NHWC'")
        count = len(self.blocks)
        ends = self.stage_ends if coarse else range(count)
        take, last = feature_take_indices(len(ends), indices)
        wanted, stop = {ends[i] for i in take}, ends[last] if stop_early else count - 1
        maps = []
        for index, y, grid, end in self._all_blocks(x, stop):  # noqa: B007 (the last one is wanted)
            if index in wanted:
                places = to_map(y if end is None else self.all_places(end), grid)
                maps.append((places if output_fmt == "NCHW" else places.permute(0, 2, 3, 1)).contiguous())
        if intermediates_only:
            return maps
        if stop == count - 1:
            end = self._finish(end)
        return (y if end is None else self.features(end)), maps

    def _all_blocks(self, images: Tensor, stop: int) -> Iterator[tuple[int, Tensor, tuple[int, int], Tokens | None]]:
        """What every block of the model leaves up to one of them: its index, values, the grid and tokens, if any."""
        grid, front = tuple(self.tokens_spatial_shape), self._front()
        for index, y in self._front_values(images):
            if index >= 0 and front[index].attn.q_stride > 1:
                grid = grid[0] // 2, grid[1] // 2
            if index >= 0:
                yield index, y, grid, None
            if index == stop:
                return
        index = len(front) - 1
        tokens = self.begin(images, y, None, None, True, True)
        for done, tokens in enumerate(self.follow(tokens, None)):  # noqa: B020
            if done == 0:  # what entered the first global stage
                continue
            index += 1
            # what enters a later stage is what its pooling block left
            yield index, tokens.x, tokens.layout.grid, tokens
            if index == stop:
                return

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True, coarse: bool = True
    ) -> list[int]:
        """timm's `prune_intermediate_layers`: takes off blocks behind the last one that is named, and the head.

        Args:
            indices: as for `forward_intermediates`.
            prune_norm: changes nothing, as in timm.
            prune_head: also where no block is taken off.
            coarse: indices are those of stages.

        Raises:
            ValueError: no block that methods act in would be left at the end.
        """
        from timm.models._features import feature_take_indices

        blocks = self.blocks
        ends = self.stage_ends if coarse else range(len(blocks))
        take, last = feature_take_indices(len(ends), indices)
        if blocks[ends[last]] not in self.served_blocks:
            raise ValueError(
                f"{type(self).__name__} would end at blocks.{ends[last]}, where methods do not act; unpatch it, or "
                "prune it to a stage of global attention"
            )
        pruned = ends[last] < len(blocks) - 1
        self.blocks = blocks[: ends[last] + 1]
        if pruned:
            self.num_features = self.head_hidden_size = input_width(self.served_blocks[-1].attn)
        if prune_head or pruned:
            self.reset_classifier(0, reset_other=True)
        return take


FAMILY = Family(
    name="hiera",
    summary="timm hiera.py: Hiera, in its stages of global attention; mask-unit stages stay",
    tried="timm 1.0.19 to 1.0.31",
    models={Hiera: ReducingHiera},
    blocks={HieraBlock: ReducingHieraBlock},
    attentions={MaskUnitAttention: ReducingGlobalAttention},
    check=check,
    check_recipe=check_recipe,
    bypassed=lambda model: [("blocks", model.blocks, "hook the blocks one by one (model.blocks[i])")],
)
