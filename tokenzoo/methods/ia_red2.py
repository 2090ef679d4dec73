"""IA-RED^2: interpreters in front of groups of blocks drop the patches under a threshold; trained by reward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.learned import Decision, Learned, Teaching
from ..core.method import BlockShape, Method, Step
from ..core.options import number
from ..core.registry import register
from ..core.schedule import Budget, open_counts
from ..core.selection import keep_counts, real_rows, settled_rows
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens
from ..core.traits import BEFORE, Traits
from ..layers.interpreter import Interpreter
from ..maps import KeepMap, TokenMap


def _thirds(depth: int) -> range:
    """Blocks that begin each third of the depth (0, 4, 8 of 12)."""
    return range(0, depth, max(1, -(-depth // 3)))


@register
@dataclass(frozen=True, kw_only=True)
class IARED2(Learned, Method):
    """Drops the patches that an interpreter scores below a threshold; each image keeps as many as it needs.

    The interpreter, the threshold and the reward follow the paper, of which no code was released. Ours, or not certain:
    the best patch always stays; norm, scale and beginning of the interpreter; all interpreters learn at once, and not
    one after the other; the baseline of the reward is the mean over the other images of the batch, and not the answer
    to a second, greedy pass; blocks 0, 4, 8 of 12.

    In training, patches are drawn by their scores and nothing is removed. An image that is answered rightly is
    rewarded 1 - share^2 in front of each group, with the share of its patches that are kept there, a wrong one
    -penalty; the loss `policy` follows the reward by REINFORCE. `tokenzoo train` hands the answers over, a loop of
    your own gives `Teaching(answers=logits, target=target)`.

    Args:
        threshold: score from which a patch is kept; 0 keeps all.
        heads: heads of an interpreter, a divisor of the channels.
        penalty: for a wrong answer.
        policy_weight: weight of the loss.
        max_tokens: fixed budget of tokens, class token included, for static shapes: an int or one entry per layer;
            None lets the image decide.

    Source: Pan, Panda, Jiang, Wang, Feris, Oliva, "IA-RED^2: Interpretability-Aware Redundancy Reduction for Vision
    Transformers", NeurIPS 2021; REINFORCE: Williams, Machine Learning, 1992.
    """

    threshold: float = number(0.5, "scores lie between 0 and 1", least=0, below=1)
    heads: int = number(4, "give a divisor of the channels", least=1, whole=True)
    penalty: float = number(0.5, "0 leaves wrong answers without reward", least=0)
    policy_weight: float = number(1.0, "0 leaves the interpreters as they are", least=0)
    max_tokens: int | tuple[int | None, ...] | None = None

    name = "ia_red2"
    source = "Pan et al., NeurIPS 2021"
    kind = "prune"
    schedule = Budget(layers=_thirds)
    owes = ("policy",)
    traits = Traits(
        place=BEFORE, pads=True, static="max_tokens=128", data_dependent=lambda m: open_counts(m.max_tokens),
    )  # fmt: skip

    def strengths(self, depth: int) -> dict[int, int | None]:
        return super().strengths(depth) if self.threshold > 0 else {}

    def module(self, dim: int, step: Step) -> nn.Module:
        if dim % self.heads:
            raise step.error(f"heads={self.heads} does not divide the {dim} channels; give a divisor")
        return Interpreter(dim, self.heads)

    def draw(self, scores: Tensor) -> Tensor:
        """What is kept in training [B, M], drawn by the scores."""
        return torch.bernoulli(scores)

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap:
        prefix = tokens.layout.num_prefix
        scores, left = signals.module(tokens.x[:, prefix:]), tokens.left[:, prefix:].detach() > 0.5
        with torch.no_grad():
            best = scores.masked_fill(~left, -1.0).argmax(1, keepdim=True)
            safe = torch.arange(left.shape[1], device=left.device) == best
            if signals.training:
                gate = torch.where(safe, torch.ones_like(scores), self.draw(scores))
            else:
                counts = (left & ((scores >= self.threshold) | safe)).sum(1, keepdim=True)
                if step.strength is None:
                    length, valid = settled_rows(counts, tokens)  # the one look of the host at the data
                else:
                    length = min(step.count(tokens.length, tokens.layout), tokens.num_patches)
                    counts = counts.clamp(max=length)
                    valid = real_rows(counts, length, prefix)
        if signals.training:
            return self.gated(gate, tokens, step, scores=scores)
        kept = keep_counts(F.pad(scores.detach(), (prefix, 0)), tokens, counts, length)
        return KeepMap(kept.idx, tokens.length, valid)

    def losses(self, records: tuple[Decision, ...], teaching: Teaching) -> dict[str, Tensor]:
        if teaching.answers is None or teaching.target is None:
            raise ValueError(
                "ia_red2 rewards right answers: give the model's own and the target, Teaching(answers=logits, "
                "target=target)"
            )
        target = teaching.target if teaching.target.dim() == 1 else teaching.target.argmax(1)
        right, total = teaching.answers.argmax(1) == target, records[0].scores.new_zeros(())
        for record in records:
            share = record.after.detach().mean(1)
            reward = torch.where(right, 1 - share.square(), torch.full_like(share, -self.penalty))
            others = (reward.sum() - reward) / max(1, len(reward) - 1)  # without the own one, no bias comes in
            chance = record.scores.clamp(1e-6, 1 - 1e-6)
            gate = record.gate.detach()
            said = gate * chance.log() + (1 - gate) * (1 - chance).log()
            said = (said * record.before.detach()).sum(1) / record.before.detach().sum(1).clamp(min=1)
            total = total - ((reward - others) * said).mean()
        return {"policy": self.policy_weight * total / len(records)}

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        return (n - layout.num_prefix) * (shape.dim + 1) * shape.dim + shape.dim * shape.dim
