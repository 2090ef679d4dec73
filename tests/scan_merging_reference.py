"""R-MeeTo, Famba-V and MTR written down again for one image, in plain loops over Python lists, no speed intended."""

import math

import torch


def _unit(v):
    length = math.sqrt(sum(c * c for c in v))
    return [c / length for c in v] if length else v


def likeness(a, b, distance="cosine"):
    a, b = _unit(a), _unit(b)
    if distance == "cosine":
        return sum(p * q for p, q in zip(a, b))
    gaps = [abs(p - q) for p, q in zip(a, b)]
    return -sum(gaps) if distance == "l1" else -math.sqrt(sum(g * g for g in gaps))


def merged(x, sizes, groups, weighted=True):
    """Means of groups of indices, and the sizes of the groups."""
    out, total = [], []
    for group in groups:
        weights = [sizes[i] if weighted else 1.0 for i in group]
        out.append(sum(w * x[i] for w, i in zip(weights, group)) / sum(weights))
        total.append(sum(sizes[i] for i in group))
    return torch.stack(out), total


def even_odd_groups(metric, r, prefix, distance="cosine", first_even=None):
    """Groups of indices: prefix alone, r even tokens with their best odd partner; heads first, in ascending order.

    `first_even` is the index of the token that counts as the first even one.
    """
    n = len(metric)
    start = prefix if first_even is None else first_even
    even = [i for i in range(prefix, n) if (i - start) % 2 == 0]
    odd = [i for i in range(prefix, n) if (i - start) % 2 == 1]
    proposals = []
    for i in even:
        best = max(odd, key=lambda j: likeness(metric[i], metric[j], distance))
        proposals.append((likeness(metric[i], metric[best], distance), i, best))
    chosen = {i: j for _, i, j in sorted(proposals, reverse=True)[:r]}
    return [[h] + [i for i, j in chosen.items() if j == h] for h in range(n) if h not in chosen]


def step_groups(metric, scores, r, targets, prefix):
    """Groups of indices for MTR, and which patches are kept, targets and sources."""
    ranked = sorted(range(prefix, len(metric)), key=lambda i: -scores[i])
    kept, rest = ranked[: len(ranked) - r - targets], ranked[len(ranked) - r - targets :]
    target, source = rest[:targets], rest[targets:]
    into = {i: max(target, key=lambda j: likeness(metric[i], metric[j])) for i in source}
    groups = [[h] + [i for i, j in into.items() if j == h] for h in range(len(metric)) if h not in into]
    return groups, kept, target, source
