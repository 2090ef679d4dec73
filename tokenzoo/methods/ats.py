"""ATS: sample tokens by the inverse of their cumulative significance; the count follows the image."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.method import BlockShape, Method, Step
from ..core.registry import register
from ..core.schedule import Budget, open_counts
from ..core.selection import real_rows, settled_rows, with_prefix
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens
from ..core.traits import QUERIES, Traits
from ..maps import KeepMap, TokenMap
from ..ops.rows import stable_order
from ..ops.sampling import sample_heights


@register
@dataclass(frozen=True, kw_only=True)
class ATS(Method):
    """Samples tokens where the cumulative significance (class attention times value norm) hits evenly spaced heights.

    Acts on the queries, so attention itself gets cheaper. Images keep different counts; a batch is padded to its
    longest one and carries a validity mask. The longest count is read on the host once per block; `max_tokens` gives
    static shapes without that (compile, export). Results do not depend on batch mates: the lowest token can only be
    dropped while nothing was removed before (`batch_invariant=False` restores the released rule).

    Args:
        max_tokens: fixed budget, the class token included: that many heights and that much storage, an int or one
            entry per layer; None lets the image decide, with as many heights as the model had patches.
        batch_invariant: see above.

    Source: Fayyaz, Abbasi Koohpayegani, Rezaei Jafari et al., "Adaptive Token Sampling for Efficient Vision
    Transformers", ECCV 2022.
    """

    max_tokens: int | tuple[int | None, ...] | None = None
    batch_invariant: bool = True

    name = "ats"
    source = "Fayyaz et al., ECCV 2022"
    kind = "sample"
    schedule = Budget(layers=lambda depth: range(depth // 4, depth))
    traits = Traits(
        place=QUERIES, reads_maps=True, pads=True, static="max_tokens=128",
        data_dependent=lambda m: open_counts(m.max_tokens),
    )  # fmt: skip

    def check(self, layout: Layout, model: str) -> None:
        if not layout.has_class:
            raise ValueError(
                f"ats scores tokens by the attention of the class token, which {model} lacks; use evit, topk or a "
                "merging method"
            )

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        prefix, heights = tokens.layout.num_prefix, step.count(tokens.length, tokens.layout)
        with torch.no_grad():
            norms = signals.values.float().flatten(2).norm(dim=2)
            scores = (signals.class_attention.sum(1) * norms)[:, prefix:]
            if tokens.visible is not None:
                scores = scores.masked_fill(~tokens.visible[:, prefix:], 0)
            # released: an image without padding loses its lowest token again, whatever was removed before
            if self.batch_invariant and tokens.layout.own_grids:
                raise step.error(
                    "tells by their patches which images have lost none yet, but those of this batch have grids of "
                    "their own; set batch_invariant=False, or give images of one size"
                )
            full = tokens.layout.num_patches if self.batch_invariant else tokens.num_patches
            if tokens.valid is None:
                kind = torch.ones_like if tokens.num_patches == full else torch.zeros_like
                whole = kind(scores[:, :1], dtype=torch.bool)
            else:
                scores = scores * tokens.valid[:, prefix:]
                whole = tokens.valid_patches.unsqueeze(1) == full
            picked, order = sample_heights(scores, heights, whole)
            counts = picked.sum(1, keepdim=True)
            if step.strength is None:
                length, valid = settled_rows(counts, tokens)  # the one look of the host at the data
            else:
                length = min(tokens.num_patches, heights)
                valid = real_rows(counts, length, prefix)
            front = stable_order(~picked)[:, :length]
        idx = with_prefix(order.gather(1, front), prefix)
        return KeepMap(idx, tokens.length, valid)

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        return n * shape.num_heads * shape.head_dim * 2
