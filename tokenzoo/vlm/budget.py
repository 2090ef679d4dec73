"""How a budget of rows is spread: over the images of a prompt, and over the crops of an image."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def spread(total: int, sizes: Sequence[int]) -> list[int]:
    """Shares of a total in proportion to sizes, whole, none above its size; the largest remainders are rounded up.

    Args:
        total: to be spread; all are full where it is larger than all sizes together.
        sizes: what each can take at most.
    """
    whole = sum(sizes)
    if total >= whole:
        return list(sizes)
    exact = [total * size / whole for size in sizes]
    shares = [int(share) for share in exact]
    order = sorted(range(len(sizes)), key=lambda i: (shares[i] - exact[i], i))
    for i in order[: total - sum(shares)]:
        shares[i] += 1
    return shares


def prompts_of(ids: Tensor, token: int, counts: Sequence[int]) -> list[int]:
    """The prompt that each image belongs to, by the placeholders of each prompt.

    Args:
        ids: [B, N].
        token: id of the placeholder.
        counts: rows of each image, in the order in which they stand.

    Raises:
        ValueError: the placeholders of a prompt are no sum of rows of whole images.
    """
    owners: list[int] = []
    for prompt, left in enumerate((ids == token).sum(1).tolist()):
        while left > 0 and len(owners) < len(counts):
            left -= counts[len(owners)]
            owners.append(prompt)
        if left:
            raise ValueError(f"prompt {prompt} has placeholders for other images than were given: {left} too many")
    return owners
