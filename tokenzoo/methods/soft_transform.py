"""soft_transform: every patch is shared out softly among the most important ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch.nn import functional as F

from ..core.keep_rate import KeepRate
from ..core.method import BlockShape, Step
from ..core.options import choice, number
from ..core.registry import register
from ..core.schedule import kept_of, kept_patches
from ..core.selection import importance_macs, keep_best
from ..core.signals import Signals
from ..core.spreading import cosine_temperature, share_out
from ..core.tokens import Layout, Tokens
from ..core.traits import Traits
from ..maps import TokenMap
from ..ops.attention import full_precision

FEATURES = ("keys", "x")
MIXTURES = ("columns", "rows")


@register
@dataclass(frozen=True, kw_only=True)
class SoftTransform(KeepRate):
    """Shares every patch out among the patches with the highest class attention, by similarity; experimental.

    A reduction from many tokens to many, in the spirit of "Token Transforming" (Zeng et al., 2025), whose rule is not
    published: this definition is ours, and results of that paper are not results of this method. The patches that
    stay are anchors; the softmax of cosines says how each patch is shared out among them. Anchors keep raster order.
    Without a class token, they are ranked by the mean attention they receive. The shares of all pairs of patch and
    anchor are stored, per image and reduction.

    Args:
        sharpness: what the usual distance of an image's patches, one minus their cosine, counts in the exponent of
            the shares; the higher, the more a patch goes to its nearest anchor alone.
        temperature: in place of it, of the softmax over cosines. It fits one model: where keys are as alike as those
            of DINOv2's kind, 0.03 makes every anchor the mean of all patches.
        mixture: "columns" shares each patch out among the anchors, so that sizes are conserved; "rows" makes each
            anchor a mean of all patches, whatever their sizes.
        features: what is compared, the mean of the keys over heads ("keys") or the tokens ("x").

    Source: a definition of this library; the idea of dense reductions: Zeng, Yu, Kong, Tang, "Token Transforming",
    2025.
    """

    sharpness: float = number(25.0, "give what the usual distance of patches counts", above=0)
    temperature: float | None = number(None, "give a positive number such as 0.03", above=0, none=True)
    mixture: str = choice("columns", MIXTURES)
    features: str = choice("keys", FEATURES)
    prop_attn: bool = False

    name = "soft_transform"
    source = "of this library"
    kind = "merge"
    traits = Traits(
        reads_maps=True, sizes=True, positions=True, proportional=lambda m: m.prop_attn,
        mass_pool=lambda m: m.mixture == "columns",
        products=lambda m, before, after, layout: (before * after, before * after),
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prop_attn and self.mixture == "rows":
            raise ValueError("soft_transform: prop_attn=True needs sizes, which mixture='rows' lacks; leave one out")

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        if kept_patches(tokens.length, step, tokens.layout) == tokens.num_patches:
            return None
        with full_precision(tokens.x):
            keep = keep_best(signals.importance, tokens, kept_of(step, tokens.layout))
            features = signals.metric if self.features == "keys" else tokens.x
            unit = F.normalize(features.float(), dim=-1)
            temperature = self.temperature or cosine_temperature(unit, tokens, self.sharpness)
            return share_out(unit, keep, tokens, temperature, self.mixture == "rows")

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        pairs = (n - layout.num_prefix) * (n_out - layout.num_prefix)
        compared = shape.head_dim if self.features == "keys" else shape.dim
        return importance_macs(n, shape, layout) + pairs * (compared + shape.dim)
