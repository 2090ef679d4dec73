"""Methods whose module scores the patches: gates in training, the best patches afterwards; written once for all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.layer_macs import linear_macs
from .keep_rate import KeepRate
from .learned import Decision, Learned, Teaching
from .method import Method
from .schedule import kept_of
from .selection import keep_patches
from .signals import Signals
from .step import BlockShape, Step
from .tokens import Layout, Tokens
from .traits import BEFORE, Traits


@dataclass(frozen=True, kw_only=True)
class LearnedKeep(Learned, KeepRate):
    """Base of methods that keep the patches which a learned module scores highest.

    A subclass makes the module: called with patches [B, M, C] and what is left of each [B, M, 1], it gives scores to
    keep and to drop [B, M, 2], or to keep alone [B, M]. In training, the scores are drawn from with Gumbel noise, hard
    values with a soft gradient, and nothing is removed; in eval mode the best patches stay, in falling order. The loss
    is the squared distance between the share that each image keeps and the one it should.

    Args:
        ratio_weight: weight of the loss on the share of patches that is kept.
    """

    ratio_weight: float = 2.0

    kind = "prune"
    traits = Traits(place=BEFORE)
    owes = ("ratio",)
    sees_itself: ClassVar[bool] = False  # see `GateMap`

    def scores(self, tokens: Tokens, signals: Signals, step: Step) -> Tensor:
        """What the module says [B, M, 2] or [B, M], float32 at least."""
        prefix = tokens.layout.num_prefix
        left = tokens.left[:, prefix:].unsqueeze(2).to(tokens.x.dtype)
        found = signals.module(tokens.x[:, prefix:], left)
        return found.to(torch.promote_types(found.dtype, torch.float32))

    def draw(self, scores: Tensor, tokens: Tokens, step: Step) -> Tensor:
        """Gates of the patches in training [B, M], from their scores."""
        if scores.dim() == 2:
            scores = torch.stack([scores, torch.zeros_like(scores)], dim=2)
        return F.gumbel_softmax(scores, hard=True)[..., 0]

    def share(self, tokens: Tokens, step: Step) -> float:
        """Share of the patches that losses should find kept."""
        rate, count = step.strength[:2]
        return rate if count is None else count / tokens.num_patches

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> Any:
        scores = self.scores(tokens, signals, step)
        if signals.training:
            gate, share = self.draw(scores, tokens, step), self.share(tokens, step)
            return self.gated(gate, tokens, step, share, scores, self.sees_itself)
        keep = scores if scores.dim() == 2 else scores[..., 0] - scores[..., 1]
        return keep_patches(keep, tokens, kept_of(step, tokens.layout))

    def losses(self, records: tuple[Decision, ...], teaching: Teaching) -> dict[str, Tensor]:
        apart = [(record.kept - record.share).square().mean() for record in records]
        return {"ratio": self.ratio_weight * sum(apart) / len(apart)}

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        return (n - layout.num_prefix) * module_macs(self, shape.dim, step._replace(key=None))


@lru_cache(maxsize=256)
def module_macs(method: Method, dim: int, step: Step) -> int:
    """Multiply-adds per patch of the linear layers in a method's module, which is made without memory for it."""
    with torch.device("meta"):
        return linear_macs(method.module(dim, step))
