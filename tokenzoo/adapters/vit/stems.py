"""T2T-ViT and LV-ViT of tokenzoo.models: plain ViT blocks behind an embedding of their own.

Differences from upstream: as in vit.py; LV-ViT's second classifier sees the patch tokens that are left, padding never
counts.
"""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ...core.recipe import Recipe
from ...core.tokens import Layout, Tokens
from ...models.lv_vit import LVViT
from ...models.t2t_vit import T2TViT
from ...ops.layer_macs import linear_macs
from ..backbone import Family
from ..features import Reads
from ..pooling import open_tokens
from .attention import REDUCING_ATTENTIONS
from .model import BLOCKS, VitModel, bypassed, check


class ReducingT2TViT(VitModel, T2TViT):
    """`T2TViT` whose blocks reduce tokens; the tokens-to-token module stays as it is."""


class ReducingLVViT(VitModel, LVViT):
    """`LVViT` whose blocks reduce tokens."""

    def head_reads(self) -> Reads:
        # the second classifier takes the best of the patch tokens
        reads = super().head_reads()
        return reads._replace(greatest=reads.greatest or self.aux_head is not None)

    def head_macs(self, n: int, layout: Layout) -> int:
        second = 0 if self.aux_head is None else linear_macs(self.aux_head) * (n - layout.own_prefix)
        return super().head_macs(n, layout) + second

    def forward_head(self, x: Tensor | Tokens, pre_logits: bool = False) -> Tensor:
        """Logits by the published rule, over the patch tokens that are left."""
        x = self.read(x)
        out = VisionTransformer.forward_head(self, x, pre_logits)
        if pre_logits or not self.global_pool:
            return out
        valid = open_tokens(x)
        valid = None if valid is None else valid[:, self.num_prefix_tokens :]
        return self.combine_logits(out, self.dense_logits(x.x), valid)


def check_recipe(model: nn.Module, recipe: Recipe) -> None:
    """Refuses recipes that these models cannot follow.

    Raises:
        ValueError: a method in front of block 0 needs images of half the size embedded, which the stem cannot do.
    """
    for method in recipe.methods:
        if method.place == "embed":
            raise ValueError(
                f"{method.name} embeds images at half the size, which {type(model).__name__}'s "
                f"{type(model.patch_embed).__name__} cannot do; use a model whose patches are one convolution"
            )


FAMILY = Family(
    name="vit_stems",
    summary="tokenzoo.models: T2T-ViT and LV-ViT",
    models={T2TViT: ReducingT2TViT, LVViT: ReducingLVViT},
    blocks=BLOCKS,
    attentions=REDUCING_ATTENTIONS,
    check=check,
    check_recipe=check_recipe,
    bypassed=bypassed,
)
