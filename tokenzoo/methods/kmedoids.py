"""K-Medoids: patches that stand for the patches around them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core.grouping import around_centres
from ..core.keep_rate import KeepRate
from ..core.method import BlockShape, Step
from ..core.options import choice, number
from ..core.registry import register
from ..core.schedule import Keep, kept_of, kept_patches, quarters
from ..core.selection import keep_patches, own_counts, real_rows, with_prefix
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens
from ..core.traits import BEFORE, Traits
from ..maps import KeepMap, TokenMap
from ..ops.cells.medoids import farthest_first, refine
from ..ops.cells.spectral import spectral_rows
from ..ops.distances import squared_distances


@register
@dataclass(frozen=True, kw_only=True)
class KMedoids(KeepRate):
    """Keeps the medoids of k-means-like clusters of patches at a few blocks, before attention; training-free.

    All pairs of patches are compared: one map of distances per block that reduces. Rounds are fixed in number, not
    until nothing moves, so that images of a batch do not wait for each other. Frames of a video are single images here;
    `tokenzoo.layers.SegmentMedoids` clusters segments of several frames between two blocks.

    Args:
        start: "attention": the patches that received most attention in the block before, which block 0 has not;
            "farthest": the longest patch, then always the one farthest from all chosen (CenterCLIP): one step after
            the other, as many as patches are kept, also in compiled and exported graphs.
        cost: a cluster's new medoid has the least "attention" received, times the distance to all patches (Haurum et
            al., as released), or the least distance to its own "cluster" (CenterCLIP).
        iterations: rounds; 0 keeps the start.
        mean: clusters become means of their patches instead of medoids.
        space: what distances are measured in: "tokens", or "spectral", the smoothest eigenvectors of a graph of the
            patches (CenterCLIP's spectral form, with start="farthest" and cost="cluster"). That is an eigenproblem of
            all patches per image, for which ONNX has no operator; attention scores are of no use there.
        sigma: width of the graph's kernel, in units of the tokens; None for the root of the mean squared distance of an
            image. Published: 2.
        graph: an entry of the graph stays where one patch is among so many nearest of the other, itself counted; None
            for all entries.

    Source: Haurum et al., "Which Tokens to Use?", ICCV Workshops 2023; Zhao, Zhu, Wang, Yang, "CenterCLIP", SIGIR 2022.
    """

    start: str = choice("attention", ("attention", "farthest"))
    cost: str = choice("attention", ("attention", "cluster"))
    iterations: int = number(3, "give whole rounds; 0 keeps the start", least=0, whole=True)
    mean: bool = False
    space: str = choice("tokens", ("tokens", "spectral"))
    sigma: float | None = number(None, "give a positive width, or None", above=0, none=True)
    graph: int | None = number(None, "give a number of patches, or None for all", least=1, whole=True, none=True)

    name = "kmedoids"
    source = "Haurum et al., ICCV-W 2023"
    kind = "prune"
    schedule = Keep(layers=lambda depth: [i for i in quarters(depth) if i > 0])
    traits = Traits(
        place=BEFORE, reads_maps=lambda m: m._weighs, carries=True, merges=lambda m: m.mean, mixes=lambda m: m.mean,
        mass_pool=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.space == "spectral" and self._weighs:
            raise ValueError("kmedoids: space='spectral' needs start='farthest' and cost='cluster'")

    @property
    def _weighs(self) -> bool:
        return "attention" in (self.start, self.cost)

    def strengths(self, depth: int) -> dict[int, tuple[float, int | None, bool]]:
        """(rate, count, whether the next block wants the attention received here); rate 1 for blocks that keep all."""
        found = super().strengths(depth)
        if not self._weighs:
            return {i: (*own, False) for i, own in found.items()}
        if 0 in found:
            raise ValueError(
                "kmedoids: layers names block 0, before which no patch received attention; begin at block 1 or later, "
                "or set start='farthest' and cost='cluster'"
            )
        blocks = sorted({*found, *(i - 1 for i in found)})
        return {i: (*found.get(i, (1.0, None)), i + 1 in found) for i in blocks}

    def count(self, n: int, step: Step, layout: Layout) -> int:
        return super().count(n, step._replace(strength=step.strength[:2]), layout)

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        prefix, layout = tokens.layout.num_prefix, tokens.layout
        count = kept_patches(tokens.length, step, layout)
        if count == tokens.num_patches and (tokens.valid is None or step.strength[:2] == (1.0, None)):
            return None
        if self._weighs and tokens.scores is None:
            raise step.error("no attention has been carried here; call the model, not its blocks out of order")
        x, seen = tokens.x[:, prefix:], tokens.seen_patches
        squared, own_count = squared_distances(x), own_counts(kept_of(step, layout), tokens)
        if self.space == "spectral":
            if tokens.visible is not None:
                raise step.error("space='spectral' knows no attn_mask; call the model without a mask, or use 'tokens'")
            rows = spectral_rows(squared, count, self.sigma, self.graph, seen, own_count)
            squared = squared_distances(rows)
        distances = squared.sqrt()
        weight = tokens.scores[:, prefix:] if self._weighs else None
        real = real_rows(own_count, count, prefix)
        own = None if real is None else real[:, prefix:]
        if self.start == "attention":
            first = keep_patches(weight, tokens, kept_of(step, layout)).idx[:, prefix:] - prefix
        else:
            first = farthest_first(x.detach().float().norm(dim=2), distances, count, seen)
        found = refine(distances, first, self.iterations, weight if self.cost == "attention" else None, own, seen)
        keep = KeepMap(with_prefix(found, prefix), tokens.length, real)
        return around_centres(keep, distances, tokens) if self.mean else keep

    def carry(self, tokens: Tokens, signals: Signals, token_map: TokenMap | None, step: Step) -> Tensor | None:
        if not step.strength[2]:
            return None
        received = signals.attention_received.detach()
        return received if token_map is None else token_map.lift(received.unsqueeze(-1)).squeeze(-1)

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        patches, kept = n - layout.num_prefix, n_out - layout.num_prefix
        received = n_out * n_out * shape.entry if step.strength[2] else 0
        if kept == patches:
            return received
        # eigenvectors take about three products of matrices as large
        graph = patches * patches * (3 * patches + kept) if self.space == "spectral" else 0
        return received + patches * patches * shape.dim + graph
