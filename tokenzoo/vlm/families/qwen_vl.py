"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: all images packed into one sequence of the tower, rows of 2 x 2 patches.

Their towers keep their length. In Qwen2.5-VL most layers attend inside windows, in whose order tokens stand; scores of
such a layer compare tokens of one window alone, so selectors read the last layer, which sees whole images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3

from ...ops.attention import Heads
from ..family import VLMFamily, register_vlm_family
from ..head import ReducingHead
from ..model import ReducingVlm
from ..standing_in import stand_in
from ..towers import Made, Read, register_reader


class ReadPacked:
    """Queries and keys of a layer whose crops stand in one sequence [N, C]; one `Read` per crop or window."""

    makes = ("attn.qkv",)

    def __call__(
        self, layer: Any, x: Tensor, options: dict[str, Any], made: Made, queries: int | None = None
    ) -> list[Read]:
        attn, qkv = layer.attn, made("attn.qkv", lambda: layer.norm1(x))
        q, k, _ = qkv.reshape(len(x), 3, attn.num_heads, -1).permute(1, 0, 2, 3).unbind(0)
        q, k = qwen2.apply_rotary_pos_emb_vision(q, k, *options["position_embeddings"])
        lengths = options["cu_seqlens"].diff().tolist()
        parts = zip(q.transpose(0, 1).split(lengths, 1), k.transpose(0, 1).split(lengths, 1))
        return [Read(Heads(q[None], k[None], None, attn.scaling)) for q, k in parts]


for _block in (qwen2.Qwen2VLVisionBlock, qwen2_5.Qwen2_5_VLVisionBlock, qwen3.Qwen3VLVisionBlock):
    register_reader(_block, ReadPacked())


class Packed(VLMFamily):
    """What the three have in common; crops of a video are its frames."""

    tower, projector, one_to_one = "visual", "visual.merger", False
    modalities, position_axes = ("image", "video"), 3

    def tower_layers(self, inner: nn.Module) -> Sequence[nn.Module]:
        return inner.visual.blocks

    def has_class(self, inner: nn.Module) -> bool:
        return False

    def image_rows(self, inner: nn.Module) -> int | None:
        return None

    def tower_width(self, inner: nn.Module) -> int:
        return self.tower_layers(inner)[0].attn.qkv.in_features

    def grids(self, modality: str, given: dict[str, Any]) -> Tensor:
        """Frames, and patches down and right, of every image or video [n, 3]."""
        found = given.get("video_grid_thw") if modality == "video" else None
        return given["image_grid_thw"] if found is None else found

    def places(self, inner: nn.Module, modality: str, seen: dict[Any, Any], given: dict[str, Any]) -> list[Tensor]:
        side, found, first = inner.visual.spatial_merge_size, [], 0
        for frames, high, wide in self.grids(modality, given).tolist():
            axes = (torch.arange(first, first + frames), torch.arange(high // side), torch.arange(wide // side))
            found.append(torch.cartesian_prod(*axes).float().view(-1, 3))
            first += frames
        return found

    def carry(self, inner: nn.Module, modality: str, values: Tensor, given: dict[str, Any]) -> list[Tensor]:
        unit, grids = inner.visual.spatial_merge_size**2, self.grids(modality, given)
        rows = values[0].unflatten(0, (-1, unit)).mean(1)
        return list(self.ordered(inner, rows, grids).split((grids.prod(-1) // unit).tolist()))

    def ordered(self, inner: nn.Module, rows: Tensor, grids: Tensor) -> Tensor:
        """Rows in the order in which the language model sees them, from that of the tower."""
        return rows


def _classes(module: Any, name: str) -> tuple[dict[type, type], dict[type, type]]:
    head, model = getattr(module, f"{name}ForConditionalGeneration"), getattr(module, f"{name}Model")
    return {head: stand_in(ReducingHead, head, __name__)}, {model: stand_in(ReducingVlm, model, __name__)}


class Qwen2VL(Packed):
    """Qwen2-VL."""

    name = "qwen2_vl"
    summary = "Qwen2-VL: its own packed tower, images and videos of any size"
    heads, models = _classes(qwen2, "Qwen2VL")


class Qwen25VL(Packed):
    """Qwen2.5-VL: windows."""

    name = "qwen2_5_vl"
    summary = "Qwen2.5-VL: its own packed tower with windows, images and videos of any size"
    heads, models = _classes(qwen2_5, "Qwen2_5_VL")

    def ordered(self, inner: nn.Module, rows: Tensor, grids: Tensor) -> Tensor:
        tower = inner.visual
        index, _ = qwen2_5.get_vision_window_index(
            grids, spatial_merge_size=tower.spatial_merge_size, window_size=tower.window_size,
            patch_size=tower.patch_size,
        )  # fmt: skip
        return rows[torch.argsort(index.to(rows.device))]


class Qwen3VL(Packed):
    """Qwen3-VL: features of several layers of the tower join behind the first layers of the language model."""

    name = "qwen3_vl"
    summary = "Qwen3-VL: its own packed tower, images and videos of any size, deepstack"
    heads, models = _classes(qwen3, "Qwen3VL")

    def deep_layers(self, inner: nn.Module) -> int:
        return len(inner.visual.deepstack_visual_indexes)


FAMILIES = [register_vlm_family(family()) for family in (Qwen2VL, Qwen25VL, Qwen3VL)]
