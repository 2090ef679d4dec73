"""SiT: a learned layer slims all patches into fewer tokens; an unslimmed teacher says what every block should hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.keep_rate import KeepRate
from ..core.learned import Learned, Note, Teaching
from ..core.method import BlockShape, Step
from ..core.options import number
from ..core.registry import register
from ..core.schedule import Slots, quarters
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens
from ..core.traits import AFTER, Traits
from ..layers.slimming import ReverseSlimming, TokenSlimming
from ..maps import MixMap, TokenMap


def _before_quarters(depth: int) -> Sequence[int]:
    """Blocks in front of those at one, two and three quarters of the depth (2, 5, 8 of 12)."""
    return tuple(sorted({max(0, block - 1) for block in quarters(depth)}))


@register
@dataclass(frozen=True, kw_only=True)
class SiT(Learned, KeepRate):
    """Mixes all patches into fewer tokens by learned weights, behind a few blocks; has to be trained.

    How many tokens there are is part of the weights: the same at any image size. Those of all pairs of old and new
    tokens are stored. In training, a second layer in every
    block rebuilds all patches from what is left, and the loss `feature` is the mean over blocks of the squared distance
    from what an unslimmed teacher has there (feature recalibration distillation); it learns at the model's own image
    size. The other half of the published loss is a flag of `tokenzoo train`: `--kd-model-name unpatched --kd-weight 2`.

    Args:
        keep_rate: share of the patches to keep at each layer, in (0, 1]; rates multiply up, int(0.5^i * n) of n patches
            are left behind the i-th layer.
        layers: blocks behind which tokens are slimmed.
        feature_weight: weight of the loss on rebuilt patches; 0 trains, and runs, without the layers that rebuild.
        slim_ratio: hidden channels of the layer that slims, over its input's.
        rebuild_ratio: hidden width of the layers that rebuild, over what they give.

    Source: Zong et al., "Self-slimmed Vision Transformer", ECCV 2022; with feature_weight=0 as compared by Haurum et
    al., "Which Tokens to Use?", ICCV Workshops 2023.
    """

    keep_rate: float | tuple[float, ...] = 0.5
    feature_weight: float = number(2.0, "give the weight of the loss on rebuilt patches, 0 for none", least=0)
    slim_ratio: float = number(0.5, "0.5 halves the channels", above=0)
    rebuild_ratio: float = number(4.0, "give the width of an MLP, such as 4", above=0)

    name = "sit"
    source = "Zong et al., ECCV 2022"
    kind = "merge"
    traits = Traits(place=AFTER, products=lambda m, before, after, layout: (before * after, before * after))
    schedule = Slots(layers=_before_quarters)
    owes = ("feature",)
    gates = False
    released = {"tsm.{stage}.": "tsm.", "rtsm.{block}.": "rtsm.", "cluster_layers.{stage}.": "tsm."}

    def strengths(self, depth: int) -> dict[int, Any]:
        """What blocks slim to; None for those that only rebuild, all others if that is learned from."""
        slims = super().strengths(depth)
        return {i: slims.get(i) for i in range(depth)} if slims and self.feature_weight else slims

    def count(self, n: int, step: Step, layout: Layout) -> int:
        return n - layout.num_prefix if step.strength is None else super().count(n, step, layout)

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        return n if step.strength is None else super().tokens_out(n, step, layout)

    def asked(self) -> tuple[str, ...]:
        return ("layers",) if self.feature_weight else ()

    def module(self, dim: int, step: Step) -> nn.Module | None:
        known, parts = step.known, nn.ModuleDict()
        if step.strength is not None:
            parts["tsm"] = TokenSlimming(dim, known.count, self.slim_ratio)
        patches = known.grid[0] * known.grid[1]
        if self.feature_weight and known.count != patches:
            parts["rtsm"] = ReverseSlimming(dim, known.count, patches, self.rebuild_ratio)
        return parts if len(parts) else None

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        patches, slimmed = tokens.x[:, tokens.layout.num_prefix :], None
        if step.strength is not None:
            weights = signals.module["tsm"](patches, tokens.seen_patches)
            slimmed = MixMap(weights, tokens.layout.num_prefix, knows_mask=True)
        if not (signals.training and self.feature_weight):
            return slimmed
        if slimmed is not None:
            patches = torch.bmm(weights.to(patches.dtype), patches)
        rebuilds = signals.module is not None and "rtsm" in signals.module
        rebuilt = signals.module["rtsm"](patches) if rebuilds else patches
        if rebuilt.shape[1] != tokens.layout.num_patches:
            raise step.error(
                f"rebuilds {rebuilt.shape[1]} patches, but these images have {tokens.layout.num_patches}; train at the "
                "model's own image size, or with feature_weight=0"
            )
        return self.noted(rebuilt, tokens, step, slimmed)

    def losses(self, records: tuple[Note, ...], teaching: Teaching) -> dict[str, Tensor]:
        if teaching.layers is None:
            raise ValueError(
                "sit: feature_weight compares patches with those of a teacher; give --kd-model-name unpatched (in a "
                "loop of your own Teaching(layers=...)), or feature_weight=0"
            )
        apart = [F.mse_loss(note.value.float(), teaching.layers[note.block].float()) for note in records]
        return {"feature": self.feature_weight * sum(apart) / len(apart)}

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        if step.strength is None:
            return 0
        patches, kept, hidden = n - layout.num_prefix, n_out - layout.num_prefix, int(shape.dim * self.slim_ratio)
        return patches * hidden * (shape.dim + kept) + patches * kept * shape.dim
