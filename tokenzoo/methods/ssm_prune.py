"""ssm_prune: drop the tokens whose scan says little, and keep the scan on its path."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.keep_rate import KeepRate
from ..core.method import Step
from ..core.mixer_signals import MixerSignals
from ..core.mixins import Scanning, scanned_rows
from ..core.options import choice
from ..core.registry import register
from ..core.schedule import Balanced
from ..core.tokens import Tokens
from ..core.traits import AFTER, Scans, Traits
from ..maps import KeepMap, TokenMap
from ..ops.scan_order import from_scan, to_scan

SCORES = ("both_ungated", "both", "backward", "released")
MEASURES = {
    "clip": lambda y: y.clamp(min=0).sum(-1),
    "sum": lambda y: y.sum(-1),
    "l1": lambda y: y.abs().sum(-1),
    "l2": lambda y: y.square().sum(-1),
}
ALIGNMENTS = ("carry", "decay", "none")
RULES = ("hold", "bias")


@register
@dataclass(frozen=True, kw_only=True)
class SSMPrune(Scanning, KeepRate):
    """Prunes tokens of a scanning model by what their scan puts out, with the hidden state aligned across the gaps.

    Importance is the output of the scan, negative values clipped, summed over the channels. Survivors stay in the order
    of the original path. With alignment "carry" the state passes over a gap as it is; with "decay" pruned positions
    still let it decay, by the step of the kept token before them ("hold") or that of a token of zeros ("bias"); either
    way only kept tokens are scanned. As released, an odd number of tokens stays where there is a class token, and a
    class token in the middle goes to the middle of what is left.

    Args:
        score: output of the scan in both directions before the gate ("both_ungated") or behind it ("both"), of the
            backward direction behind the gate ("backward"), or as released ("released": that, unclipped and in reversed
            token order).
        measure: "clip" (sum of the positive values), "sum", "l1" or "l2".
        alignment: "carry", "decay", or "none" (survivors in the order of their score, which breaks the path).
        rule: what decays in gaps, "hold" or "bias"; only read with alignment="decay".
        recentre: put a class token from the middle into the middle of what is left; None for all but "decay", where
            gaps are counted on the original path and it has to stay between its neighbours.
        tokens: patches to keep instead, an int or one entry per layer; even where there is a class token.
        layers: blocks to act after; by default the 5th and the 15th of 24 (indices 4 and 14), in proportion.

    Source: Zhan, Kong, Gong et al., "Exploring Token Pruning in Vision State Space Models", NeurIPS 2024. The paper's
    alignment was not released; "carry" and "decay" are the two readings of it.
    """

    keep_rate: float | tuple[float, ...] = 0.8
    score: str = choice("both_ungated", SCORES)
    measure: str = choice("clip", tuple(MEASURES))
    alignment: str = choice("carry", ALIGNMENTS)
    rule: str = choice("hold", RULES)
    recentre: bool | None = None

    name = "ssm_prune"
    source = "Zhan et al., NeurIPS 2024"
    kind = "prune"
    schedule = Balanced(layers=lambda depth: tuple(sorted({max(0, depth * part // 24 - 1) for part in (5, 15)})))
    traits = Traits(
        place=AFTER,
        scans=Scans(reads=True, ordered=True, gap_rule=lambda m: m.rule if m.alignment == "decay" else None),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recentre not in (None, True, False):
            raise TypeError(f"ssm_prune: recentre={self.recentre!r}; give True, False or None")
        if self.recentre and self.alignment == "decay":
            raise ValueError(
                "ssm_prune: recentre=True moves the class token past patches, which leaves no gaps to decay over; "
                "leave it out with alignment='decay'"
            )

    def map(self, tokens: Tokens, signals: MixerSignals, step: Step) -> TokenMap | None:
        prefix = tokens.layout.num_prefix
        kept = step.tokens_out(tokens.length, tokens.layout) - prefix
        if kept == tokens.num_patches:
            return None
        best = self.importance(tokens, signals)[:, prefix:].topk(kept, dim=1).indices
        if self.alignment != "none":
            best = best.sort(dim=1).values
        front = torch.arange(prefix, device=best.device).expand(best.shape[0], -1)
        return KeepMap(torch.cat([front, best + prefix], dim=1), tokens.length)

    @torch.no_grad()
    def importance(self, tokens: Tokens, signals: MixerSignals) -> Tensor:
        """Importance of all tokens [B, N] float32.

        Args:
            tokens: the tokens behind the mixer.
            signals: view of the scan that ran.
        """
        if self.score in ("both_ungated", "both"):
            y = sum(signals.scanned("y", direction) for direction in range(signals.directions))
        else:
            y = signals.scanned("y", signals.directions - 1)
        y = y.float() if self.score == "both_ungated" else (y * signals.gate).float()
        if self.score != "released":
            return MEASURES[self.measure](y)
        rows = scanned_rows(tokens)
        reversed_ = to_scan(y.sum(-1, keepdim=True), rows).flip(1)
        return from_scan(reversed_, rows).squeeze(-1)

    def scan_rows(self, tokens: Tokens, token_map: TokenMap, step: Step) -> tuple[int, ...] | None:
        layout = tokens.layout
        in_middle = layout.num_prefix == 1 and 0 < layout.scan_rows[0] < layout.num_patches
        recentre = self.alignment != "decay" if self.recentre is None else self.recentre
        return ((token_map.n_out - 1) // 2,) if in_middle and recentre else None
