"""What is added to attention logits: the user's mask, and biases in original positions, after maps.

A token is hidden if no other token may look at it in any head, as padding is. Hidden tokens are still computed, and
pooled where the model pools all tokens, but no visible token may ever learn of them: `Tokens.visible` says so to maps
and methods. Finite biases (of position, say) hide nothing; they follow the token that heads a merged one, a user's as
well as a block's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..core.method import Step
from ..core.tokens import Tokens
from ..ops.attention import key_bias
from ..ops.rows import split_dim

_HIDES = -1e4  # additive entries from here down hide, -inf or not: exp of them is zero beside any usual logit


def four_dims(mask: Tensor, length: int) -> Tensor:
    """A mask [N, N], [B, N, N] or [B, H, N, N] as four dimensions, checked against the sequence."""
    if mask.dim() not in (2, 3, 4) or mask.shape[-1] != length or mask.shape[-2] not in (1, length):
        raise ValueError(
            f"attn_mask has shape {tuple(mask.shape)}; give [N, N], [B, N, N] or [B, H, N, N] with N = {length} tokens"
        )
    if mask.dim() == 3:
        return mask.unsqueeze(1)
    return mask.reshape(1, 1, *mask.shape) if mask.dim() == 2 else mask


def visible_tokens(mask: Tensor, batch: int, num_prefix: int) -> Tensor:
    """Tokens that some other token may look at [B, N] bool; prefix tokens count as visible, they hold no pixels.

    Args:
        mask: [B or 1, H or 1, N or 1, N], boolean (True may be looked at) or additive.
        batch: B.
        num_prefix: prefix tokens in front.
    """
    seen = _open(mask)
    if mask.shape[2] > 1:
        seen = seen & ~torch.eye(mask.shape[3], dtype=torch.bool, device=mask.device)
    prefix = torch.arange(mask.shape[3], device=mask.device) < num_prefix
    return (seen.flatten(1, 2).any(1) | prefix).expand(batch, -1)


def refuse_uneven(mask: Tensor, visible: Tensor, num_prefix: int, steps: Iterable[Step], model: Any) -> None:
    """Refuses masks that treat visible patches differently where some method mixes them.

    A mixed token has one row and one column of the mask, so these have to be equal for all that it stands for. Masks
    with one row for all heads and queries are so by their shape; others are looked at, which the host waits for.
    Compiled and exported graphs hold an assertion instead; `torch.jit.trace` trusts the mask.

    Args:
        mask: [B or 1, H or 1, N or 1, N].
        visible: what `visible_tokens` says.
        num_prefix: prefix tokens in front.
        steps: what will act on the tokens.
        model: the model or block, for the message.
    """
    names = sorted({step.method.name for step in steps if step.method.mixes})
    if not names or mask.shape[1] == mask.shape[2] == 1:
        return
    if torch.jit.is_tracing():
        return
    message = (
        f"{type(model).__name__}: attn_mask shows patches to some queries or heads and hides them from others, which "
        f"{', '.join(names)} cannot follow: a token that stands for several has one row and one column of the mask; "
        "hide a patch from all tokens (padding) or from none, or use a method that only drops tokens"
    )
    uneven = _uneven(mask, visible, num_prefix)
    if torch.compiler.is_compiling():
        torch._assert_async(~uneven, message)
    elif bool(uneven):
        raise ValueError(message)


def gather_mask(mask: Tensor, tokens: Tokens) -> Tensor:
    """The user's mask for the tokens that are left, as an additive float mask [B, 1 or H, N or 1, N]."""
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, float("-inf"))
    if tokens.positions is None:
        return mask
    batch = tokens.x.shape[0]
    index = tokens.positions.clamp(min=0)
    mask = mask.expand(batch, *mask.shape[1:])
    columns = index[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1)
    mask = mask.gather(3, columns)
    if mask.shape[2] > 1:
        mask = mask.gather(2, index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    if tokens.visible is not None:
        # a token without a place reads the entries of the first one, which is visible
        hidden = (tokens.positions < 0) & ~tokens.visible
        mask = mask.masked_fill(hidden[:, None, None, :], float("-inf"))
    return mask


def logit_bias(tokens: Tokens, proportional: bool, mask: Tensor | None, own: Tensor | None) -> Tensor | None:
    """Everything that is added to the logits of an attention layer [B or 1, 1 or H, 1 or N, N]; None for nothing.

    Args:
        tokens: those that attend; padding is hidden, and gates count.
        proportional: add log sizes.
        mask: the user's attention mask in original positions.
        own: the block's own bias in original positions, see `gather_places`.
    """
    bias = key_bias(tokens.size if proportional else None, tokens.valid)
    if own is not None:
        own = gather_places(own, tokens)
        bias = own if bias is None else own + bias
    if mask is not None:
        rows = gather_mask(mask, tokens)
        bias = rows if bias is None else rows + bias
    return bias if tokens.gate is None else tokens.gate.bias(bias, itself=True)


def gather_places(bias: Tensor, tokens: Tokens) -> Tensor:
    """A bias between original places, the same for all images, for the tokens that are left.

    A merged token has the row and the column of the token that heads it. One without a place (a fused rest) has the
    mean over all patches: a constant that is added to every entry then changes nothing, as in the unpatched model.

    Args:
        bias: [1, H, N0, N0], queries first, prefix tokens in front.
        tokens: the tokens.

    Returns:
        [1, H, N0, N0] itself while nothing is reduced, then [B, H, N, N]: images keep different places.
    """
    if tokens.positions is None:
        return bias
    first, length = tokens.layout.num_prefix, bias.shape[-1]
    bias = torch.cat([bias, bias[..., first:, :].mean(2, keepdim=True)], dim=2)
    bias = torch.cat([bias, bias[..., first:].mean(3, keepdim=True)], dim=3)
    at = torch.where(tokens.positions < 0, length, tokens.positions)
    flat = (at.unsqueeze(2) * (length + 1) + at.unsqueeze(1)).reshape(1, -1)
    heads = bias.squeeze(0).flatten(1)
    return split_dim(heads.gather(1, flat.expand(heads.shape[0], -1)), 1, *at.shape, at.shape[1]).transpose(0, 1)


def _open(mask: Tensor) -> Tensor:
    """Entries that hide nothing."""
    return mask if mask.dtype == torch.bool else mask > _HIDES


def _uneven(mask: Tensor, visible: Tensor, num_prefix: int) -> Tensor:
    """Whether two visible patches have different rows or columns [] bool; what they say of themselves is no matter."""
    seen, patches = _open(mask), visible[:, num_prefix:]
    if mask.shape[2] == 1:
        keys = seen[..., num_prefix:]
        return (keys.any(1) != keys.all(1)).any()
    others = ~torch.eye(patches.shape[1], dtype=torch.bool, device=mask.device)
    pairs = patches.unsqueeze(2) & patches.unsqueeze(1) & others
    uneven = (pairs.unsqueeze(1) & ~seen[..., num_prefix:, num_prefix:]).any()
    rows, columns = seen[..., num_prefix:, :num_prefix], seen[..., :num_prefix, num_prefix:].transpose(2, 3)
    for part in (rows, columns):
        counts = patches[:, None, :, None]
        uneven = uneven | ((part & counts).any(2) & (~part & counts).any(2)).any()
    return uneven
