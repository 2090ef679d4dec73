"""Medoids of the patches of several video frames: the layer of CenterCLIP, between two blocks of a ViT."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.cells.medoids import clusters, farthest_first, refine
from ..ops.cells.spectral import spectral_rows
from ..ops.distances import squared_distances
from ..ops.rows import split_dim, take_rows

HOW = ("medoids", "mean", "pooling")


class SegmentMedoids(nn.Module):
    """Joins consecutive frames of clips to segments, of each of which a few tokens stay; without weights.

    Frames go through the blocks in front one by one; behind the layer a segment is one sequence, so that its frames
    attend to each other. Medoids stand in the order of the frames, inside of a frame in that of the grid. All pairs of
    patches of a segment are compared.

    Args:
        frames: frames of a clip.
        segments: segments of a clip, a divisor of it.
        tokens: patches that stay of a segment.
        how: "medoids"; "mean": the means of their clusters; "pooling": the mean of the frames, place by place.
        num_prefix: class and register tokens in front, which are averaged over the frames of a segment.
        iterations: rounds of k-medoids.
        sigma: width of the kernel for distances along a graph of the patches (the spectral form); None for distances
            of the tokens.
        graph: patches that each patch of that graph is linked to, itself counted; None for all.

    Raises:
        ValueError: segments that do not divide the frames, or another option that cannot be.

    Source: Zhao, Zhu, Wang, Yang, "CenterCLIP: Token Clustering for Efficient Text-Video Retrieval", SIGIR 2022.
    """

    def __init__(
        self, frames: int, segments: int, tokens: int, how: str = "medoids", num_prefix: int = 1, iterations: int = 10,
        sigma: float | None = None, graph: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if segments < 1 or frames % segments:
            raise ValueError(f"SegmentMedoids: segments={segments} do not divide {frames} frames; choose a divisor")
        if how not in HOW:
            raise ValueError(f"SegmentMedoids: how={how!r}; use one of {', '.join(map(repr, HOW))}")
        if tokens < 1 or num_prefix < 0 or iterations < 0:
            raise ValueError(
                f"SegmentMedoids: tokens={tokens}, num_prefix={num_prefix}, iterations={iterations}; keep one token at "
                "least, and give no negative numbers"
            )
        self.frames, self.segments, self.tokens, self.how = frames, segments, tokens, how
        self.num_prefix, self.iterations, self.sigma, self.graph = num_prefix, iterations, sigma, graph

    def extra_repr(self) -> str:
        return f"frames={self.frames}, segments={self.segments}, tokens={self.tokens}, how={self.how!r}"

    def forward(self, x: Tensor) -> Tensor:
        """Frames of clips in order [B * frames, prefix + M, C] -> segments [B * segments, prefix + tokens, C].

        Raises:
            ValueError: a batch that is no whole number of clips, or segments of fewer patches than stay.
        """
        joined, patches = self.frames // self.segments, x.shape[1] - self.num_prefix
        if x.shape[0] % self.frames:
            raise ValueError(
                f"SegmentMedoids: a batch of {x.shape[0]} is no whole number of clips of {self.frames} frames"
            )
        left = patches if self.how == "pooling" else self.tokens
        if patches * joined < left:
            raise ValueError(
                f"SegmentMedoids: segments of {joined} x {patches} patches cannot leave {left}; lower tokens"
            )
        x = split_dim(x, 0, -1, joined)  # [B * segments, joined, prefix + M, C]
        front, rest = x[:, :, : self.num_prefix].mean(1), x[:, :, self.num_prefix :]
        kept = rest.mean(1) if self.how == "pooling" else self._clustered(rest.flatten(1, 2))
        return torch.cat([front, kept], dim=1)

    def _clustered(self, x: Tensor) -> Tensor:
        """Medoids of patches [B, M, C], or the means of their clusters [B, K, C]."""
        squared = squared_distances(x)
        if self.sigma is not None:
            squared = squared_distances(spectral_rows(squared, self.tokens, self.sigma, self.graph))
        distances = squared.sqrt()
        # rows of a graph are all of unit length: there, too, the longest token is the first
        first = farthest_first(x.detach().float().norm(dim=2), distances, self.tokens)
        medoids = refine(distances, first, self.iterations).sort(dim=1).values
        if self.how == "medoids":
            return take_rows(x, medoids)
        member = clusters(distances, medoids).unsqueeze(1) == torch.arange(self.tokens, device=x.device).view(1, -1, 1)
        share = member.to(x.dtype) / member.sum(2, keepdim=True)
        return share @ x
