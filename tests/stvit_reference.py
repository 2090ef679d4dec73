"""Slow, obvious semantic tokens for tests: one window and one query at a time, softmax written out, from the equations.

Weights are dictionaries with the names of the published models; maps are [B, H, W, C].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]
WINDOW = 7


def below(weights: Weights, prefix: str) -> Weights:
    return {key[len(prefix) + 1 :]: value for key, value in weights.items() if key.startswith(prefix + ".")}


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    out = x @ w[f"{name}.weight"].T
    return out + w[f"{name}.bias"] if f"{name}.bias" in w else out


def norm(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | float = 0.0) -> Tensor:
    """Rows [n, C] and [m, C]; `bias` is broadcast to [heads, n, m]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k, v))
    probs = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5 + bias).softmax(-1)
    return (probs @ v).transpose(0, 1).flatten(1)


def mlp(w: Weights, x: Tensor) -> Tensor:
    return linear(w, "mlp.fc2", F.gelu(linear(w, "mlp.fc1", x)))


def cross(
    w: Weights, q: Tensor, kv: Tensor, heads: int, eps: float, shortcut: bool = True, bias: Tensor | float = 0.0
) -> Tensor:
    """A semantic block on one image: queries [n, C] read rows [m, C]."""
    k, v = linear(w, "attn.kv", norm(w, "norm1", kv, eps)).chunk(2, -1)
    read = linear(w, "attn.proj", attention(linear(w, "attn.q", norm(w, "norm1", q, eps)), k, v, heads, bias))
    out = w["layer_scale_1"] * read + (q if shortcut else 0)
    return out + w["layer_scale_2"] * mlp(w, norm(w, "norm2", out, eps))


def swin(w: Weights, x: Tensor, heads: int, eps: float, shift: int = 0) -> Tensor:
    """A Swin block on one map [H, W, C], window by window."""
    high, wide, _ = x.shape
    h = F.pad(norm(w, "norm1", x, eps), (0, 0, 0, -wide % WINDOW, 0, -high % WINDOW))
    down, right = h.shape[:2]
    out = torch.zeros_like(h)
    offset = torch.tensor([[(a, b) for b in range(WINDOW)] for a in range(WINDOW)]).flatten(0, 1)
    apart = offset[:, None] - offset[None] + WINDOW - 1
    table = w["attn.relative_position_bias_table"][apart[..., 0] * (2 * WINDOW - 1) + apart[..., 1]].permute(2, 0, 1)

    def regions(place: Tensor, size: int) -> Tensor:  # of a shifted map, what a window may not mix
        return (place >= size - WINDOW).int() + (place >= size - shift).int()

    for top in range(0, down, WINDOW):
        for left in range(0, right, WINDOW):
            place = offset + torch.tensor([top, left])
            rows, columns = (place[:, 0] + shift) % down, (place[:, 1] + shift) % right
            q, k, v = linear(w, "attn.qkv", h[rows, columns]).chunk(3, -1)
            label = regions(place[:, 0], down) * 3 + regions(place[:, 1], right)
            hidden = -100.0 * (label[:, None] != label[None]) if shift else 0.0
            out[rows, columns] = attention(q, k, v, heads, table + hidden)
    x = x + linear(w, "attn.proj", out)[:high, :wide]
    return x + mlp(w, norm(w, "norm2", x, eps))


def pooled(window: Tensor, sample: int) -> Tensor:
    """Largest values of the overlapping bins of a window [h, w, C]: [sample, sample, C]."""
    side = window.shape[0]
    bins = [(i * side // sample, -(-(i + 1) * side // sample)) for i in range(sample)]
    return torch.stack([torch.stack([window[a:b, c:d].amax((0, 1)) for c, d in bins]) for a, b in bins])


# ---- classification: a map of two windows a side


def generate(w: Weights, x: Tensor, heads: int, eps: float, sample: int, shortcut: bool) -> Tensor:
    """[14, 14, C] -> [2 * sample, 2 * sample, C]."""
    out = x.new_zeros(2 * sample, 2 * sample, x.shape[-1])
    for i in (0, 1):
        for j in (0, 1):
            own = x[7 * i : 7 * i + 7, 7 * j : 7 * j + 7]
            q = pooled(own, sample).flatten(0, 1)
            patch = x[4 * i : 4 * i + 10, 4 * j : 4 * j + 10].flatten(0, 1)
            s = cross(w, q, torch.cat([q, patch]), heads, eps, shortcut)
            out[sample * i :, sample * j :][:sample, :sample] = s.unflatten(0, (sample, sample))
    return out


def unit(w: Weights, first: int, x: Tensor, heads: int, eps: float, sample: int, shortcut: bool = False) -> Tensor:
    """Six blocks of the stage from number `first` on, on one map."""
    part = [below(w, f"blocks.{first + i}") for i in range(6)]
    x = swin(part[0], x, heads, eps)
    s = generate(part[1], x, heads, eps, sample, shortcut).flatten(0, 1)
    rows, q = x.flatten(0, 1), s
    if first == 0 and "semantic_token2" in w:
        q = s + w["semantic_token2"][0]
    s = cross(part[2], q, torch.cat([s, rows]), heads, eps).unflatten(0, (2 * sample, -1))
    s = local(part[3], s, heads, eps, sample).flatten(0, 1)
    s = cross(part[4], s, s, heads, eps)
    return cross(part[5], rows, s, heads, eps).unflatten(0, x.shape[:2])


def local(w: Weights, s: Tensor, heads: int, eps: float, sample: int) -> Tensor:
    """Self-attention inside of every window of the semantic grid."""
    out = torch.zeros_like(s)
    for i in range(0, s.shape[0], sample):
        for j in range(0, s.shape[1], sample):
            own = s[i : i + sample, j : j + sample].flatten(0, 1)
            out[i : i + sample, j : j + sample] = cross(w, own, own, heads, eps).unflatten(0, (sample, sample))
    return out


def halve(w: Weights, x: Tensor, eps: float) -> Tensor:
    four = torch.cat([x[0::2, 0::2], x[1::2, 0::2], x[0::2, 1::2], x[1::2, 1::2]], -1)
    return linear(w, "reduction", norm(w, "norm", four, eps))


# ---- dense: any map


def added(size: tuple[int, int], pads: tuple[int, int], mask: str | None) -> Tensor:
    """What the published mask adds to the keys of a padded map [h, w]."""
    found = torch.zeros(size)
    if mask == "released":
        found[-pads[0] :, -pads[1] :] = -1000
    return found


def around(keys: Tensor, bias: Tensor, window: int, k: int, i: int, j: int, mask: bool) -> tuple[Tensor, Tensor]:
    """Keys [k * k, C] around a window and what is added to them; outside of the map stand zeros."""
    low = (k - window) // 2
    rows, more = [], []
    for a in range(window * i - low, window * i - low + k):
        for b in range(window * j - low, window * j - low + k):
            inside = 0 <= a < keys.shape[0] and 0 <= b < keys.shape[1]
            rows.append(keys[a, b] if inside else torch.zeros_like(keys[0, 0]))
            more.append(bias[a, b] if inside else torch.tensor(-1000.0 if mask else 0.0))
    return torch.stack(rows), torch.stack(more)


def dense_steps(
    parts: tuple[Weights, Weights, Weights], x: Tensor, heads: int, eps: float, sample: int, k: tuple[int, int, int],
    mask: str | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Generate, refine, restore on one map [H, W, C]: semantic grids of the first two, and the map."""
    high, wide, _ = x.shape
    pads = -high % WINDOW, -wide % WINDOW
    whole = F.pad(x, (0, 0, 0, pads[1], 0, pads[0]))
    down, right = whole.shape[0] // WINDOW, whole.shape[1] // WINDOW
    bias, masked = added((whole.shape[0], whole.shape[1]), pads, mask).to(x), mask is not None
    first = x.new_zeros(down * sample, right * sample, x.shape[-1])
    second, out = torch.zeros_like(first), torch.zeros_like(whole)
    for i in range(down):
        for j in range(right):
            place = slice(sample * i, sample * i + sample), slice(sample * j, sample * j + sample)
            q = pooled(whole[WINDOW * i :, WINDOW * j :][:WINDOW, :WINDOW], sample).flatten(0, 1)
            for weights, size, target in ((parts[0], k[0], first), (parts[1], k[1], second)):
                keys, more = around(whole, bias, WINDOW, size, i, j, masked)
                q = cross(weights, q, keys, heads, eps, bias=more)
                target[place] = q.unflatten(0, (sample, sample))
    bias = added((first.shape[0], first.shape[1]), pads, mask).to(x)
    for i in range(down):
        for j in range(right):
            place = slice(WINDOW * i, WINDOW * i + WINDOW), slice(WINDOW * j, WINDOW * j + WINDOW)
            keys, more = around(second, bias, sample, k[2], i, j, masked)
            own = cross(parts[2], whole[place].flatten(0, 1), keys, heads, eps, bias=more)
            out[place] = own.unflatten(0, (WINDOW, WINDOW))
    return first, second, out[:high, :wide]
