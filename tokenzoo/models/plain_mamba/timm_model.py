"""What timm asks of PlainMamba besides its forward: classifier, parameter groups, sizes, fewer blocks."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models._features import feature_take_indices
from torch import nn

from .checkpoint import resize_positions

_UNDECAYED = "pos_embed", "A_log", "D", "direction_Bs"


class TimmInterface(nn.Module):
    """Base of `PlainMamba`, which has the modules that are named here."""

    def _set_classifier(self, num_classes: int, global_pool: str) -> None:
        if global_pool not in ("avg", ""):
            raise ValueError(f"PlainMamba: global_pool={global_pool!r}; choose 'avg' or '', there is no class token")
        self.num_classes, self.global_pool = num_classes, global_pool
        self.head: nn.Module = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.num_features, num_classes)
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, besides norms and biases."""
        return {name for name, _ in self.named_parameters() if name.split(".")[-1] in _UNDECAYED}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter groups for layer-wise learning rates."""
        return {
            "stem": r"^pos_embed|^patch_embed",
            "blocks": [(r"^layers\.(\d+)", None), (r"^ln1|^norm_layer", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass; in training, a BatchNorm in a block then sees batches twice."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier.

        Args:
            num_classes: classes; 0 has none.
            global_pool: new pooling, None keeps the present one.

        Raises:
            ValueError: an unknown pooling.
        """
        like = self.pos_embed
        self._set_classifier(num_classes, self.global_pool if global_pool is None else global_pool)
        self.head.to(device=like.device, dtype=like.dtype).train(self.training)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Stores positions for images of another size.

        Args:
            img_size: new size in pixels.
        """
        source = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size)
        resized = resize_positions(self.pos_embed.detach(), source, self.patch_embed.grid_size)
        self.pos_embed = nn.Parameter(resized, requires_grad=self.pos_embed.requires_grad)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the blocks behind the last chosen one, and what follows them.

        Args:
            indices: blocks that stay readable.
            prune_norm: drop the last norm, unless a map leaves under it.
            prune_head: drop pooling and classifier.

        Returns:
            The chosen blocks.
        """
        wanted, last = feature_take_indices(len(self.layers), indices)
        self.layers = self.layers[: last + 1]
        read = bool(self.tap_norms) and last == len(self.feature_info) - 1
        if prune_norm and not read:
            self.ln1 = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return wanted
