"""Patches become the centres of soft clusters on a grid."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.cells.axis import home_cells
from ..ops.cells.kmeans import Clusters, cluster, hard_labels
from ..ops.cells.reconstruct import copy_back, reconstruct
from .base import TokenMap


class ClusterMap(TokenMap):
    """Prefix tokens stay, patches become the centres of soft clusters on a grid.

    The way back gives every patch a mix of the centres near it, by the distances at clustering time (see
    `tokenzoo.ops.cells.reconstruct`).

    Args:
        x: the tokens before [B, P + N, C], prefix first; the way back measures distances from them.
        clusters: what clustering the patches of `x` found.
        size: patches (high, wide).
        grid: centres (down, right).
        num_prefix: P.
        k: centres that a patch mixes on the way back, all where there are no more; -1 for all.
        temperature: inverse temperature of the way back; one number, or one per image [B, 1, 1].
        norm: weights of a patch have this norm 1: "l2" (as released) or "l1" (a mean); "copy" reads the one centre
            nearest to it instead of a mix.
        tokens_seen: patches that no mask hides [B, N] bool, as they were given to `cluster`; None without a mask.
    """

    opens_span = True

    def __init__(
        self,
        x: Tensor,
        clusters: Clusters,
        size: tuple[int, int],
        grid: tuple[int, int],
        num_prefix: int = 0,
        k: int = 20,
        temperature: float | Tensor = 0.02,
        norm: str = "l1",
        tokens_seen: Tensor | None = None,
    ) -> None:
        self.tokens_seen = tokens_seen
        self.x, self.clusters, self.size, self.grid, self.num_prefix = x, clusters, size, grid, num_prefix
        self.n_in, self.n_out, self.grid_out = x.shape[1], num_prefix + grid[0] * grid[1], grid
        self.k, self.temperature, self.norm = k, temperature, norm

    @classmethod
    def of(
        cls,
        x: Tensor,
        num_prefix: int,
        size: tuple[int, int],
        grid: tuple[int, int],
        iterations: int = 5,
        window: int = 5,
        temperature: float = 0.02,
        k: int = 20,
        norm: str = "l1",
    ) -> ClusterMap:
        """Clusters the patches of x; see `tokenzoo.ops.cells.kmeans.cluster` for the options."""
        clusters = cluster(x[:, num_prefix:], size, grid, iterations, window, temperature)
        return cls(x, clusters, size, grid, num_prefix, k, temperature, norm)

    def with_lift(
        self,
        k: int | None = None,
        temperature: float | None = None,
        norm: str | None = None,
    ) -> ClusterMap:
        """The same map with another way back; None leaves an option as it is."""
        return ClusterMap(
            self.x,
            self.clusters,
            self.size,
            self.grid,
            self.num_prefix,
            self.k if k is None else k,
            self.temperature if temperature is None else temperature,
            self.norm if norm is None else norm,
            self.tokens_seen,
        )

    def masked(self, visible: Tensor) -> ClusterMap:
        # whoever clusters knows the mask already: hidden tokens must not even move a centre
        return super().masked(visible) if self.tokens_seen is None else self

    @property
    def centers(self) -> Tensor:
        """The centres [B, M, C]."""
        return self.clusters.centers

    @property
    def heads(self) -> Tensor:
        """The middle patch of every home cell, or a visible one of the cell where that is hidden."""
        axes = []
        for length, cells in zip(self.size, self.grid):
            homes = home_cells(length, cells)
            ends = [homes.index(cell) for cell in range(cells)] + [length]
            axes.append(torch.tensor([(a + b - 1) // 2 for a, b in zip(ends, ends[1:])], device=self.x.device))
        patches = (axes[0].unsqueeze(1) * self.size[1] + axes[1]).reshape(-1) + self.num_prefix
        prefix = torch.arange(self.num_prefix, device=self.x.device)
        heads = torch.cat([prefix, patches]).expand(self.x.shape[0], -1)
        if self.tokens_seen is None:
            return heads
        front, middle = heads[:, : self.num_prefix], heads[:, self.num_prefix :] - self.num_prefix
        return torch.cat([front, self._visible_middle(middle, self.tokens_seen) + self.num_prefix], dim=1)

    def _visible_middle(self, middle: Tensor, seen: Tensor) -> Tensor:
        """A visible patch of every cell of average pooling that has one [B, M], the middle if it is visible."""
        members, inside = [], []
        for length, cells in zip(self.size, self.grid):
            cell = torch.arange(cells, device=seen.device).unsqueeze(1)
            first, last = cell * length // cells, ((cell + 1) * length + cells - 1) // cells
            token = first + torch.arange(length // cells + 2, device=seen.device)
            members.append(token.clamp(max=length - 1))
            inside.append(token < last)
        index = (members[0][:, None, :, None] * self.size[1] + members[1][None, :, None, :]).flatten(2).flatten(0, 1)
        inside = (inside[0][:, None, :, None] & inside[1][None, :, None, :]).flatten(2).flatten(0, 1)
        there = seen[:, index.flatten()].unflatten(1, index.shape) & inside
        first = there.long().argmax(2)
        other = index.expand(seen.shape[0], -1, -1).gather(2, first.unsqueeze(2)).squeeze(2)
        return torch.where(seen.gather(1, middle) | ~there.any(2), middle, other)

    @property
    def assign(self) -> Tensor:
        """The nearest of all centres."""
        labels = hard_labels(self.x[:, self.num_prefix :], self.centers, self.clusters.visible) + self.num_prefix
        prefix = torch.arange(self.num_prefix, device=self.x.device).expand(self.x.shape[0], -1)
        return torch.cat([prefix, labels], dim=1)

    def apply(self, x: Tensor) -> Tensor:
        known = x is self.x  # the centres are there already
        return self._with_prefix(x, self.centers if known else self.clusters.cells.means(x[:, self.num_prefix :]))

    def pool(self, mass: Tensor) -> Tensor:
        return self._with_prefix(mass, self.clusters.cells.sums(mass[:, self.num_prefix :]))

    def lift(self, y: Tensor, dropped: Tensor | None = None) -> Tensor:
        patches, values = self.x[:, self.num_prefix :], y[:, self.num_prefix :]
        if self.norm == "copy":
            back = copy_back(values, patches, self.centers, self.clusters.visible)
        else:
            visible = self.clusters.visible
            back = reconstruct(values, patches, self.centers, self.temperature, self.k, self.norm, visible)
        return self._with_prefix(y, back)

    def membership(self) -> Tensor:
        """Share of every old token that each new one holds [B, N', N]; the columns sum to one."""
        return self._dense(self.clusters.cells.dense_sums())

    def matrix(self) -> Tensor:
        return self._dense(self.clusters.cells.dense_means())

    def _with_prefix(self, x: Tensor, patches: Tensor) -> Tensor:
        patches = patches.to(x.dtype)
        return torch.cat([x[:, : self.num_prefix], patches], dim=1) if self.num_prefix else patches

    def _dense(self, weights: Tensor) -> Tensor:
        out = weights.new_zeros(weights.shape[0], self.n_out, self.n_in)
        out[:, self.num_prefix :, self.num_prefix :] = weights
        index = torch.arange(self.num_prefix, device=weights.device)
        out[:, index, index] = 1
        return out
