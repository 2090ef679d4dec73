"""thresholds: a learned threshold on likeness merges tokens, another one on importance prunes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.learned import Decision, Learned, Teaching
from ..core.method import BlockShape, Method, Step
from ..core.options import number
from ..core.processes import mean_of_all
from ..core.registry import register
from ..core.schedule import Budget, open_counts
from ..core.selection import importance_macs
from ..core.signals import Signals
from ..core.thresholding import judge, removed
from ..core.tokens import Layout, Tokens
from ..core.traits import Traits
from ..maps import Moves, TokenMap


class TwoThresholds(nn.Module):
    """The thresholds of one block.

    Args:
        alike: where the cosine begins.
        least: where the importance begins.
    """

    def __init__(self, alike: float, least: float) -> None:
        super().__init__()
        self.alike = nn.Parameter(torch.tensor(float(alike)))
        self.least = nn.Parameter(torch.tensor(float(least)))


@register
@dataclass(frozen=True, kw_only=True)
class Thresholds(Learned, Method):
    """Merges patches that are more alike, then prunes those that weigh less, than one learned threshold each per block.

    Ours, after the idea of learned thresholds by Bonnaerens and Dambre (LTMP); written from that idea, not from their
    code, and not held against it. Every second patch is a source and merges into the likest of the others (cosine of
    the mean key), weighted by sizes; importance is head-mean class attention (received attention without a class
    token) as a multiple of the mean. Images decide how many tokens stay; a batch is padded to its longest one.

    In training nothing is removed: hard decisions with the gradients of sigmoids close gates, and the loss `budget`
    pulls the multiply-adds towards `target`. Untrained, nothing merges and nothing is pruned.

    Args:
        target: share of the unpatched multiply-adds that the loss aims at, the mean over a batch.
        budget_weight: weight of the squared distance from it.
        temperature: of the sigmoids; differences of cosines and of relative importance are divided by it.
        alike: where the threshold on the cosine begins; at 1 nothing merges.
        least: where the threshold on the importance begins; at 0 nothing is pruned.
        max_tokens: fixed budget of tokens, prefix included, for static shapes: an int or one entry per layer; the least
            important ones go. None lets the image decide.
        prop_attn: see above; sizes are kept either way.

    Source: ours, after the idea of Bonnaerens, Dambre, "Learned Thresholds Token Merging and Pruning for Vision
    Transformers", TMLR 2023.
    """

    target: float = number(0.6, "give a share of the multiply-adds, such as 0.6", above=0, most=1)
    budget_weight: float = number(10.0, "0 lets the other losses decide", least=0)
    temperature: float = number(0.1, "0.1 is a soft step", above=0)
    alike: float = number(1.0, "cosines lie between -1 and 1", least=-1, most=1)
    least: float = number(0.0, "1 is the mean over the tokens", least=0)
    max_tokens: int | tuple[int | None, ...] | None = None
    prop_attn: bool = True

    name = "thresholds"
    source = "ours, after Bonnaerens & Dambre, TMLR 2023"
    kind = "prune + merge"
    schedule = Budget()
    owes = ("budget",)
    priced = True
    traits = Traits(
        reads_maps=True, sizes=True, proportional=lambda m: m.prop_attn, pads=True, static="max_tokens=128",
        data_dependent=lambda m: open_counts(m.max_tokens),
    )  # fmt: skip

    def module(self, dim: int, step: Step) -> nn.Module:
        # a cosine of equal keys comes out a rounding error above 1
        return TwoThresholds(self.alike + 1e-3 * (self.alike == 1), self.least)

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        prefix, limits = tokens.layout.num_prefix, signals.module
        if tokens.num_patches < 2:
            return None
        with torch.no_grad():
            importance, metric = signals.importance[:, prefix:], signals.mean_key[:, prefix:]
        if signals.training:
            verdict = judge(tokens, importance, metric, limits.alike, limits.least, self.temperature)
            moves = Moves(verdict.into, verdict.taken, tokens.sizes()[:, prefix:, 0])
            return self.gated(verdict.stays, tokens, step, moves=moves)
        with torch.no_grad():
            verdict = judge(tokens, importance, metric, limits.alike, limits.least, self.temperature)
            most = None if step.strength is None else step.tokens_out(tokens.length, tokens.layout) - prefix
            return removed(verdict, tokens, most)

    def losses(self, records: tuple[Decision, ...], teaching: Teaching) -> dict[str, Tensor]:
        spent = mean_of_all(teaching.prices.spent(records).mean())
        return {"budget": self.budget_weight * F.mse_loss(spent, spent.new_tensor(self.target))}

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        patches = n - layout.num_prefix
        return importance_macs(n, shape, layout) + patches * patches * shape.head_dim
