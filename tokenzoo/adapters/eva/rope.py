"""Rotary tables of reduced tokens: rows gathered by original position, or rebuilt from mean coordinates.

timm's tables hold [sin | cos], one row per patch. Here a table starts with rows that rotate nothing: row 0 for a token
without a place (a fused rest), then one for each prefix token, so that row `position + 1` belongs to `position` and
prefix tokens need no separate path.

The angles of every rotary embedding in timm's eva.py are linear in the patch coordinates, which is what lets a table
be rebuilt for merged tokens: a mean of sines and cosines is not a rotation, a mean of coordinates is a coordinate.
"""

from __future__ import annotations

import inspect
import math
from typing import NamedTuple

import torch
from timm.layers import RotaryEmbeddingCat, RotaryEmbeddingMixed, apply_rot_embed_cat, freq_bands
from torch import Tensor, nn

from ...core.tokens import Tokens
from ...ops.rows import split_dim

try:  # timm >= 1.0.20
    from timm.layers import RotaryEmbeddingDinoV3
except ImportError:
    RotaryEmbeddingDinoV3 = None
try:  # newer still than the class above
    from timm.layers import RotaryEmbeddingMRope
except ImportError:
    RotaryEmbeddingMRope = None

# timm < 1.0.20 knows interleaved pairs only
_KNOWS_HALF = "half" in inspect.signature(apply_rot_embed_cat).parameters


class Waves(NamedTuple):
    """Angles as a function of the patch coordinate: (row, column) * scale + shift, times one frequency per axis.

    Attributes:
        freqs: along rows and along columns [2, D / 2], [2, H, D / 2] for one block of a mixed embedding, or
            [2, depth, H, D / 2] for all of them.
        scale: of (row, column), in patch units.
        shift: of (row, column), added after the scale.
        half: rotation pairs channel i with i + D / 2, instead of 2i with 2i + 1.
    """

    freqs: Tensor
    scale: tuple[float, float]
    shift: tuple[float, float]
    half: bool


class Rope(NamedTuple):
    """The rotary table of a forward pass or of one block.

    Attributes:
        table: [1 + num_prefix + patches, 2D] shared by all heads, or [H, 1 + num_prefix + patches, 2D]; of images with
            grids of their own [B, 1 or H, 1 + num_prefix + patches, 2D].
        waves: how to rebuild rows from coordinates; None keeps the row of each token's position.
    """

    table: Tensor
    waves: Waves | None = None

    @classmethod
    def of(cls, table: Tensor, num_prefix: int, waves: Waves | None = None) -> Rope:
        """A table of patches [..., N, 2D] with the rows that rotate nothing in front."""
        still = torch.zeros_like(table[..., :1, :]).unflatten(-1, (2, -1))
        still = torch.cat([still[..., :1, :], torch.ones_like(still[..., 1:, :])], dim=-2).flatten(-2)
        return cls(torch.cat([still.expand(*table.shape[:-2], 1 + num_prefix, -1), table], dim=-2), waves)

    def rows(self, tokens: Tokens) -> Tensor:
        """Rotations of the tokens as they are now: [N, 2D], [H, N, 2D] or, after a reduction, [B, 1 or H, N', 2D]."""
        if tokens.positions is None:
            return self.table[..., 1:, :]
        if self.waves is not None and tokens.coords is not None:
            return rotations(self.waves, tokens.coords, tokens.layout.num_prefix).to(self.table.dtype)
        if self.table.dim() == 4:
            at = (tokens.positions + 1)[:, None, :, None].expand(-1, self.table.shape[1], -1, self.table.shape[3])
            return self.table.gather(2, at)
        rows = split_dim(self.table.index_select(-2, tokens.positions.reshape(-1) + 1), -2, *tokens.positions.shape)
        return rows.unsqueeze(1) if rows.dim() == 3 else rows.transpose(0, 1)


def rotate(x: Tensor, rows: Tensor, half: bool) -> Tensor:
    """Rotates queries or keys x [B, H, N, D] by rows [..., N, 2D]; the result may be wider than x's type."""
    if not half:
        return apply_rot_embed_cat(x, rows)
    if _KNOWS_HALF:
        return apply_rot_embed_cat(x, rows, half=True)
    sin, cos = rows.chunk(2, dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def rotations(waves: Waves, coords: Tensor, num_prefix: int) -> Tensor:
    """Rotations of tokens from their coordinates.

    Args:
        waves: of one block, freqs [2, D / 2] or [2, H, D / 2].
        coords: (row, column) in patch units [B, N, 2] float32; those of prefix tokens are ignored.
        num_prefix: tokens at the front that are not rotated.

    Returns:
        [B, 1 or H, N, 2D] float32.
    """
    freqs = waves.freqs if waves.freqs.dim() == 3 else waves.freqs.unsqueeze(1)
    angle = 0.0
    for axis in range(2):
        place = coords[:, None, num_prefix:, axis, None] * waves.scale[axis] + waves.shift[axis]  # [B, 1, N, 1]
        angle = angle + place * freqs[axis, :, None].float()  # products one by one: autocast leaves them alone
    angle = nn.functional.pad(angle, (0, 0, num_prefix, 0))
    parts = [angle.sin(), angle.cos()]
    if waves.half:
        return torch.cat([parts[0], parts[0], parts[1], parts[1]], dim=-1)
    return torch.cat([part.repeat_interleave(2, -1) for part in parts], dim=-1)


def waves_of(rope: nn.Module, grid: tuple[int, int]) -> Waves:
    """The construction of a timm rotary embedding at a patch grid.

    Args:
        rope: the model's `rope`.
        grid: patches (high, wide).

    Raises:
        ValueError: an embedding that cannot be rebuilt from coordinates, or random coordinates in training.
    """
    name = type(rope).__name__
    if getattr(rope, "aug_active", False):  # timm < 1.0.20 has no augmentation
        given = {k: v for k in _AUGMENTATIONS if (v := getattr(rope, k)) is not None}
        raise ValueError(
            f"merged_positions='mean' rebuilds rotary tables, but {name} draws coordinates at random in training "
            f"({given}), once a forward pass; use merged_positions='destination' or create the model without them"
        )
    build = _BUILDERS.get(type(rope))
    if build is None:
        raise ValueError(
            f"merged_positions='mean' cannot rebuild the tables of {name}; it knows exactly "
            f"{', '.join(cls.__name__ for cls in _BUILDERS)}; use merged_positions='destination'"
        )
    return build(rope, grid)


_AUGMENTATIONS = ("shift_coords", "jitter_coords", "rescale_coords")


def _by_axis(bands: Tensor, indexing: str) -> Tensor:
    """Half of the channels per axis: [D / 4] -> [2, D / 2], rows first for "ij", columns first for "xy"."""
    still = torch.zeros_like(bands)
    first, second = torch.cat([bands, still]), torch.cat([still, bands])
    return torch.stack([first, second] if indexing == "ij" else [second, first])


def _cat(rope: nn.Module, grid: tuple[int, int]) -> Waves:
    kind = getattr(rope, "grid_type", "pixel" if rope.in_pixels else "index")  # an attribute of newer versions
    if kind != "index":
        raise ValueError(
            f"merged_positions='mean' rebuilds {type(rope).__name__} on patch indices, but this one lays a {kind!r} "
            "grid; use merged_positions='destination'"
        )
    bands = rope.bands  # older versions keep either the bands or a finished table
    if bands is None:
        bands = freq_bands(rope.dim // 4, float(rope.temperature), step=1, device=rope.pos_embed.device)
    scale = (1.0, 1.0)
    if rope.ref_feat_shape is not None:
        scale = tuple(ref / size for ref, size in zip(rope.ref_feat_shape, grid))
    shift = tuple(rope.grid_offset * s for s in scale)
    return Waves(_by_axis(bands, rope.grid_indexing), scale, shift, getattr(rope, "rotate_half", False))


def _mixed(rope: nn.Module, grid: tuple[int, int]) -> Waves:
    freqs = rope.freqs if rope.grid_indexing == "ij" else rope.freqs.flip(0)
    return Waves(freqs, (1.0, 1.0), (0.0, 0.0), False)


def _dinov3(rope: nn.Module, grid: tuple[int, int]) -> Waves:
    sizes = {"separate": grid, "max": (max(grid),) * 2, "min": (min(grid),) * 2}[rope.normalize_coords]
    scale = tuple(2.0 / size for size in sizes)
    shift = tuple((1.0 + 2.0 * rope.grid_offset) / size - 1.0 for size in sizes)
    return Waves(_by_axis(2 * math.pi / rope.periods, rope.grid_indexing), scale, shift, rope.rotate_half)


def _mrope(rope: nn.Module, grid: tuple[int, int]) -> Waves:
    # axis 0 is time, which stands still in an image
    freqs = torch.stack([rope.inv_freq * (rope.axis == axis) for axis in (1, 2)])
    return Waves(freqs, (1.0, 1.0), (0.0, 0.0), True)


_BUILDERS = {RotaryEmbeddingCat: _cat, RotaryEmbeddingMixed: _mixed}
if RotaryEmbeddingDinoV3 is not None:
    _BUILDERS[RotaryEmbeddingDinoV3] = _dinov3
if RotaryEmbeddingMRope is not None:
    _BUILDERS[RotaryEmbeddingMRope] = _mrope


def check_rebuild(rope: nn.Module, grid: tuple[int, int]) -> None:
    """Refuses to rebuild tables where the result would differ from timm's own at whole coordinates.

    Versions of timm lay grids differently in corners; this asks the installed one.

    Raises:
        ValueError: see `waves_of`, or the tables differ.
    """
    waves = waves_of(rope, grid)
    with torch.no_grad():
        own = rope.get_embed(grid)
        index = torch.arange(grid[0] * grid[1], device=own.device)
        coords = torch.stack([index.div(grid[1], rounding_mode="floor"), index % grid[1]], dim=1).float()[None]
        if waves.freqs.dim() == 4:  # the same construction in every block
            own, waves = own[0], waves._replace(freqs=waves.freqs[:, 0])
        rebuilt = rotations(waves, coords, num_prefix=0)[0]
        tolerance = 1e-4 if own.dtype == torch.float32 else 2e-2
        if not torch.allclose(rebuilt, own.float().expand_as(rebuilt), rtol=0, atol=tolerance):
            raise ValueError(
                f"merged_positions='mean': the installed timm builds {type(rope).__name__} with "
                f"grid_indexing={rope.grid_indexing!r} in a way that tokenzoo does not know; use "
                "merged_positions='destination'"
            )
