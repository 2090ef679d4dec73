"""ATS: sample tokens by the inverse of their cumulative significance; the count follows the image."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.method import BlockShape, Method, Step
from ..core.registry import register
from ..core.schedule import spread
from ..core.selection import host_ranges, real_rows, with_prefix
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens
from ..core.traits import QUERIES, Traits
from ..maps import KeepMap, TokenMap
from ..ops.rows import stable_order


@register
@dataclass(frozen=True, kw_only=True)
class ATS(Method):
    """Samples tokens where the cumulative significance (class attention times value norm) hits evenly spaced heights.

    Acts on the queries, so attention itself gets cheaper. Images keep different counts; a batch is padded to its
    longest one and carries a validity mask. The longest count is read on the host once a block; `max_tokens` gives
    static shapes without that (compile, export). Results do not depend on batch mates: the lowest token can only be
    dropped while nothing was removed before (`batch_invariant=False` restores the released rule).

    Args:
        max_tokens: fixed budget, the class token included: that many heights and that much storage, an int or one
            entry a layer; None lets the image decide, with as many heights as the model had patches.
        batch_invariant: see above.
        layers: blocks to act in; by default from a quarter of the depth on (3 to 11 of 12).

    Source: Fayyaz, Abbasi Koohpayegani, Rezaei Jafari et al., "Adaptive Token Sampling for Efficient Vision
    Transformers", ECCV 2022.
    """

    max_tokens: int | tuple[int | None, ...] | None = None
    batch_invariant: bool = True

    name = "ats"
    source = "Fayyaz et al., ECCV 2022"
    kind = "sample"
    traits = Traits(
        place=QUERIES, pads=True, static="max_tokens=128",
        data_dependent=lambda m: m.max_tokens is None or (isinstance(m.max_tokens, tuple) and None in m.max_tokens),
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for count in self.max_tokens if isinstance(self.max_tokens, tuple) else (self.max_tokens,):
            if count is not None and (type(count) is not int or count < 3):
                raise ValueError(f"ats: max_tokens={count!r}; give None or at least 3 (class token and two patches)")

    def default_layers(self, depth: int) -> tuple[int, ...]:
        return tuple(range(depth // 4, depth))

    def strengths(self, depth: int) -> dict[int, Any]:
        return spread(self.max_tokens, self.resolve_layers(depth), "ats: max_tokens")

    def check(self, layout: Layout, model: str) -> None:
        if not layout.has_class:
            raise ValueError(
                f"ats scores tokens by the attention of the class token, which {model} lacks; use evit, topk or a "
                "merging method"
            )

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        return layout.num_prefix + min(n - layout.num_prefix, self._heights(step, layout))

    def _heights(self, step: Step, layout: Layout) -> int:
        if step.strength is None:
            return layout.num_patches
        return min(step.strength - 1, layout.num_patches)

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        prefix = tokens.layout.num_prefix
        with torch.no_grad():
            attention = signals.class_attention.sum(1)[:, prefix:]
            norms = signals.values.float().flatten(2).norm(dim=2)[:, prefix:]
            scores = attention * norms
            if tokens.visible is not None:
                scores = scores.masked_fill(~tokens.visible[:, prefix:], 0)
            # released: an image without padding loses its lowest token again, whatever was removed before
            full = tokens.layout.num_patches if self.batch_invariant else tokens.num_patches
            if tokens.valid is None:
                kind = torch.ones_like if tokens.num_patches == full else torch.zeros_like
                whole = kind(scores[:, :1], dtype=torch.bool)
            else:
                scores = scores * tokens.valid[:, prefix:]
                whole = tokens.valid_patches.unsqueeze(1) == full
            picked, order = sample_heights(scores, self._heights(step, tokens.layout), whole)
            counts = picked.sum(1, keepdim=True)
            if step.strength is None:
                found = host_ranges(counts)  # the one look of the host at the data
                length = tokens.num_patches if found is None else found[0][1]
            else:
                length = min(tokens.num_patches, self._heights(step, tokens.layout))
            front = stable_order(~picked)[:, :length]
        idx = with_prefix(order.gather(1, front), prefix)
        return KeepMap(idx, tokens.length, real_rows(counts, length, prefix))

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        return n * shape.num_heads * shape.head_dim * 2

    def dial(self, t: float, depth: int, layout: Layout) -> Method:
        return replace(self, max_tokens=max(3, 1 + round((1 - t) * layout.num_patches)))


def sample_heights(
    scores: Tensor, heights: int, skip_lowest: Tensor, candidates: int | None = None
) -> tuple[Tensor, Tensor]:
    """Inverse-transform sampling: which tokens are nearest to some height of the cumulative score.

    With G the cumulative sum of the ascending scores, scaled to [0, 1], and g0 its smallest non-zero value, the heights
    are g0 + k (1 - g0) / (heights - 1). A token is picked if at least one height lies in its cell (the stretch of
    [0, 1] that is nearer to its G than to any other): counting heights up to each cell's upper end answers it in O(N).

    Args:
        scores: significance of every patch [B, M], not negative, zero for padding.
        heights: number of heights.
        skip_lowest: [B, 1] bool, scale so that the lowest token gets G = 0 and cannot be picked.
        candidates: only this many of the highest scores can be picked; None for all.

    Returns:
        picked: [B, M] bool in ascending order of score; the highest score is always picked.
        order: [B, M] patch number at each place of that order.
    """
    ascending, order = scores.float().sort(dim=1)
    total = (ascending / ascending.sum(1, keepdim=True).clamp(min=1e-30)).cumsum(1)
    low = torch.where(skip_lowest, total[:, :1], torch.zeros_like(total[:, :1]))
    span = total[:, -1:] - low
    g = torch.where(span > 0, (total - low) / span.clamp(min=1e-30), torch.ones_like(total))
    first = g.masked_fill(g <= 0, 2.0).amin(1, keepdim=True).clamp(max=1.0)
    if candidates is not None and candidates < g.shape[1]:
        g = g[:, -candidates:]
    distance = (1 - first) / max(heights - 1, 1)
    middle = (g[:, :-1] + g[:, 1:]) / 2
    below = torch.where(
        distance > 0, ((middle - first) / distance.clamp(min=1e-30)).floor(), torch.full_like(middle, -1.0)
    ).clamp(-1, heights - 1)
    last = torch.full_like(below[:, :1], heights - 1) if below.shape[1] else torch.full_like(first, heights - 1)
    below = torch.cat([torch.full_like(last, -1.0), below, last], dim=1)
    picked = below[:, 1:] > below[:, :-1]
    missing = scores.shape[1] - picked.shape[1]
    if missing:
        picked = torch.cat([picked.new_zeros(picked.shape[0], missing), picked], dim=1)
    return picked, order
