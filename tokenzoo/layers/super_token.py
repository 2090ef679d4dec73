"""Super token attention in the published parameter layout."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import use_fused_attn
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..ops.attention import Heads, attend
from ..ops.cells.super_tokens import SLOTS, Association, associate, collect, from_cells, spread, to_cells
from .pointwise import PointwiseConv


class MapAttention(nn.Module):
    """Multi-head self-attention among all places of a map; rows of `qkv` are ordered (head, {q, k, v}, channel).

    Args:
        dim: channels C.
        num_heads: heads, a divisor of C.
        qkv_bias: bias of the first projection.

    Raises:
        ValueError: the heads do not divide the channels.
    """

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = True):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"MapAttention: {num_heads} heads do not divide {dim} channels; choose a divisor")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.fused_attn = use_fused_attn()
        self.qkv = PointwiseConv(dim, 3 * dim, bias=qkv_bias)
        self.proj = PointwiseConv(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        qkv = self.qkv(x).permute(0, 2, 3, 1)  # [B, H, W, 3 C]
        q, k, v = qkv.unflatten(3, [self.num_heads, 3, -1]).flatten(1, 2).transpose(1, 2).unbind(3)
        if torch.jit.is_scripting():  # the compiler does not read the shared core
            out = F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2)
        else:
            out = attend(Heads(q, k, v, self.scale, fused=self.fused_attn))
        return self.proj(out.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2))


class Shifts(nn.Module):
    """The constant kernels of the published unfold and fold, named as there, so that weights go both ways.

    Nothing reads them. Weights that lack them load; others than the nine shifts of a neighbourhood are refused.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("weights", torch.eye(SLOTS).reshape(SLOTS, 1, 3, 3))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        name, errors = f"{prefix}weights", args[-1]
        given = state_dict.setdefault(name, self.weights)
        if not given.is_meta and not torch.equal(given.detach().cpu().float(), torch.eye(SLOTS).reshape(given.shape)):
            errors.append(f"{name} are not the nine shifts of a 3 x 3 neighbourhood, so this is another model")
        super()._load_from_state_dict(state_dict, prefix, *args)


@register_notrace_module  # sizes of maps decide
class SuperTokenAttention(nn.Module):
    """Attention among super tokens: tokens are averaged into few, those attend to each other, all read them back.

    Parameters are named as in the released weights.

    Args:
        dim: channels C.
        stoken_size: tokens of a cell (high, wide); (1, 1) is plain attention.
        num_heads: heads of the attention among super tokens.
        n_iter: rounds of assigning and averaging; 0 keeps every token in its own cell.
        qkv_bias: bias of the projection to queries, keys and values.
        refine: attend; False only averages and reads back.
        mask_borders: cells at the edge of the map do not lose weight to neighbours that are not there. The released
            models lose it.

    Raises:
        ValueError: a cell without tokens, or a negative number of rounds.

    Source: Huang, Zhou, Cao, He, Tan, "Vision Transformer with Super Token Sampling", CVPR 2023.
    """

    def __init__(
        self,
        dim: int,
        stoken_size: tuple[int, int] = (8, 8),
        num_heads: int = 8,
        n_iter: int = 1,
        qkv_bias: bool = True,
        refine: bool = True,
        mask_borders: bool = False,
    ):
        super().__init__()
        if min(stoken_size) < 1:
            raise ValueError(f"SuperTokenAttention: stoken_size={stoken_size} is not a cell; give at least (1, 1)")
        if n_iter < 0:
            raise ValueError(f"SuperTokenAttention: n_iter={n_iter} is negative; 0 keeps tokens in their own cell")
        self.stoken_size = (int(stoken_size[0]), int(stoken_size[1]))
        self.n_iter = n_iter
        self.mask_borders = mask_borders
        self.stoken_refine = MapAttention(dim, num_heads, qkv_bias) if refine else nn.Identity()
        self.unfold = Shifts()
        self.fold = Shifts()

    @property
    def is_plain(self) -> bool:
        """Whether every token is its own super token."""
        return self.stoken_size[0] == 1 and self.stoken_size[1] == 1

    def associate(self, x: Tensor) -> Association:
        """The association of the tokens of a map [B, C, H, W]; `picture(stoken_size)` gives it as [B, 9, H, W]."""
        self._check(x)
        return associate(to_cells(x.permute(0, 2, 3, 1), self.stoken_size), self.n_iter, self.mask_borders)

    def super_tokens(self, x: Tensor) -> Tensor:
        """The super tokens of a map [B, C, H, W] before their attention: [B, C, down, right]."""
        if self.is_plain:
            return x
        self._check(x)
        cells = to_cells(x.permute(0, 2, 3, 1), self.stoken_size)
        return associate(cells, self.n_iter, self.mask_borders).collect(cells).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W].

        Raises:
            ValueError: the cell is larger than the map.
        """
        if self.is_plain:
            return self.stoken_refine(x)
        if not torch.jit.is_scripting():  # TorchScript cannot compile the message
            self._check(x)
        cells = to_cells(x.permute(0, 2, 3, 1), self.stoken_size)
        weights, mass = associate(cells, self.n_iter, self.mask_borders)
        supers = self.stoken_refine(collect(weights, mass, cells).permute(0, 3, 1, 2))
        out = spread(weights, supers.permute(0, 2, 3, 1))
        return from_cells(out, (x.shape[2], x.shape[3]), self.stoken_size).permute(0, 3, 1, 2)

    def _check(self, x: Tensor) -> None:
        size = tuple(x.shape[2:])
        if self.stoken_size[0] > size[0] or self.stoken_size[1] > size[1]:
            raise ValueError(
                f"SuperTokenAttention: a cell of {self.stoken_size} tokens is larger than the map of {size}; use "
                "larger images or a smaller stoken_size"
            )

    def extra_repr(self) -> str:
        """Cell and rounds."""
        return f"stoken_size={self.stoken_size}, n_iter={self.n_iter}, mask_borders={self.mask_borders}"
