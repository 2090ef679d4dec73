"""PatchMerger: learned queries read all patches, and what they read goes on in their place."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..core.learned_slots import LearnedSlots
from ..core.method import Step
from ..core.registry import register
from ..layers.slots import MergingQueries


@register
@dataclass(frozen=True, kw_only=True)
class PatchMerger(LearnedSlots):
    """Puts what learned queries read from all patches in their place, in front of a few blocks; has to be trained.

    How many tokens there are is part of the weights: the same at any image size. New tokens are means of normed
    patches, on another scale than the residual stream. The weights of all pairs of queries and patches are stored.

    Args:
        keep_rate: share of the patches to keep at each layer, in (0, 1]; rates multiply up, int(0.7^i * n) of n patches
            are left behind the i-th layer.
        scaled: divide logits by the root of the channels.

    Source: Renggli et al., "Learning to Merge Tokens in Vision Transformers", 2022; at several blocks of DeiT: Haurum
    et al., "Which Tokens to Use?", ICCV Workshops 2023.
    """

    scaled: bool = False

    name = "patchmerger"
    source = "Renggli et al., 2022"

    def module(self, dim: int, step: Step) -> nn.Module:
        return MergingQueries(dim, step.known.count, self.scaled)
