"""timm's volo.py: VOLO, whose outlook stage stays as it is; methods act in the transformer stages, see `late_class`.

Read from timm 1.0.19 to 1.0.31. Differences from upstream: blocks see rows [B, N, C] in place of maps, numbered through
the transformer stages, which share one grid; the class token joins behind them. Pooling knows sizes and padding, the
second classifier takes its maximum over the patches that are left, and maps that `forward_intermediates` hands out (one
per stage) are lifted to the full grid. `forward_tokens` is that of patched models, and `forward_train`, which mixes
images, is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.volo import VOLO, Attention, ClassAttention, ClassBlock, Downsample, Outlooker, Transformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...core.lift import lift
from ...core.method import BlockShape
from ...core.recipe import Recipe
from ...core.tokens import Layout, Tokens
from ...ops.layer_macs import conv_macs, linear_macs
from ..backbone import Family
from ..block import BlockMacs, ReducingBlock
from ..features import Reads
from ..late_class import LateClassModel, bypassed_class_blocks, refuse_other_class_blocks
from ..on_grid import to_map
from ..pooling import open_tokens, pool_plain
from .attention import (
    ReducingVoloAttention,
    attention_macs,
    attention_width,
    class_attention,
    class_attention_macs,
    input_width,
)

_FRONT = 2  # parts of the network in front of the transformer stages: the outlook stage, and a smaller grid


class ReducingVoloBlock(ReducingBlock, Transformer):
    """`Transformer` of volo.py on tokens."""

    def attention_input(self, x: Tensor) -> Tensor:
        return self.norm1(x)

    def attention_branch(self, outs: list[Tensor]) -> Tensor:
        return self.drop_path1(outs[0])

    def mlp_input(self, x: Tensor) -> Tensor:
        return self.norm2(x)

    def mlp_branch(self, z: Tensor) -> Tensor:
        return self.drop_path2(self.mlp(z))

    def shape(self) -> BlockShape:
        heads = self.attn.num_heads
        return BlockShape(input_width(self.attn), heads, attention_width(self.attn) // heads)

    def macs(self) -> BlockMacs:
        return attention_macs(self.attn)._replace(mlp=linear_macs(self.mlp))


class ReducingVOLO(LateClassModel, VOLO):
    """`VOLO` whose transformer stages reduce tokens."""

    class_blocks = "post_network"
    takes_added = False

    @property
    def num_prefix_tokens(self) -> int:
        """The class token, until it is taken off with the head."""
        return int(self.post_network is not None)

    @property
    def has_class(self) -> bool:
        return False  # not in the blocks

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The blocks of the transformer stages in order."""
        return tuple(block for stage in self.network[_FRONT:] for block in stage)

    # ---- the grid

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        step = self.patch_embed.proj.kernel_size[0] * self.network[1].proj.kernel_size[0]
        return tuple(((side - 1) // self.patch_embed.conv[0].stride[0] + 1) // step for side in size)

    @property
    def own_grid(self) -> tuple[int, int]:
        return tuple(self.pos_embed.shape[1:3])

    def embed_macs(self, grid: tuple[int, int]) -> int:
        down, proj = self.network[1].proj, self.patch_embed.proj
        coarse, finer = grid[0] * grid[1], down.kernel_size[0]
        places = coarse * finer * finer
        total = conv_macs(down) * coarse + conv_macs(proj) * places
        total += conv_macs(self.patch_embed.conv) * places * proj.kernel_size[0] ** 2
        for block in self.network[0]:
            attn = block.attn
            windows = 1
            for side in grid:
                windows *= -(-side * finer // attn.stride)
            total += (linear_macs(attn.v) + linear_macs(attn.proj) + linear_macs(block.mlp)) * places
            width = next(layer.shape[0] for layer in attn.v.parameters())
            total += windows * (linear_macs(attn.attn) + attn.kernel_size**4 * width)
        return total

    # ---- the pass

    def embed(self, x: Tensor) -> tuple[Tensor, None]:
        return self._behind_outlook(self._outlook(x)), None

    def _outlook(self, x: Tensor) -> Tensor:
        """What the outlook stage gives [B, H, W, C]."""
        return self._stage(0, self.patch_embed(x).permute(0, 2, 3, 1))

    def _behind_outlook(self, x: Tensor) -> Tensor:
        """What enters block 0 [B, N, C]."""
        return self.pos_drop(self._stage(1, x) + self.pos_embed).flatten(1, 2)

    def _stage(self, index: int, x: Tensor) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled() and not torch.jit.is_scripting():
            return checkpoint(self.network[index], x, use_reentrant=False)
        return self.network[index](x)

    def run_class_block(self, block: nn.Module, tokens: Tensor, bias: Tensor | None) -> Tensor:
        own = tokens[:, :1]
        own = own + block.drop_path1(class_attention(block.attn, block.norm1(tokens), bias))
        own = own + block.drop_path2(block.mlp(block.norm2(own)))
        return torch.cat([own, tokens[:, 1:]], dim=1)

    def class_block_macs(self, block: nn.Module, n: int) -> int:
        return class_attention_macs(block.attn, n) + linear_macs(block.mlp)

    def forward_train(self, x: Tensor) -> Any:
        raise ValueError(
            f"{type(self).__name__}.forward_train mixes tokens of two images, which reduction does not keep apart; "
            "call the model, and mix images in front of it"
        )

    # ---- the head

    def head_reads(self) -> Reads:
        reads = Reads.of(self.pooling, include_prefix=True)
        return reads._replace(greatest=self.aux_head is not None and bool(self.pooling))

    def pool_tokens(self, tokens: Tokens, kind: str) -> Tensor:
        return pool_plain(tokens, kind, include_prefix=True, mass_weighted=self.tokenzoo_recipe.mass_weighted_pool)

    def head_macs(self, n: int, layout: Layout) -> int:
        own = linear_macs(self.head) * (1 if self.pooling else n)
        return own + (linear_macs(self.aux_head) * (n - 1) if self.aux_head is not None and self.pooling else 0)

    def forward_head(self, x: Tensor | Tokens, pre_logits: bool = False) -> Tensor:
        """Both classifiers: the maximum over the patches that are left joins the scores of the pooled token.

        Args:
            x: what `forward_tokens` or `forward_features` returned.
            pre_logits: stop in front of the classifiers.
        """
        tokens = self.read(x)
        out = self.head_drop(self.pool_tokens(tokens, self.pooling))
        if pre_logits:
            return out
        out = self.head(out)
        if self.aux_head is None or not self.pooling:
            return out
        aux, real = self.aux_head(self.head_drop(tokens.x)[:, 1:]), open_tokens(tokens)
        aux = aux if real is None else aux.masked_fill(~real[:, 1:].unsqueeze(-1), float("-inf"))
        return out + 0.5 * aux.max(1)[0]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """timm's `forward_intermediates`; maps of the transformer stages are lifted to the full grid.

        Args:
            x: images [B, C, H, W].
            indices: stages, the outlook stage first; a number takes the last ones, None all.
            norm: apply the final norm to the maps of the transformer stages.
            stop_early: do not run stages behind the last chosen one.
            output_fmt: "NCHW".
            intermediates_only: return the maps alone.

        Raises:
            ValueError: another format.
        """
        from timm.models._features import feature_take_indices

        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: {type(self).__name__} hands out maps; leave it at 'NCHW'")
        stages = self.network[_FRONT:]
        wanted, last = feature_take_indices(1 + len(stages), indices)
        ends = [sum(len(stage) for stage in stages[: i + 1]) - 1 for i in range(len(stages))]
        front = self._outlook(x)
        maps = [front.permute(0, 3, 1, 2)] if 0 in wanted else []
        if last == 0 and stop_early:
            return maps if intermediates_only else (front, maps)
        stop = ends[last - 1] if stop_early else ends[-1]
        recipe, weighs = self.tokenzoo_recipe, self.head_reads().weighs(self.tokenzoo_recipe)
        tokens = self.begin(x, self._behind_outlook(front), None, None, weighs, True)
        for index, tokens in self._left(self.follow(tokens, None, last=stop)):  # noqa: B020
            if index in ends and ends.index(index) + 1 in wanted:
                through = self.norm if norm else nn.Identity()
                rows = lift(through(tokens.x), recipe.lift_trace(tokens.trace), recipe.fill, through)
                maps.append(to_map(rows, tokens.layout.grid))
        if intermediates_only:
            return maps
        return (self.features(self._finish(tokens)) if stop == ends[-1] else tokens.x), maps


def check(model: nn.Module) -> None:
    """Refuses settings of a model that reduction cannot serve.

    Raises:
        ValueError: stages in another order than one of outlook attention, a smaller grid, and transformer stages;
            class-attention blocks of other classes than timm's own; no such blocks where the head wants a class token.
    """
    name = type(model).__name__
    kinds = [type(part[0]) if isinstance(part, nn.Sequential) and len(part) else type(part) for part in model.network]
    if kinds[:_FRONT] != [Outlooker, Downsample] or any(kind is not Transformer for kind in kinds[_FRONT:]):
        raise ValueError(
            f"{name}.network is {', '.join(kind.__name__ for kind in kinds)}; served are an outlook stage, one "
            "Downsample and transformer stages behind it, as in volo_d1 to volo_d5"
        )
    if model.post_network is None and (model.global_pool == "token" or model.aux_head is not None):
        raise ValueError(
            f"{name} has no class-attention blocks (post_layers=None), and its head takes the first patch for a class "
            "token; use global_pool='avg' and use_aux_head=False"
        )
    refuse_other_class_blocks(model, ReducingVOLO.class_blocks, ClassBlock, ClassAttention)


def check_recipe(model: nn.Module, recipe: Recipe) -> None:
    """Refuses recipes that the model cannot follow.

    Raises:
        ValueError: images of half the size, which the stem and the outlook stage cannot embed.
    """
    for method in recipe.methods:
        if method.place == "embed":
            raise ValueError(
                f"{method.name} embeds images at half the size, which the stem and the outlook stage of "
                f"{type(model).__name__} cannot do; use a model whose patches are one convolution"
            )


def bypassed(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Modules that are never called as a whole, and what to do instead."""
    stages = enumerate(model.network[_FRONT:], _FRONT)
    found = [(f"network.{index}", stage, "hook its blocks one by one") for index, stage in stages]
    return [*found, *bypassed_class_blocks(model, ReducingVOLO.class_blocks)]


FAMILY = Family(
    name="volo",
    summary="timm volo.py: VOLO, in its transformer stages; outlook attention and class-attention blocks stay",
    tried="timm 1.0.19 to 1.0.31",
    models={VOLO: ReducingVOLO},
    blocks={Transformer: ReducingVoloBlock},
    attentions={Attention: ReducingVoloAttention},
    check=check,
    check_recipe=check_recipe,
    bypassed=bypassed,
)
