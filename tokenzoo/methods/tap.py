"""Token-aware average pooling in front of attention, and a loss that keeps attention from falling on a few tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from ..core.learned import Learned, Note, Teaching
from ..core.method import BlockShape, Method, Step
from ..core.mixins import Attended, Beside, Companion, OwnAttention
from ..core.options import number
from ..core.registry import register
from ..core.schedule import Cells
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens
from ..core.traits import Traits, around
from ..layers.token_pooling import TokenAveragePooling
from ..maps import PooledMap
from ..ops.attention import Heads, attend, attention_rows
from ..ops.diversification import layer_likeness


@register
@dataclass(frozen=True, kw_only=True)
class TAP(Companion, OwnAttention, Learned, Method):
    """Lets attention read mixtures of means over neighbourhoods, and in training keeps it from a few tokens; none goes.

    Every patch chooses how much it takes of itself and of the mean of its 3 x 3 neighbours at growing distances (zeros
    beyond the border); the residual stream stays. A new predictor takes some of all scales, so that a model has to be
    trained with it before it is of use. No time is saved. The loss `adl` needs the whole map of each layer in training,
    before dropout here; at inference attention stays fused. Prefix tokens are not pooled (ours). The predictor holds a
    batch norm: in training by several processes each takes the statistics of its own images, unless the model goes
    through `torch.nn.SyncBatchNorm.convert_sync_batchnorm`.

    Args:
        num_scales: the patch itself and means at distances of 1 to num_scales - 1; 1 pools nothing.
        adl_weight: weight of the loss; 0 computes no map.
        threshold: attention counts in the loss above this many shares of even attention.

    Source: Guo, Stutz, Schiele, "Robustifying Token Attention for Vision Transformers", ICCV 2023.
    """

    num_scales: int = number(4, "1 pools nothing", least=1, whole=True)
    adl_weight: float = number(1.0, "0 leaves the loss out", least=0)
    threshold: float = number(2.0, "1 is even attention", least=0)

    name = "tap"
    source = "Guo et al., ICCV 2023"
    kind = "attend pooled"
    owes = ("adl",)
    gates = False
    schedule = Cells(
        size=lambda m: None if m.num_scales == 1 and not m.adl_weight else m.num_scales,
        remedy="let it act in earlier blocks than methods that reduce tokens",
    )
    traits = Traits(
        place=around("attention", stream=True), positions=True, attends=True, reads_maps=lambda m: m.adl_weight > 0
    )

    def check_recipe(self, methods: tuple[Method, ...], depth: int) -> None:
        for other in methods:
            if other is not self and (other.place in ("around", "ahead", "queries") or other.attends):
                raise ValueError(f"tap looks at the attention that {other.name} acts in; give one of the two alone")

    def module(self, dim: int, step: Step) -> nn.Module | None:
        return TokenAveragePooling(dim, self.num_scales) if self.num_scales > 1 else None

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> PooledMap | None:
        self.schedule.of(tokens, step)
        if self.num_scales == 1:
            return None
        layout, pool = tokens.layout, signals.module
        x = tokens.x  # what a mask hides is to its neighbours what stands beyond the border
        x = x if tokens.visible is None else x.masked_fill(~tokens.visible.unsqueeze(-1), 0.0)
        shares = pool.shares(x, layout.grid, layout.num_prefix)
        return PooledMap(tokens.x, partial(pool.mix, shares=shares, num_prefix=layout.num_prefix))

    def attend(self, heads: Heads, bias: Tensor | None, tokens: Tokens, beside: Beside) -> Attended | None:
        if not beside.training or not self.adl_weight:
            return None
        rows = attention_rows(heads, 0, heads.q.shape[2], bias)
        return Attended(attend(heads, bias), note=layer_likeness(rows, self.threshold))

    def losses(self, records: tuple[Note, ...], teaching: Teaching) -> dict[str, Tensor]:
        return {"adl": self.adl_weight * sum(record.value for record in records) / (len(records) + 1e-6)}

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        patches, scales = n - layout.num_prefix, self.num_scales
        return 9 * patches * (shape.dim * (2 * scales - 1) + scales**2) if scales > 1 else 0
