"""timm's deepseek_vit.py: the vision towers of DeepSeek-V4 and V4.1, and classifiers around them.

Read from timm 1.0.31. Differences from upstream: as in tower.py and eva/model.py.
"""

from __future__ import annotations

from timm.models.deepseek_vit import DeepseekVitBlock, DeepseekVitClassifier, DeepseekVitEncoder
from torch import Tensor, nn

from ..backbone import Family
from ..eva.attention import REDUCING_ATTENTIONS
from ..eva.model import RotaryBlock
from .tower import Classifier, Encoder, Tower, bypassed, check_recipe


class ReducingDeepseekVitBlock(RotaryBlock, DeepseekVitBlock):
    """Pre-norm block without layer scales."""

    def attention_input(self, x: Tensor) -> Tensor:
        return self.norm1(x)

    def attention_branch(self, outs: list[Tensor]) -> Tensor:
        return self.drop_path1(outs[0])

    def mlp_input(self, x: Tensor) -> Tensor:
        return self.norm2(x)

    def mlp_branch(self, z: Tensor) -> Tensor:
        return self.drop_path2(self.mlp(z))


class _Deepseek(Tower):
    @property
    def projector(self) -> nn.Module | None:
        return self.tower.aligner

    @property
    def final_norm(self) -> nn.Module:
        return self.tower.norm

    def cells(self, grid: tuple[int, int]) -> int:
        side = self.tower.downsample_ratio
        return -(-grid[0] // side) * -(-grid[1] // side)


class ReducingDeepseekVitEncoder(_Deepseek, Encoder, DeepseekVitEncoder):
    """`DeepseekVitEncoder` whose blocks reduce tokens."""


class ReducingDeepseekVitClassifier(_Deepseek, Classifier, DeepseekVitClassifier):
    """`DeepseekVitClassifier` whose blocks reduce tokens."""


FAMILY = Family(
    name="deepseek_vit",
    summary="timm deepseek_vit.py: DeepSeek-V4 and V4.1 towers, with and without their projector",
    tried="timm 1.0.31",
    models={DeepseekVitEncoder: ReducingDeepseekVitEncoder, DeepseekVitClassifier: ReducingDeepseekVitClassifier},
    blocks={DeepseekVitBlock: ReducingDeepseekVitBlock},
    attentions=REDUCING_ATTENTIONS,
    check_recipe=check_recipe,
    bypassed=bypassed,
)
