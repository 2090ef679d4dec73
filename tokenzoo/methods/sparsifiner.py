"""Sparsifiner: a predictor guesses the attention map, and the best entries of it are all that is looked at."""

from __future__ import annotations

import math
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
from ..layers.mask_predictor import MaskPredictor, best_entries
from ..ops.attention import Heads, attend, attention_rows, full_precision
from ..ops.rows import split_dim


@register
@dataclass(frozen=True, kw_only=True)
class Sparsifiner(Companion, OwnAttention, Shaped, Learned, Method):
    """Attends to the entries of the map that a low-rank predictor guesses to be the largest; no token is removed.

    No time is saved: attention is computed for all pairs of tokens, in every head, and masked, as in the released code,
    and the predictor comes on top. Saving needs a sparse kernel. Block-sparse ones do not help (torch's flex attention
    skips blocks of 128 x 128 entries that are all closed, and entries chosen one by one leave next to none); `report`
    counts what runs. Prefix tokens look at everything. The choice has no gradient: the predictor learns from the loss
    `reconstruction`, the squared distance of its guess from the block's own map (theirs: from the teacher's, which is
    the same while the backbone is frozen, as it is in their first phase). Bound to the image size that it was made for.
    Pruning as in the paper is `topk` in the same recipe.

    Args:
        keep_rate: share of the entries of a row to look at.
        reduce_n: tokens per mixture of the guess.
        reduce_c: factor by which heads get narrower for it.
        coefficients: mixtures of a query that count.
        basis_threshold: entries of the basis up to this are none.
        reconstruction_weight: weight of the loss.
        dense_training: look at everything in training, as in their first phase.
        zeros_count: prefix tokens go on counting what an earlier method has dropped, as keys and values of zero, as the
            released code does.

    Source: Wei, Duke, Jiang, Aarabi, Taylor, Shkurti, "Sparsifiner: Learning Sparse Instance-Dependent Attention for
    Efficient Vision Transformers", CVPR 2023.
    """

    keep_rate: float = number(0.25, "1 looks at everything", above=0, most=1)
    reduce_n: int = number(6, "give tokens per mixture", least=1, whole=True)
    reduce_c: int = number(2, "1 leaves heads as wide as they are", least=1, whole=True)
    coefficients: int = number(8, "give mixtures per query", least=1, whole=True)
    basis_threshold: float = number(0.02, "0 keeps all positive ones", least=0)
    reconstruction_weight: float = number(0.01, "0 leaves the predictor as it is", least=0)
    dense_training: bool = False
    zeros_count: bool = False

    name = "sparsifiner"
    source = "Wei et al., CVPR 2023"
    kind = "attend less"
    owes = ("reconstruction",)
    gates = False
    traits = Traits(reads_maps=True, positions=True, attends=True)

    def strengths(self, depth: int) -> dict[int, float]:
        return dict.fromkeys(self.resolve_layers(depth), self.keep_rate) if self.keep_rate < 1 else {}

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        return n

    def check_recipe(self, methods: tuple[Method, ...], depth: int) -> None:
        for other in methods:
            if other is not self and (other.place in ("around", "ahead", "queries") or other.traits.attends):
                raise ValueError(f"sparsifiner chooses among what {other.name} acts in; give one of the two alone")

    def module_of(self, shape: BlockShape, layout: Layout, step: Step) -> nn.Module:
        return MaskPredictor(
            layout.num_prefix + layout.num_patches, shape.head_dim, shape.num_heads, self.reduce_n, self.reduce_c,
            self.coefficients, basis_threshold=self.basis_threshold,
        )  # fmt: skip

    def _guess(self, heads: Heads, tokens: Tokens, module: MaskPredictor, step: Step) -> tuple[Tensor, Tensor]:
        total, layout = len(module.proj_n), tokens.layout
        if total != layout.num_prefix + layout.num_patches:
            raise step.error(
                f"the predictor was made for {total} tokens, but these images have "
                f"{layout.num_prefix + layout.num_patches}; give images of the size that the model had when it was "
                "patched"
            )
        places = None if tokens.positions is None else tokens.original_positions()
        return module(heads.q, heads.k, places, layout.num_prefix)

    def attend(self, heads: Heads, bias: Tensor | None, tokens: Tokens, beside: Beside) -> Attended:
        note = self._reconstruction(heads, bias, tokens, beside) if beside.training else None
        if beside.training and self.dense_training:
            return Attended(attend(heads, bias), note=note)
        with torch.no_grad(), full_precision(heads.q):
            shut = self._shut(heads, bias, tokens, beside)
            nothing = shut.all(-1, keepdim=True)  # a row that may look at nothing; what it gives is set to 0
        joined = torch.zeros(shut.shape, device=shut.device).masked_fill(shut & ~nothing, float("-inf"))
        joined = joined if bias is None else joined + bias.masked_fill(nothing, 0.0)
        if self.zeros_count and (gone := len(beside.module.proj_n) - tokens.length) > 0:
            heads, joined = _with_zeros(heads, joined, tokens.layout.num_prefix, gone)
        out = attend(heads._replace(fused=heads.fused and heads.lam is None), joined)
        empty = nothing.squeeze(-1).transpose(1, 2)  # [B, N, 1 or H]
        if empty.shape[2] != heads.v.shape[1]:
            empty = empty.all(2, keepdim=True)
        out = split_dim(out, 2, heads.v.shape[1], -1).masked_fill(empty.unsqueeze(-1), 0.0)
        return Attended(out.flatten(2), note=note)

    def _shut(self, heads: Heads, bias: Tensor | None, tokens: Tokens, beside: Beside) -> Tensor:
        """Entries that are not looked at [B, H, N, N] bool."""
        module, prefix = beside.module, tokens.layout.num_prefix
        scores = module.scores(*self._guess(heads, tokens, module, beside.step))
        seen = tokens.valid if tokens.visible is None else tokens.visible
        mask = best_entries(scores, self.keep_rate, len(module.proj_n), seen)
        shut = ~F.pad(mask, (0, 0, prefix, 0), value=True)
        return shut if bias is None else shut | (bias == float("-inf"))

    def _reconstruction(self, heads: Heads, bias: Tensor | None, tokens: Tokens, beside: Beside) -> Tensor:
        """Squared distance of the guess from the map of every image [B]."""
        prefix = tokens.layout.num_prefix
        fixed = heads._replace(q=heads.q.detach(), k=heads.k.detach())
        guess = beside.module.guess(*self._guess(fixed, tokens, beside.module, beside.step))
        with torch.no_grad():
            real = attention_rows(fixed, prefix, heads.q.shape[2], bias)
        if real.shape[1] != guess.shape[1]:  # differential attention has one map per pair of heads
            guess = split_dim(guess, 1, real.shape[1], -1).mean(2)
        apart = (guess - real).square()
        asking = tokens.seen_patches
        if asking is not None:
            apart = apart.masked_fill(~asking[:, None, :, None], 0.0)
        return apart.sum((1, 2, 3))

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> None:
        return None

    def losses(self, records: tuple[Note, ...], teaching: Teaching) -> dict[str, Tensor]:
        apart = sum(record.value.mean() for record in records)
        return {"reconstruction": self.reconstruction_weight * apart}

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        rank = max(1, (layout.num_prefix + layout.num_patches) // self.reduce_n)
        width = max(1, shape.head_dim // self.reduce_c)
        patches = n - layout.num_prefix
        project = (n + patches) * shape.head_dim * width
        return shape.num_heads * (project + n * rank * width + patches * rank * width + patches * rank * n)


def _with_zeros(heads: Heads, bias: Tensor, prefix: int, count: int) -> tuple[Heads, Tensor]:
    """Heads with one key and value of zero more, and a bias: it counts several times, for prefix tokens alone."""
    column = torch.full_like(bias[..., :1], float("-inf"))
    column[:, :, :prefix] = math.log(count)
    return heads._replace(k=F.pad(heads.k, (0, 0, 0, 1)), v=F.pad(heads.v, (0, 0, 0, 1))), torch.cat([bias, column], 3)
