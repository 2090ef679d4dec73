"""TokenPacker: a projector whose few rows each look at their own window of the grid."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import interpolate


class TokenPacker(nn.Module):
    """Projects a grid of patches to s x s times fewer rows of a language model, each attending to its own window.

    Queries are the patches, resized bilinearly to the small grid; keys and values are the same patches of several
    layers of the tower. Rows are in raster order, the class token is not among them. It has to be trained with the
    language model; parameters have the names of the authors' checkpoints.

    Args:
        dim: channels of the tower, and of the attention.
        out_dim: channels of the language model.
        layers: layers of the tower whose patches are joined for keys and values; 12, 16, 22 and 23 of CLIP ViT-L as
            published.
        scale: side s of a window, in patches.
        heads: attention heads; one per 128 channels by default.

    Raises:
        ValueError: heads that do not divide the channels, or a window without rows.

    Source: Li et al., "TokenPacker: Efficient Visual Projector for Multimodal LLM", IJCV 2025.
    """

    def __init__(
        self, dim: int = 1024, out_dim: int = 4096, layers: int = 4, scale: int = 2, heads: int | None = None
    ) -> None:
        super().__init__()
        heads = max(1, dim // 128) if heads is None else heads
        if scale < 1 or layers < 1 or heads < 1 or dim % heads:
            raise ValueError(
                f"TokenPacker: dim={dim}, layers={layers}, scale={scale}, heads={heads}; give positive numbers, heads "
                "that divide dim"
            )
        self.scale = scale
        self.q_proj_1 = nn.Linear(dim, dim, bias=False)
        self.k_proj_1 = _mlp(layers * dim, dim)
        self.v_proj_1 = _mlp(layers * dim, dim)
        self.ln_q_1 = nn.LayerNorm(dim, eps=1e-6)
        self.ln_k_1 = nn.LayerNorm(dim, eps=1e-6)
        self.ln_v_1 = nn.LayerNorm(dim, eps=1e-6)
        self.clip_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = _mlp(dim, out_dim)
        self.apply(_init)

    def forward(self, x: Tensor, layers: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Projects patches.

        Args:
            x: patches that are handed on [B, H * W, dim].
            layers: patches of several layers, joined along channels [B, H * W, layers * dim].
            grid: (H, W); a square by default.

        Returns:
            [B, H * W / s^2, out_dim].

        Raises:
            ValueError: a grid that does not fit the patches, or that windows do not divide.
        """
        batch, n, dim = x.shape
        s, (high, wide) = self.scale, _grid(n, grid)
        if high % s or wide % s:
            raise ValueError(f"TokenPacker: a grid of {high} x {wide} patches holds no whole windows of {s} x {s}")
        q = x.transpose(1, 2).reshape(batch, dim, high, wide).float()
        q = interpolate(q, size=(high // s, wide // s), mode="bilinear", align_corners=False).to(x.dtype)
        q = self.ln_q_1(self.q_proj_1(q.flatten(2).transpose(1, 2)))
        k = self.ln_k_1(self.k_proj_1(layers))
        v = self.ln_v_1(self.v_proj_1(layers))
        rows = q.shape[1]
        windows = [_windows(t, high, wide, s) for t in (k, v)]  # [B * rows, s * s, dim]
        found = self.clip_attn(q.reshape(batch * rows, 1, dim), *windows, need_weights=False)[0]
        return self.mlp(found.reshape(batch, rows, dim))


def _mlp(dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, out_dim), nn.GELU(), nn.Linear(out_dim, out_dim))


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _grid(n: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    high, wide = (round(n**0.5),) * 2 if grid is None else grid
    if high * wide != n:
        raise ValueError(f"TokenPacker: {n} patches are no grid of {high} x {wide}; give grid=(high, wide)")
    return high, wide


def _windows(x: Tensor, high: int, wide: int, s: int) -> Tensor:
    """Rows of each window in raster order: [B, H * W, D] -> [B * H/s * W/s, s * s, D]."""
    x = x.reshape(x.shape[0], high // s, s, wide // s, s, x.shape[2]).transpose(2, 3)
    return x.reshape(-1, s * s, x.shape[-1])
