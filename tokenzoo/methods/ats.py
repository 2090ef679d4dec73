"""ATS: sample tokens by the inverse of their cumulative significance; the count follows the image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.method import BlockShape, Method, Step
from ..core.options import number
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

    `flops=` solves for `max_tokens`, an equal share of the patches less in every block; with `images=` beside it, for
    `heights`, so that these images cost the budget on average.

    Args:
        max_tokens: places that are kept and paid for, the class token included, an int or one entry per layer; where
            the heights pick more, the most significant of these stay. None lets the image decide.
        heights: where the cumulative significance is read; None for as many as the model had patches.
        padded: places of `max_tokens` that the heights leave empty stay so, as released; by default they go to the most
            significant of the other patches.
        batch_invariant: see above.

    Source: Fayyaz, Abbasi Koohpayegani, Rezaei Jafari et al., "Adaptive Token Sampling for Efficient Vision
    Transformers", ECCV 2022.
    """

    max_tokens: int | tuple[int | None, ...] | None = None
    heights: int | None = number(None, "give a number of heights, or None", least=2, whole=True, none=True)
    padded: bool = False
    batch_invariant: bool = True

    name = "ats"
    source = "Fayyaz et al., ECCV 2022"
    kind = "sample"
    schedule = Budget(layers=lambda depth: range(depth // 4, depth))
    traits = Traits(
        place=QUERIES, reads_maps=True, pads=lambda m: open_counts(m.max_tokens) or m.padded,
        static="max_tokens=128", data_dependent=lambda m: open_counts(m.max_tokens),
    )  # fmt: skip

    def check(self, layout: Layout, model: str) -> None:
        if not layout.has_class:
            raise ValueError(
                f"ats scores tokens by the attention of the class token, which {model} lacks; use evit, topk or a "
                "merging method"
            )

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        prefix, places = tokens.layout.num_prefix, step.count(tokens.length, tokens.layout)
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
            whole: Tensor | bool
            if tokens.valid is None:
                whole = bool(tokens.num_patches == full)
            else:
                scores = scores * tokens.valid[:, prefix:]
                whole = tokens.valid_patches.unsqueeze(1) == full
            picked, order = sample_heights(scores, self.heights or tokens.layout.num_patches, whole)
            if step.strength is None:
                length, valid = settled_rows(picked.sum(1, keepdim=True), tokens)  # the one look of the host
            else:
                length = min(tokens.num_patches, places)
                if self.padded:
                    picked = picked & (picked.flip(1).cumsum(1).flip(1) <= length)  # the most significant ones
                else:
                    picked = _filled(picked, order, tokens, length)
                full_rows = not self.padded and tokens.valid is None
                valid = None if full_rows else real_rows(picked.sum(1, keepdim=True), length, prefix)
            front = stable_order(~picked)[:, :length]
        idx = with_prefix(order.gather(1, front), prefix)
        return KeepMap(idx, tokens.length, valid)

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        return n * shape.num_heads * shape.head_dim * 2


def _filled(picked: Tensor, order: Tensor, tokens: Tokens, length: int) -> Tensor:
    """As many patches as there are places [B, M]: picked ones first, then visible ones, each by significance.

    Padding is none of them: an image that has fewer real patches than there are places keeps these.

    Args:
        picked: [B, M] bool in ascending order of significance.
        order: [B, M] patch number at each place of that order.
        tokens: the tokens.
        length: places.
    """
    prefix, every = tokens.layout.num_prefix, picked.shape[1]
    rank = torch.arange(every, device=picked.device) + 4 * every * picked
    for real, weight in ((tokens.visible, 2), (tokens.valid, 1)):
        rank = rank if real is None else rank + weight * every * real[:, prefix:].gather(1, order)
    best = torch.zeros_like(picked).scatter(1, rank.topk(length, dim=1).indices, True)
    return best if tokens.valid is None else best & tokens.valid[:, prefix:].gather(1, order)
