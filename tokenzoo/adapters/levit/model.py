"""timm's levit.py: LeViT, global attention with bias tables in stages, see `staged`.

Read from timm 1.0.19 to 1.0.31. Differences from upstream: the model's subclass owns the loop over the blocks; the mean
in front of the head knows sizes and padding; maps that `forward_intermediates` hands out are lifted to the full grid of
their stage.
The attention that makes a smaller grid between two stages runs on all places, as upstream. Models whose layers are
convolutions (`levit_conv_*`) are refused by name: `levit_*` takes the same checkpoints. In training, batch norms count
the padding rows of methods that pad.
"""

from __future__ import annotations

from collections.abc import Iterator

from timm.models.levit import Attention, Levit, LevitBlock, LevitDistilled
from torch import Tensor, nn

from ...core.recipe import Recipe
from ...core.tokens import Layout, Tokens
from ...ops.layer_macs import conv_macs, linear_macs
from ..backbone import Family
from ..staged import StagedModel, halved, refuse_across_stages
from .blocks import ReducingLevitAttention, ReducingLevitBlock


class _Levit(StagedModel):
    """Both models."""

    num_prefix_tokens = 0
    has_class = False
    reads_positions = True
    between_name = "stages.{}.downsample"

    @property
    def norm(self) -> nn.Module:
        """There is none behind the blocks."""
        return nn.Identity()

    # ---- the stages

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The blocks of all stages in order."""
        return self.served_blocks

    def stages_of_blocks(self) -> list[tuple[nn.Module, ...]]:
        return [tuple(stage.blocks) for stage in self.stages]

    def _strides(self) -> Iterator[nn.Module]:
        """Convolutions of the stem."""
        return (layer for layer in self.stem.modules() if isinstance(layer, nn.Conv2d))

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        for conv in self._strides():
            size = tuple((side - 1) // step + 1 for side, step in zip(size, conv.stride))
        return size

    @property
    def own_grid(self) -> tuple[int, int]:
        return resolution_of(self.stages[0].blocks[0].attn)

    def embed(self, x: Tensor) -> tuple[Tensor, None]:
        return self.stem(x).flatten(2).transpose(1, 2), None

    def between(self, x: Tensor, stage: int, grid: tuple[int, int]) -> Tensor:
        return self.stages[stage].downsample(x)

    # ---- ends

    def stage_width(self, stage: int) -> int:
        return self.embed_dim[stage]

    def embed_macs(self, grid: tuple[int, int]) -> int:
        convs = list(self._strides())
        places = [4 ** (len(convs) - 1 - i) for i in range(len(convs))]
        return sum(conv_macs(conv) * count for conv, count in zip(convs, places)) * grid[0] * grid[1]

    def between_macs(self, stage: int, grid: tuple[int, int]) -> int:
        down = self.stages[stage].downsample
        attn, (high, wide) = down.attn_downsample, halved(grid)
        keys, queries = grid[0] * grid[1], high * wide
        total = linear_macs(attn.kv) * keys + (linear_macs(attn.q) + linear_macs(attn.proj)) * queries
        return total + (attn.key_attn_dim + attn.val_attn_dim) * keys * queries + linear_macs(down.mlp) * queries

    def head_macs(self, n: int, layout: Layout) -> int:
        heads = sum(linear_macs(getattr(self, name)) for name in ("head", "head_dist") if hasattr(self, name))
        return heads if self.global_pool else heads * n

    def forward_head(self, x: Tensor | Tokens, pre_logits: bool = False) -> Tensor:
        """Pooling and classifier.

        Args:
            x: what `forward_tokens` or `forward_features` returned.
            pre_logits: stop in front of the classifier.
        """
        x = self.pool(x)
        if pre_logits:
            return x
        if not hasattr(self, "head_dist"):
            return self.head(x)
        own, other = self.head(x), self.head_dist(x)
        return (own, other) if self.distilled_training and self.training else (own + other) / 2


def resolution_of(attn: Attention) -> tuple[int, int]:
    """Places (high, wide) that a layer was built for.

    Older releases of timm keep only how far places are apart, where a grid one wide reads as one that is one high.
    """
    if hasattr(attn, "resolution"):
        return tuple(attn.resolution)
    apart = attn.attention_bias_idxs[min(1, len(attn.attention_bias_idxs) - 1)].tolist()  # of the second place
    wide = next((place for place in range(2, len(apart)) if apart[place] != place - 1), len(apart))
    return len(apart) // wide, wide


class ReducingLevit(_Levit, Levit):
    """`Levit` whose blocks reduce tokens."""


class ReducingLevitDistilled(_Levit, LevitDistilled):
    """`LevitDistilled` whose blocks reduce tokens: two classifiers on the mean of the tokens."""


def check(model: nn.Module) -> None:
    """Refuses settings of a model that reduction cannot serve.

    Raises:
        ValueError: layers that are convolutions on the whole grid (`use_conv`).
    """
    if model.use_conv:
        raise ValueError(
            f"{type(model).__name__} was built with use_conv=True: its layers are 1 x 1 convolutions on maps, which "
            "fewer tokens do not form; the same model of linear layers is served, and timm gives it the same weights: "
            "create levit_256 in place of levit_conv_256"
        )


def check_recipe(model: nn.Module, recipe: Recipe) -> None:
    """Refuses recipes that the model cannot follow.

    Raises:
        ValueError: images of half the size, which the stem cannot embed; tokens rebuilt in another stage than they were
            reduced in.
    """
    view = FAMILY.view(model)
    refuse_across_stages(type(model).__name__, len(view.served_blocks), recipe, view.firsts(), "stem of convolutions")


def bypassed(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Modules that are never called as a whole, and what to do instead."""
    found = [("stages", model.stages, "hook the blocks one by one")]
    for index, stage in enumerate(model.stages):
        found.append((f"stages.{index}", stage, "hook its blocks one by one, or its downsample"))
        found.append((f"stages.{index}.blocks", stage.blocks, "hook its blocks one by one"))
    return found


FAMILY = Family(
    name="levit",
    summary="timm levit.py: LeViT of linear layers, every stage by itself",
    tried="timm 1.0.19 to 1.0.31",
    models={Levit: ReducingLevit, LevitDistilled: ReducingLevitDistilled},
    blocks={LevitBlock: ReducingLevitBlock},
    attentions={Attention: ReducingLevitAttention},
    check=check,
    check_recipe=check_recipe,
    bypassed=bypassed,
)
