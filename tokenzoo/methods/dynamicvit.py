"""DynamicViT: predictors at a few depths learn which patches the rest of the model can do without."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..core.learned import Decision, Teaching
from ..core.learned_keep import LearnedKeep
from ..core.method import BlockShape, Step
from ..core.registry import register
from ..core.schedule import KeepOfAll
from ..core.tokens import Layout, Tokens
from ..layers.token_predictor import TokenPredictor


@register
@dataclass(frozen=True, kw_only=True)
class DynamicViT(LearnedKeep):
    """Keeps the patches that a learned predictor says, in front of a few blocks; has to be trained.

    The predictor sees every patch and the mean of those that are left. In training all patches stay, and what it draws
    (Gumbel noise, temperature 1) closes a patch to the others from there on; with the loss `ratio`, images keep the
    shares that inference keeps. The published training takes two more losses from the unpatched model, flags of
    `tokenzoo train`: `--kd-model-name unpatched --kd-weight 0.5 --kd-token-weight 0.5`; and it lets the backbone learn
    slowly, after some epochs: `--new-lr-scale 100 --freeze-epochs 5`. Not as released: attention in training adds
    e^-16 of a closed token's weight in place of 1e-6 / N to every entry.

    Args:
        keep_rate: share of the patches to keep at each layer, in (0, 1]; rates multiply up, int(0.7^i * n) of n patches
            are left behind the i-th layer.
        ratio_weight: weight of the loss on the share of patches that each image keeps in training (2; 5 for DeiT-B).
        over_batch: that share is one of all images of a batch together, and easy images may keep less.

    Source: Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification", NeurIPS 2021.
    """

    over_batch: bool = False

    name = "dynamicvit"
    source = "Rao et al., NeurIPS 2021"
    schedule = KeepOfAll()
    sees_itself = True
    released = {"score_predictor.{stage}.": ""}

    def module(self, dim: int, step: Step) -> nn.Module:
        return TokenPredictor(dim)

    def share(self, tokens: Tokens, step: Step) -> float:
        return step.strength.share(tokens.layout.num_patches)

    def losses(self, records: tuple[Decision, ...], teaching: Teaching) -> dict[str, Tensor]:
        real = records[0].before.sum(1).clamp(min=1)  # of all patches, not of those the stage before has left
        apart = []
        for record in records:
            kept = record.after.sum(1) / real
            apart.append(((kept.mean() if self.over_batch else kept) - record.share).square().mean())
        return {"ratio": self.ratio_weight * sum(apart) / len(apart)}

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        dim = shape.dim
        return (n - layout.num_prefix) * (dim * dim + dim * dim // 2 + dim * dim // 8 + dim // 2)
