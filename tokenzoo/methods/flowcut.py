"""FlowCut: a running score of information flow; the evener a block attends, the fewer patches it drops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.method import BlockShape, Method, Step
from ..core.options import number
from ..core.registry import register
from ..core.schedule import Schedule
from ..core.selection import importance_macs, keep_counts, own_counts, settled_rows
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens
from ..core.traits import AFTER, Traits
from ..maps import TokenMap
from ..ops.attention import full_precision
from ..ops.flow import evenness, flow_scores, value_likeness


def _every_second(depth: int) -> Sequence[int]:
    """Blocks that leave an even number of blocks to the last but two, that one included."""
    return range((depth - 3) % 2, max(depth - 2, 1), 2)


@register
@dataclass(frozen=True, kw_only=True)
class FlowCut(Method):
    """Drops patches block by block, down to a fixed number, by a score that is blended over all blocks; training-free.

    The score of a block is class attention and the likeness of values to that of the class token, times the length of
    the value. A block drops few patches while its class attention is spread evenly, and its last one drops down to the
    goal; patches keep their order. Images keep different counts and a batch is padded to its longest one, so that
    images do not influence each other; the longest count is read on the host. Without a class token the score is the
    mean attention received times the length of the value (as in the authors' port for such models).

    Args:
        keep_rate: share of the image's patches that is left at the end, in (0, 1].
        tokens: patches that are left at the end instead.
        entropy: evenness of attention to assume, in [0, 1], for static shapes; None asks each image and block
            (`flops=` then solves for it, together with the goal).
        blend: share of a block's own score in the running one, in (0, 1].
        batch_rule: all images drop as many patches as the one that drops most (the released rule).

    Source: Tong et al., "FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models",
    NeurIPS 2025.
    """

    keep_rate: float = number(0.25, "give the share of the patches to keep, such as 0.25", above=0, most=1)
    tokens: int | None = number(None, "give the number of patches to keep, at least 1", least=1, whole=True, none=True)
    entropy: float | None = number(None, "0.9 is spread fairly evenly", least=0, most=1, none=True)
    blend: float = number(0.5, "1 forgets earlier blocks", above=0, most=1)
    batch_rule: bool = False

    name = "flowcut"
    source = "Tong et al., NeurIPS 2025"
    kind = "prune"
    schedule = Schedule(layers=_every_second)
    traits = Traits(
        place=AFTER, reads_maps=True, carries=True, carries_values=True, static="entropy=0.9",
        pads=lambda m: m.entropy is None, data_dependent=lambda m: m.entropy is None,
    )  # fmt: skip

    def strengths(self, depth: int) -> dict[int, int | None]:
        """Blocks that are left to the last one that drops; None in blocks that only score."""
        layers = self.resolve_layers(depth)
        if (self.tokens is None and self.keep_rate == 1) or not layers:
            return {}
        return {i: max(layers) - i if i in layers else None for i in range(max(layers) + 1)}

    def _goal(self, layout: Layout) -> int:
        """Patches that are left at the end."""
        if self.tokens is None and layout.own_grids:
            raise ValueError(
                f"flowcut: keep_rate={self.keep_rate} is a share of the patches that an image had, which the images of "
                "this batch, with grids of their own, differ in; give tokens= instead"
            )
        return self.tokens or max(1, round(self.keep_rate * layout.num_patches))

    def count(self, n: int, step: Step, layout: Layout) -> int:
        """Patches that remain; the most that can where the image decides."""
        patches, goal = n - layout.num_prefix, self._goal(layout)
        if step.strength is None or patches <= goal:
            return patches
        if step.strength == 0:
            return goal
        if self.entropy is None:
            return patches
        return max(goal, patches - round((patches - goal) / math.sqrt(step.strength) * (1 - self.entropy**2)))

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        return layout.num_prefix + step.count(n, layout)

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        layout, patches, left, goal = tokens.layout, tokens.num_patches, step.strength, self._goal(tokens.layout)
        if left is None or patches <= goal:
            return None
        if tokens.scores is None:
            raise step.error("no score has been carried here; call the model, not its blocks out of order")
        if left == 0 or self.entropy is not None:
            rule = lambda m: step.count(layout.num_prefix + m, layout)  # noqa: E731
            return keep_counts(tokens.scores, tokens, own_counts(rule, tokens), rule(patches))
        with torch.no_grad(), full_precision(tokens.x):
            own = torch.full_like(tokens.scores[:, :1], patches, dtype=torch.int64)
            own = own if tokens.valid is None else tokens.valid_patches.unsqueeze(1)
            even = evenness(self._attention(tokens, signals), own)
            dropped = ((own - goal).clamp(min=0) / math.sqrt(left) * (1 - even**2)).round().long()
            if self.batch_rule and len(own):
                dropped = dropped.amax(0, keepdim=True)
            counts = torch.minimum(own, (own - dropped).clamp(min=goal))
            length, valid = settled_rows(counts, tokens)
            return keep_counts(tokens.scores, tokens, None if valid is None else counts, length)

    def carry(self, tokens: Tokens, signals: Signals, token_map: TokenMap | None, step: Step) -> Tensor:
        seen = tokens if token_map is None else tokens.reduce(token_map)
        prefix = tokens.layout.num_prefix
        with torch.no_grad(), full_precision(tokens.x):
            values = signals.values.float()
            real = seen.valid if seen.visible is None else seen.visible
            alike = value_likeness(values, prefix, real) if tokens.layout.has_class else None
            own = flow_scores(self._attention(seen, signals), alike, values.mean(2)[:, prefix:])
            own = torch.nn.functional.pad(own, (prefix, 0))
            if token_map is not None:
                own = token_map.lift(own.unsqueeze(-1)).squeeze(-1)
            return own if tokens.scores is None else (1 - self.blend) * tokens.scores + self.blend * own

    @staticmethod
    def _attention(tokens: Tokens, signals: Signals) -> Tensor:
        """Importance of the patches [B, M], 0 for padding and hidden ones."""
        found = signals.importance[:, tokens.layout.num_prefix :].clamp(min=0)  # differential attention goes below
        return found if tokens.seen_patches is None else found * tokens.seen_patches

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        return importance_macs(n, shape, layout) + n * shape.num_heads * shape.head_dim * layout.has_class

    def dial(self, t: float, depth: int, layout: Layout) -> Method:
        entropy = 1 - t if self.entropy is None else self.entropy
        return replace(self, tokens=max(1, round((1 - t) * layout.num_patches)), entropy=entropy)
