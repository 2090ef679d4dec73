"""CTS: groups of 2 x 2 patches that hold one thing enter the model as one token."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..core.method import BlockShape, Method, Step
from ..core.options import choice, number, option, three
from ..core.registry import register
from ..core.schedule import Schedule, keep_count
from ..core.sharing import colour_variance, groups_of, share_groups, visible_pixels
from ..core.signals import EmbedSignals
from ..core.tokens import Layout, Tokens
from ..core.traits import EMBED, Traits
from ..layers.cts_policy import PolicyNetwork, macs_per_group
from ..maps import TokenMap
from ..ops.attention import full_precision

SCORES = ("variance", "policy")


@register
@dataclass(frozen=True, kw_only=True)
class CTS(Method):
    """Lets groups of 2 x 2 patches share one token before block 0: the group is cut from the image at half resolution.

    A fixed number of groups is shared, those whose score says "one thing only" most clearly, so the sequence has the
    same length for every image. The grid has to be even. Published with a trained policy network and a segmenter
    trained with it; the variance of colours needs no training.

    Args:
        shared: groups to share: a count, or their share (0.4 of them, rounded up).
        score: "variance" (least variance of colours first) or "policy" (a network with weights of its own, untrained
            until `tokenzoo.layers.cts_policy.load_policy` or training).
        mean: mean that the images were normalised with, for the policy network.
        std: standard deviation that the images were normalised with, for the policy network.
        prop_attn: add the log size of a token to its attention logit (off as released).
        layers: None; the method acts in front of block 0.

    Source: Lu, de Geus, Dubbelman, "Content-aware Token Sharing for Efficient Semantic Segmentation with Vision
    Transformers", CVPR 2023.
    """

    shared: int | float = number(0.4, "give at least 0 groups, or a share such as 0.4", least=0)
    score: str = choice("variance", SCORES)
    mean: tuple[float, float, float] = option((0.5, 0.5, 0.5), three)
    std: tuple[float, float, float] = option((0.5, 0.5, 0.5), three)
    prop_attn: bool = False

    name = "cts"
    source = "Lu et al., CVPR 2023"
    kind = "merge"
    schedule = Schedule(layers=lambda depth: (0,))
    traits = Traits(
        place=EMBED, positions=True, proportional=lambda m: m.prop_attn, mass_pool=True, decodes_reduced=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers not in (None, (0,)):
            raise ValueError(f"cts: layers={self.layers!r}; it acts in front of block 0 only, leave layers out")
        if isinstance(self.shared, float) and self.shared > 1:
            raise ValueError(f"cts: shared={self.shared}; give at least 0 groups, or a share in [0, 1]")
        if min(self.std) <= 0:
            raise ValueError(f"cts: std={self.std} has to be positive")

    def strengths(self, depth: int) -> dict[int, int | float]:
        return {0: self.shared} if self.shared > 0 else {}

    def check(self, layout: Layout, model: str) -> None:
        groups_of(layout, f"cts: {model}")

    def module(self, dim: int, step: Step) -> nn.Module | None:
        return PolicyNetwork() if self.score == "policy" else None

    def count(self, n: int, step: Step, layout: Layout) -> int:
        """Groups that the option asks for."""
        down, right = groups_of(layout, "cts")
        return self.shared if isinstance(self.shared, int) else keep_count(self.shared, down * right)

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        down, right = groups_of(layout, f"cts at block {step.block}")
        # every group that is one token already has three patches less
        whole = (n - layout.num_prefix - down * right) // 3
        count = step.count(n, layout)
        if count > whole:
            raise step.error(f"shared={self.shared} asks for {count} groups, but there are {whole}; lower it")
        return n - 3 * count

    def map(self, tokens: Tokens, signals: EmbedSignals, step: Step) -> TokenMap | None:
        step.tokens_out(tokens.length, tokens.layout)  # grids of other images than the model's own
        count, groups = step.count(tokens.length, tokens.layout), groups_of(tokens.layout, "cts")
        if count == 0:
            return None
        return share_groups(tokens, self.scores(signals, groups, tokens), count, signals.half)

    @torch.no_grad()
    def scores(self, signals: EmbedSignals, groups: tuple[int, int], tokens: Tokens | None = None) -> Tensor:
        """Score of every group [B, G], high for one thing only; patches that a mask hides from the tokens are blank."""
        images = signals.image
        if tokens is not None and tokens.visible is not None:
            images = images * visible_pixels(tokens, images)
        if self.score == "variance":
            with full_precision(images):
                return -colour_variance(images, groups)
        mean, std = (torch.tensor(v, device=images.device, dtype=images.dtype) for v in (self.mean, self.std))
        images = (images * std.view(3, 1, 1) + mean.view(3, 1, 1)) * 2 - 1
        logits = signals.module(images, groups).float()
        # grows with the softmax of channel 1 and does not saturate
        return (logits[:, 1] - logits[:, 0]).flatten(1)

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        return layout.num_patches // 4 * macs_per_group() if self.score == "policy" else 0

    def dial(self, t: float, depth: int, layout: Layout) -> Method:
        down, right = groups_of(layout, "cts")
        return replace(self, shared=round(t * down * right))
