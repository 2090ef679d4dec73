"""k-medoids over tokens: every cluster is stood for by one of its members."""

from __future__ import annotations

import torch
from torch import Tensor

from .density import nearest_centre

_FAR = float("inf")


def farthest_first(norms: Tensor, distances: Tensor, count: int, seen: Tensor | None = None) -> Tensor:
    """The longest token, then always the one farthest from all chosen so far [B, count] (Katsavounidis et al., 1994).

    Args:
        norms: lengths of the tokens [B, N].
        distances: [B, N, N].
        count: tokens to choose, one after the other.
        seen: tokens that come first [B, N] bool, None for all; the others follow in their order.
    """
    rows = torch.arange(norms.shape[0], device=norms.device)
    first = norms if seen is None else norms.masked_fill(~seen, -1)
    nearest, chosen = torch.full_like(norms, _FAR), [first.argmax(1)]
    for _ in range(count - 1):
        nearest = torch.minimum(nearest, distances[rows, chosen[-1]])
        if seen is not None:
            nearest = nearest.masked_fill(~seen & (nearest >= 0), -1)
        nearest = nearest.scatter(1, chosen[-1].unsqueeze(1), -_FAR)
        chosen.append(nearest.argmax(1))
    return torch.stack(chosen, dim=1)


def refine(
    distances: Tensor,
    medoids: Tensor,
    iterations: int,
    weight: Tensor | None = None,
    real: Tensor | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """Medoids [B, K] after some rounds of assigning tokens to the nearest one and choosing anew in each cluster.

    Args:
        distances: [B, N, N].
        medoids: the first ones [B, K].
        iterations: rounds.
        weight: of every token [B, N]: the new medoid has the least weight times distance to all tokens, as in the code
            of Haurum et al.; None: the least distance to the members of its cluster.
        real: [B, K] bool, False for medoids that are none; None where all are.
        seen: tokens that count [B, N] bool, None for all; others stay medoids where they are, and become none.
    """
    slots = torch.arange(medoids.shape[1], device=medoids.device)
    apart = distances if seen is None else distances.masked_fill(~seen.unsqueeze(1), 0)
    cost = None if weight is None else weight * apart.sum(2)
    for _ in range(iterations):
        member = clusters(distances, medoids, real, seen)
        if weight is None:
            cost = (apart * (member.unsqueeze(1) == member.unsqueeze(2))).sum(2)
        inside = member.unsqueeze(1) == slots.unsqueeze(1)
        medoids = torch.where(inside, cost.unsqueeze(1), _FAR).argmin(2)
    return medoids


def clusters(distances: Tensor, medoids: Tensor, real: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
    """Cluster of every token [B, N], medoids in their own; tokens that do not count are in none, -1."""
    member = nearest_centre(distances, medoids, real)
    if seen is not None:
        member = member.masked_fill(~seen, -1)
    number = torch.arange(medoids.shape[1], device=medoids.device).expand_as(medoids)
    if real is None:
        return member.scatter(1, medoids, number)
    # what is no medoid is written to a column that is cut off again
    member = torch.cat([member, member[:, :1]], dim=1)
    return member.scatter(1, torch.where(real, medoids, member.shape[1] - 1), number)[:, :-1]
