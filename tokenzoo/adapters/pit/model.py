"""timm's pit.py: PiT, global attention in three stages; pooling between them runs on the whole grid, see `staged`.

Read from timm 1.0.19 to 1.0.31. Differences from upstream: the model's subclass owns the loop over the blocks; maps
that `forward_intermediates` hands out are lifted to the full grid of their stage. The class tokens stand in front in
every stage. As upstream, `forward_features` gives the class tokens alone; with dense=True all tokens of the last stage
in their places, through the final norm. `features_only=True` of timm hooks whole stages, which a patched model never
calls: create the model with `feature_cls="getter"`.
"""

from __future__ import annotations

import torch
from timm.models.pit import PoolingVisionTransformer
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ...core.recipe import Recipe
from ...core.tokens import Layout, Tokens
from ...ops.layer_macs import conv_macs, linear_macs
from ..backbone import Family
from ..staged import StagedModel, halved, refuse_across_stages
from ..vit.attention import REDUCING_ATTENTIONS, input_width
from ..vit.model import ReducingVitBlock


class ReducingPiT(StagedModel, PoolingVisionTransformer):
    """`PoolingVisionTransformer` whose blocks reduce tokens."""

    between_name = "transformers.{}.pool"

    @property
    def num_prefix_tokens(self) -> int:
        """Class tokens, two with distillation."""
        return self.num_tokens

    # ---- the stages

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The blocks of all stages in order."""
        return self.served_blocks

    def stages_of_blocks(self) -> list[tuple[nn.Module, ...]]:
        return [tuple(stage.blocks) for stage in self.transformers]

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        conv = self.patch_embed.conv
        steps = zip(size, conv.padding, conv.kernel_size, conv.stride)
        return tuple((side + 2 * pad - kernel) // step + 1 for side, pad, kernel, step in steps)

    def embed(self, x: Tensor) -> tuple[Tensor, None]:
        x = self.pos_drop(self.patch_embed(x) + self.pos_embed)
        return self._joined(x, self.cls_token.expand(x.shape[0], -1, -1), 0), None

    def between(self, x: Tensor, stage: int, grid: tuple[int, int]) -> Tensor:
        own, patches = x[:, : self.num_tokens], x[:, self.num_tokens :]
        places = patches.transpose(1, 2).reshape(x.shape[0], -1, *grid)
        return self._joined(*self.transformers[stage].pool(places, own), stage)

    def _joined(self, places: Tensor, class_tokens: Tensor, stage: int) -> Tensor:
        """What the blocks of a stage begin with."""
        tokens = torch.cat((class_tokens, places.flatten(2).transpose(1, 2)), dim=1)
        return self.transformers[stage].norm(tokens)

    # ---- ends

    def stage_width(self, stage: int) -> int:
        return input_width(self.transformers[stage].blocks[0].attn)

    def embed_macs(self, grid: tuple[int, int]) -> int:
        return conv_macs(self.patch_embed.conv) * grid[0] * grid[1]

    def between_macs(self, stage: int, grid: tuple[int, int]) -> int:
        pool, (high, wide) = self.transformers[stage].pool, halved(grid)
        return conv_macs(pool.conv) * high * wide + linear_macs(pool.fc) * self.num_tokens

    def head_macs(self, n: int, layout: Layout) -> int:
        heads = sum(linear_macs(head) for head in (self.head, self.head_dist) if head is not None)
        return heads if self.global_pool else heads * self.num_tokens

    def features(self, tokens: Tokens) -> Tensor:
        return self.lift_features(tokens) if self.tokenzoo_recipe.dense else tokens.x[:, : self.num_tokens]

    def forward_head(self, x: Tensor | Tokens, pre_logits: bool = False) -> Tensor:
        """timm's head on the class tokens.

        Args:
            x: what `forward_tokens` or `forward_features` returned.
            pre_logits: stop in front of the classifier.
        """
        return super().forward_head(x if isinstance(x, Tensor) else self.features(x), pre_logits)


def check_recipe(model: nn.Module, recipe: Recipe) -> None:
    """Refuses recipes that the model cannot follow.

    Raises:
        ValueError: images of half the size, which overlapping patches do not allow; tokens rebuilt in another stage
            than they were reduced in.
    """
    view = FAMILY.view(model)
    stem = "embedding of overlapping patches"
    refuse_across_stages(type(model).__name__, len(view.served_blocks), recipe, view.firsts(), stem)


def bypassed(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Modules that are never called as a whole, and what to do instead."""
    found = [("transformers", model.transformers, "hook the blocks one by one")]
    for index, stage in enumerate(model.transformers):
        found.append((f"transformers.{index}", stage, "hook its blocks one by one, or its pool"))
        found.append((f"transformers.{index}.blocks", stage.blocks, "hook its blocks one by one"))
    return found


FAMILY = Family(
    name="pit",
    summary="timm pit.py: PiT, every stage by itself",
    tried="timm 1.0.19 to 1.0.31",
    models={PoolingVisionTransformer: ReducingPiT},
    blocks={Block: ReducingVitBlock},
    attentions=REDUCING_ATTENTIONS,
    check_recipe=check_recipe,
    bypassed=bypassed,
)
