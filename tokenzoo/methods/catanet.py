"""catanet: patches attend within groups of alike ones, sorted by shared centres, and to these centres."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.learned import Learned, Note, Teaching
from ..core.method import BlockShape, Method, Step
from ..core.mixins import Attended, Beside, Companion, OwnAttention, Shaped
from ..core.options import number
from ..core.registry import register
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens
from ..core.traits import Traits
from ..layers.centres import Centres
from ..ops.attention import Heads, attend, full_precision
from ..ops.grouped import attend_in_groups, looked_at
from ..ops.rows import stable_order, take_rows


@register
@dataclass(frozen=True, kw_only=True)
class CATANet(Companion, OwnAttention, Shaped, Learned, Method):
    """Replaces attention among patches by attention in groups of alike ones, and to shared centres; none is removed.

    Patches are sorted by their nearest centre and cut into groups, which look at themselves, the next group, the prefix
    tokens and, in a second attention whose output is added, the centres. The grouping is CATANet's, which was made for
    super-resolution and trained from scratch (its own block: `tokenzoo.layers.token_aggregation`). That it stands in
    the attention of a ViT is ours: queries, keys and values are the model's own, prefix tokens look at everything, the
    last group looks at itself alone, and centres are parameters that the loss `centres` (one minus the cosine with the
    nearest) and the task move, in place of a moving average. A pretrained model has to be fine-tuned with it. With
    groups as large as the sequence it is full attention.

    Args:
        group_size: patches per group.
        centres: shared centres per block.
        centre_weight: weight of the loss.

    Source: ours, after Liu, Liu, Tang, Wu, "CATANet: Efficient Content-Aware Token Aggregation for Lightweight Image
    Super-Resolution", CVPR 2025.
    """

    group_size: int = number(64, "give patches per group", least=1, whole=True)
    centres: int = number(16, "give a number of centres", least=1, whole=True)
    centre_weight: float = number(0.1, "0 leaves the centres to the task", least=0)

    name = "catanet"
    source = "ours, after Liu et al., CVPR 2025"
    kind = "attend less"
    owes = ("centres",)
    gates = False
    traits = Traits(reads_maps=True, attends=True)

    def strengths(self, depth: int) -> dict[int, int]:
        return dict.fromkeys(self.resolve_layers(depth), self.group_size)

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        return n

    def check_recipe(self, methods: tuple[Method, ...], depth: int) -> None:
        for other in methods:
            if other is not self and (other.place in ("around", "ahead", "queries") or other.traits.attends):
                raise ValueError(f"catanet replaces the attention that {other.name} acts in; give one of the two alone")

    def module_of(self, shape: BlockShape, layout: Layout, step: Step) -> nn.Module:
        width = shape.num_heads * shape.head_dim
        return Centres(shape.dim, width, width, self.centres)

    def attend(self, heads: Heads, bias: Tensor | None, tokens: Tokens, beside: Beside) -> Attended:
        prefix, module, seen = tokens.layout.num_prefix, beside.module, tokens.seen_patches
        with full_precision(beside.z):
            nearest, cosine = module.nearest(beside.z[:, prefix:].detach())
        if seen is not None:
            nearest = nearest.masked_fill(~seen, self.centres)
        order = stable_order(nearest)
        plain = heads.lam is None and heads.talk is None and heads.placed is None and heads.kernel is None
        if plain and heads.fused and seen is None and not heads.dropout:
            out = self._grouped(heads, bias, order, prefix)
        else:
            out = attend(heads, self._joined(tokens, bias, order))
        out = out + self._from_centres(heads, beside)
        note = None
        if beside.training:
            apart = 1 - cosine
            note = apart.mean(1) if seen is None else (apart * seen).sum(1) / seen.sum(1).clamp(min=1)
        return Attended(out, note=note)

    def _grouped(self, heads: Heads, bias: Tensor | None, order: Tensor, prefix: int) -> Tensor:
        """Every group by itself; prefix tokens are keys of all groups, and look at everything."""
        place = order.argsort(dim=1)
        front = None if bias is None else (bias if bias.shape[2] == 1 else bias[:, :, :prefix])
        out = attend(heads._replace(q=heads.q[:, :, :prefix]), front) if prefix else None
        q, k, v = (take_rows(t[:, :, prefix:].transpose(1, 2), order).transpose(1, 2) for t in heads[:3])
        if bias is not None:
            bias = bias.expand(order.shape[0], -1, -1, -1)
            patches = bias if bias.shape[2] == 1 else _sorted(bias[:, :, prefix:], order, 2)
            bias = torch.cat([patches[..., :prefix], _sorted(patches[..., prefix:], order, 3)], dim=3)
        groups = attend_in_groups(
            q, k, v, self.group_size, heads.scale, bias, heads.k[:, :, :prefix], heads.v[:, :, :prefix],
            mirror=False,
        )  # fmt: skip
        groups = take_rows(groups.transpose(1, 2).flatten(2), place)
        return groups if out is None else torch.cat([out, groups], dim=1)

    def _joined(self, tokens: Tokens, bias: Tensor | None, order: Tensor) -> Tensor:
        """The same as a bias of the full map [B, 1 or H, N, N]: minus infinity where nobody looks."""
        prefix, patches = tokens.layout.num_prefix, tokens.num_patches
        counts = tokens.seen_patches
        count = torch.full_like(order[:, 0], patches) if counts is None else counts.sum(1)
        times = looked_at(count, patches, self.group_size)
        place = order.argsort(dim=1)
        times = take_rows(take_rows(times, place).transpose(1, 2), place).transpose(1, 2)
        joined = F.pad(times, (prefix, 0, prefix, 0), value=1.0).log().unsqueeze(1)
        return joined if bias is None else joined + bias

    def _from_centres(self, heads: Heads, beside: Beside) -> Tensor:
        """What tokens read of the centres [B, N, H * Dv]."""
        module, width = beside.module, heads.q.shape[1] * heads.q.shape[3]
        first = beside.first * heads.q.shape[3]
        k = module.to_k(module.means)[:, first : first + width].unflatten(1, (heads.q.shape[1], -1))
        v = module.to_v(module.means)[:, first : first + width].unflatten(1, (heads.v.shape[1], -1))
        k, v = (t.transpose(0, 1).unsqueeze(0).expand(heads.q.shape[0], -1, -1, -1).to(heads.q.dtype) for t in (k, v))
        return attend(heads._replace(k=k, v=v, placed=None, kernel=None))

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> None:
        return None

    def losses(self, records: tuple[Note, ...], teaching: Teaching) -> dict[str, Tensor]:
        return {"centres": self.centre_weight * sum(record.value.mean() for record in records) / len(records)}

    def pairs(self, n: int, layout: Layout, step: Step) -> int:
        patches = n - layout.num_prefix
        size = max(1, min(patches, self.group_size))
        in_groups = -(-patches // size) * size * (2 * size + layout.num_prefix)
        return layout.num_prefix * n + in_groups + n * self.centres

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        width = shape.num_heads * shape.head_dim
        return (n - layout.num_prefix) * self.centres * shape.dim + 2 * self.centres * shape.dim * width


def _sorted(bias: Tensor, order: Tensor, dim: int) -> Tensor:
    """Rows or columns of a bias [B, H, N, M] in an order [B, N or M]."""
    index = order[:, None, :, None] if dim == 2 else order[:, None, None, :]
    return torch.take_along_dim(bias, index, dim=dim)
