"""What timm asks of Vision Mamba besides its forward: classifier, parameter groups, sizes, intermediate features."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from .block import add_residual
from .embed import class_rows, fit_positions, split_rows


class TimmInterface(nn.Module):
    """Base of `VisionMamba`, which has the modules and the forward that are named here."""

    def _set_classifier(self, num_classes: int, global_pool: str | None) -> None:
        if global_pool is None:
            global_pool = "token" if self.num_class_tokens else "avg"
        if global_pool not in ("token", "avg", "") or (global_pool == "token" and not self.num_class_tokens):
            raise ValueError(
                f"VisionMamba: global_pool={global_pool!r} with cls_position={self.cls_position!r}; choose 'avg' or ''"
                + (", or 'token'" if self.num_class_tokens else "")
            )
        self.global_pool = global_pool
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        _init_linear(self.head)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay: positions, class tokens, decays and skips of the scans."""
        scan = ("A_log", "A_b_log", "D", "D_b")
        names = {name for name, _ in self.named_parameters() if name.split(".")[-1] in scan}
        return names | {"pos_embed", *self._class_names()}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter groups for layer-wise learning rates: one group per block."""
        blocks = [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))]
        return {"stem": r"^cls_token|^pos_embed|^patch_embed", "blocks": blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass."""
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
            ValueError: pooling that the model has no token for.
        """
        like = self.patch_embed.proj.weight
        self._set_classifier(num_classes, self.global_pool if global_pool is None else global_pool)
        self.head.to(device=like.device, dtype=like.dtype).train(self.training)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Takes images of another size from now on; positions are interpolated, the class token's row apart.

        Args:
            img_size: new size in pixels.
            patch_size: None, or the present one.

        Raises:
            ValueError: another patch size, or an image of no whole number of patches.
        """
        old = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size, patch_size)
        with torch.no_grad():
            fitted = fit_positions(self.pos_embed, self.cls_position, old, self.patch_embed.grid_size)
        if fitted is not self.pos_embed:
            self.pos_embed = nn.Parameter(fitted, requires_grad=self.pos_embed.requires_grad)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Any] | tuple[Tensor, list[Any]]:
        """The stream behind chosen blocks, at the patches.

        Args:
            x: images [B, 3, H, W].
            indices: blocks; a number takes the last ones, None all.
            return_prefix_tokens: hand out pairs with the class tokens [B, P, C].
            norm: apply the final norm.
            stop_early: do not run blocks behind the last chosen one.
            output_fmt: "NCHW" for maps, "NLC" for tokens without the class tokens.
            intermediates_only: return the intermediates alone.

        Returns:
            The intermediates, or (features of `forward_features`, intermediates).

        Raises:
            ValueError: another format.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"VisionMamba: output_fmt={output_fmt!r}; choose 'NCHW' or 'NLC'")
        wanted, last = feature_take_indices(len(self.layers), indices)
        grid = self.patch_embed.dynamic_feat_size(x.shape[-2:])
        rows = class_rows(self.cls_position, grid[0] * grid[1])
        found = []
        h, res = self.embed_tokens(x), None
        for index, block in enumerate(self.layers[: last + 1] if stop_early else self.layers):
            h, res = self.run_block(block, h, res)
            if index in wanted:
                stream = add_residual(h, res)
                patches, classes = split_rows(self._narrow(self.norm_f(stream) if norm else stream), rows)
                if output_fmt == "NCHW":
                    patches = patches.transpose(1, 2).unflatten(2, grid).contiguous()
                found.append((patches, classes) if return_prefix_tokens else patches)
        return found if intermediates_only else (self.final_norm(h, res), found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the blocks behind the last chosen one, and what follows them.

        Args:
            indices: blocks that stay readable.
            prune_norm: drop the final norm.
            prune_head: drop the classifier.

        Returns:
            The chosen blocks.
        """
        wanted, last = feature_take_indices(len(self.layers), indices)
        self.layers = self.layers[: last + 1]
        if prune_norm:
            self.norm_f = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return wanted


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
