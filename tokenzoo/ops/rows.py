"""Row operations along the token axis, written for speed: one flat index instead of an expanded one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def flat_rows(idx: Tensor, length: int) -> Tensor:
    """Turns per-image row numbers [B, M] into row numbers of the flattened [B * length] axis."""
    if idx.shape[0] == 1 and not torch.jit.is_tracing():  # a traced graph would hold on to one image
        return idx.reshape(-1)
    offset = torch.arange(idx.shape[0], device=idx.device).mul(length).unsqueeze(1)
    return (idx + offset).reshape(-1)


def known_rows(numbers: Callable[[], tuple[int, ...]], device: torch.device) -> Tensor | None:
    """Row numbers [M] that are known as plain integers, in one step; None where operations have to make them.

    One image on a CPU pays for the number of operations. A traced graph folds them itself, and on other devices copying
    would wait.

    Args:
        numbers: gives the integers, asked only where they are used.
        device: where to make the tensor.
    """
    if device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    return torch.tensor(numbers(), dtype=torch.int64, device=device)


def split_dim(x: Tensor, dim: int, *sizes: int) -> Tensor:
    """Splits one dimension into several: x [..., N, ...] -> [..., *sizes, ...], where one of the sizes may be -1.

    Like `unflatten`, but every size of the result is named, so that batches of no images pass, and the TorchScript
    exporter to ONNX keeps the others open.
    """
    shape, dim = x.shape, dim % x.dim()
    if -1 in sizes:
        known, at = 1, sizes.index(-1)
        for size in sizes[:at] + sizes[at + 1 :]:
            known = known * size
        sizes = (*sizes[:at], shape[dim] // known, *sizes[at + 1 :])
    return x.reshape(*shape[:dim], *sizes, *shape[dim + 1 :])


def take_rows(x: Tensor, idx: Tensor, flat: Tensor | None = None) -> Tensor:
    """Gathers rows per image: x [B, N, ...], idx [B, M] -> [B, M, ...].

    An expanded `gather` reads an index per element; selecting rows of the flattened tensor copies whole rows and is
    an order of magnitude faster on CPU. One number per row is gathered as it is: there the index of the elements is
    that of the rows, and OpenVINO takes flattening [B, N, 1] for squeezing it.

    Args:
        x: where to gather from.
        idx: the rows.
        flat: what `flat_rows` makes of them, where several tensors are read at the same rows.
    """
    batch, length = x.shape[:2]
    if x.dim() == 3 and x.shape[2] == 1:
        return x.gather(1, idx.unsqueeze(2))
    flat = flat_rows(idx, length) if flat is None else flat
    rows = x.reshape(batch * length, *x.shape[2:]).index_select(0, flat)
    return rows.reshape(batch, idx.shape[1], *x.shape[2:])


def add_rows(x: Tensor, slot: Tensor, delta: Tensor, flat: Tensor | None = None, own: bool = False) -> Tensor:
    """Adds rows at given slots, several rows may share one: x [B, M, C], slot [B, S], delta [B, S, C] -> [B, M, C].

    Small problems, and everything that is traced for export, use a one-hot product: it is deterministic on every
    device and needs no scatter, which some runtimes handle badly. Large ones use an index-add of whole rows.

    Args:
        x: what to add to.
        slot: the rows.
        delta: what to add.
        flat: what `flat_rows` makes of the slots, where several tensors are added to at the same rows.
        own: x was made for this alone and may be written to.
    """
    batch, length, channels = x.shape
    count = slot.shape[1]
    if count == 0:
        return x
    exporting = torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export()
    if exporting or (x.is_cuda and length * count <= 1 << 16):
        at = torch.arange(length, device=x.device).view(1, length, 1)
        return torch.baddbmm(x, (slot.unsqueeze(1) == at).to(x.dtype), delta.to(x.dtype))
    flat = flat_rows(slot, length) if flat is None else flat
    rows, delta = x.reshape(batch * length, channels), delta.to(x.dtype).reshape(batch * count, channels)
    rows = rows.index_add_(0, flat, delta) if own else rows.index_add(0, flat, delta)
    return rows.reshape(batch, length, channels)


def max_rows(x: Tensor, slot: Tensor, other: Tensor) -> Tensor:
    """Elementwise maximum of x with rows at given slots: x [B, M, C], slot [B, S], other [B, S, C] -> [B, M, C]."""
    index = slot.unsqueeze(-1).expand(-1, -1, x.shape[-1])
    return x.scatter_reduce(1, index, other.to(x.dtype), reduce="amax", include_self=True)


def stable_order(keys: Tensor) -> Tensor:
    """Ascending order of small integers or flags [B, N], equal ones as they stand: [B, N] indices.

    Unique keys give what a stable sort would, which ONNX has no operator for.
    """
    length = keys.shape[1]
    return (keys.long() * length + torch.arange(length, device=keys.device)).argsort(dim=1)


def scatter_values(length: int, idx: Tensor, values: Tensor, fill: int) -> Tensor:
    """Writes integers to positions: idx [B, M], values [B, M] -> [B, length], `fill` elsewhere."""
    out = torch.full((idx.shape[0], length), fill, dtype=values.dtype, device=idx.device)
    return out.scatter(1, idx, values)


def softmax_over(logits: Tensor, counts: Tensor | None) -> Tensor:
    """Softmax over the tokens that count, in float32 at least; over all of them where none does.

    Args:
        logits: [B, K, N].
        counts: [B, N] bool, None for all.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if counts is not None:  # finite, so that a row without any is no NaN
        logits = logits.masked_fill(~counts.unsqueeze(1), torch.finfo(logits.dtype).min)
    return logits.softmax(2)
