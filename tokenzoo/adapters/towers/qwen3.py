"""timm's qwen3_vit.py: the vision towers of Qwen3-VL, Qwen3.5 and Qwen3.8, and classifiers around them.

Read from timm 1.0.31. Differences from upstream: as in tower.py and eva/model.py. Patches stand row by row, as timm has
them, and not in groups of 2 x 2 as the source does; absolute positions are interpolated for each size of image.
"""

from __future__ import annotations

from timm.models.eva import EvaBlock
from timm.models.qwen3_vit import Qwen3VitClassifier, Qwen3VitEncoder
from torch import nn

from ..backbone import Family
from ..eva.attention import REDUCING_ATTENTIONS
from ..eva.model import ReducingEvaBlock
from .tower import Classifier, Encoder, Tower, bypassed, check_recipe


class _Qwen3(Tower):
    @property
    def projector(self) -> nn.Module | None:
        return self.tower.merger

    @property
    def final_norm(self) -> nn.Module:
        """There is none behind the blocks."""
        return nn.Identity()

    def cells(self, grid: tuple[int, int]) -> int:
        return grid[0] * grid[1] // self.tower.merge_size**2


class ReducingQwen3VitEncoder(_Qwen3, Encoder, Qwen3VitEncoder):
    """`Qwen3VitEncoder` whose blocks reduce tokens."""


class ReducingQwen3VitClassifier(_Qwen3, Classifier, Qwen3VitClassifier):
    """`Qwen3VitClassifier` whose blocks reduce tokens."""


FAMILY = Family(
    name="qwen3_vit",
    summary="timm qwen3_vit.py: Qwen3-VL, Qwen3.5 and Qwen3.8 towers, with and without their projector",
    tried="timm 1.0.31",
    models={Qwen3VitEncoder: ReducingQwen3VitEncoder, Qwen3VitClassifier: ReducingQwen3VitClassifier},
    blocks={EvaBlock: ReducingEvaBlock},
    attentions=REDUCING_ATTENTIONS,
    check_recipe=check_recipe,
    bypassed=bypassed,
)
