"""DToP: tokens whose class is sure leave a segmentation model early, seen by heads after a few of its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ..adapters.inspect import is_patched
from ..core.graphs import why_counts_are_unknown
from ..core.selection import host_ranges
from ..ops.rows import split_dim, stable_order, take_rows
from .dtop_head import DToPHead
from .segmenter import pad_to_patches


class DToPOutput(NamedTuple):
    """What DToP says about the patches of a batch.

    Attributes:
        scores: of every class and patch [B, K, N], presence of the class times probability of the mask.
        masks: mask logits [B, K, N]; finished patches keep those of the head that finished them.
        stages: scores by the presence of each auxiliary head [B, K, N].
        done: patches that are finished after each auxiliary head [B, N] bool.
    """

    scores: Tensor
    masks: Tensor
    stages: tuple[Tensor, ...]
    done: tuple[Tensor, ...]


class DToP(nn.Module):
    """A plain ViT with trained auxiliary heads that finish patches early; inference only, on class-token-free blocks.

    The number of patches follows the image and is read on the host after every auxiliary head; images of a batch are
    padded to the longest and do not influence each other. `patch_model` does not apply: the model reduces by itself.

    Args:
        backbone: a timm `VisionTransformer`; its prefix tokens are cut off before block 0, its final norm is not used.
        heads: the auxiliary heads in order, then the main head.
        taps: the block after which each head looks; the last one has to be the last block.
        threshold: score from which a patch is sure, or one for every auxiliary head; 1 prunes nothing.
        context: sure patches of every class that stay as context, the surest ones.
        classes: names of the classes.
        mean: of the channels of RGB images in 0..1, subtracted before the model.
        std: of the channels, divided by.

    Raises:
        ValueError: a backbone that is not a plain timm ViT or is patched, or taps that do not fit.

    Source: Tang, Zhang, Liu, Liu, Liu, "Dynamic Token Pruning in Plain Vision Transformers for Semantic
    Segmentation", ICCV 2023.
    """

    def __init__(
        self,
        backbone: nn.Module,
        heads: Sequence[DToPHead],
        taps: Sequence[int],
        threshold: float | Sequence[float] = 0.95,
        context: int = 5,
        classes: list[str] | None = None,
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()
        if type(backbone) is not VisionTransformer or any(type(block) is not Block for block in backbone.blocks):
            name = type(backbone).__name__
            raise ValueError(f"DToP: {name} is not an unpatched timm VisionTransformer of plain blocks")
        taps, depth = list(taps), len(backbone.blocks)
        if len(taps) != len(heads) or sorted(set(taps)) != taps or not taps or taps[0] < 0 or taps[-1] != depth - 1:
            raise ValueError(
                f"DToP: taps={taps} for {len(heads)} heads; give each head a block, ascending up to {depth - 1}"
            )
        given = [threshold] * (len(taps) - 1) if isinstance(threshold, (int, float)) else list(threshold)
        if len(given) != len(taps) - 1:
            raise ValueError(f"DToP: {len(given)} thresholds for {len(taps) - 1} auxiliary heads")
        self.backbone, self.taps, self.thresholds, self.context = backbone, taps, given, context
        self.auxiliary_head = nn.ModuleList(heads[:-1])
        self.decode_head = heads[-1]
        self.num_classes, self.classes, self.mean, self.std = heads[-1].num_classes, classes, tuple(mean), tuple(std)
        self.window: int | None = None
        self.stride: int | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Scores of every class and pixel [B, K, H, W] of normalised images [B, 3, H, W] of any size."""
        padded, _ = pad_to_patches(images, self.backbone.patch_embed.patch_size)
        grid = tuple(self.backbone.patch_embed.dynamic_feat_size(padded.shape[-2:]))
        maps = split_dim(self.predict(padded).scores, 2, *grid)
        maps = F.interpolate(maps, padded.shape[-2:], mode="bilinear", align_corners=False)
        return maps[:, :, : images.shape[-2], : images.shape[-1]]

    def predict(self, images: Tensor) -> DToPOutput:
        """What all heads say about normalised images [B, 3, H, W] in whole patches.

        Raises:
            ValueError: the backbone was patched since, or the images cannot be looked at.
        """
        backbone = self.backbone
        if is_patched(backbone):
            raise ValueError("DToP: the backbone is patched; DToP reduces by itself, call tokenzoo.unpatch_model on it")
        if (why := why_counts_are_unknown(images)) is not None:
            raise ValueError(f"DToP: as many patches leave early as the images ask for, {why}; run it on images")
        x = backbone.norm_pre(backbone._pos_embed(backbone.patch_embed(images)))[:, backbone.num_prefix_tokens :]
        batch, length = x.shape[:2]
        # rows that still run: their place in the image, and False for those that only fill up the batch
        place = torch.arange(length, device=x.device).expand(batch, -1)
        valid = torch.ones(batch, length, dtype=torch.bool, device=x.device)
        masks = x.new_zeros(batch, self.num_classes, length)
        done, stages, finished = torch.zeros_like(valid), [], []
        bias = None
        for index, block in enumerate(backbone.blocks):
            x = block(x, attn_mask=bias)
            if index not in self.taps:
                continue
            stage = self.taps.index(index)
            head = self.decode_head if stage == len(self.auxiliary_head) else self.auxiliary_head[stage]
            presence, logits = head(x, None if bias is None else valid)
            where = place.unsqueeze(1).expand(-1, self.num_classes, -1)
            masks = masks.scatter(2, where, torch.where(valid.unsqueeze(1), logits, masks.gather(2, where)))
            scores = presence.unsqueeze(-1) * masks.sigmoid()
            if head is self.decode_head:
                return DToPOutput(scores, masks, tuple(stages), tuple(finished))
            sure = self._sure(scores.gather(2, where), valid, self.thresholds[stage])
            done = done.scatter(1, place, done.gather(1, place) | sure)
            stages.append(scores)
            finished.append(done)
            counts = (valid & ~sure).sum(1)
            found = host_ranges(counts)  # the one look of the host at the data of this stage
            fewest, most = (x.shape[1],) * 2 if found is None else found[0]
            order = stable_order((sure | ~valid).long())[:, :most]
            x, place = take_rows(x, order), place.gather(1, order)
            valid = torch.arange(most, device=x.device) < counts.unsqueeze(1)
            if fewest < most:
                bias = x.new_zeros(batch, 1, 1, most).masked_fill(~valid[:, None, None], float("-inf"))
            else:
                bias = None
        raise AssertionError("the last tap is the last block")

    def _sure(self, scores: Tensor, valid: Tensor, threshold: float) -> Tensor:
        """Rows that may leave [B, N]: real ones above the threshold, but for the surest ones of each class."""
        best, label = scores.max(1)
        sure = (best > threshold) & valid
        own = torch.arange(scores.shape[1], device=scores.device).view(1, -1, 1) == label.unsqueeze(1)
        ranked = best.unsqueeze(1).masked_fill(~(own & sure.unsqueeze(1)), -1.0)  # [B, K, N]
        top, idx = ranked.topk(min(self.context, ranked.shape[2]), dim=2)
        stays = torch.zeros_like(ranked, dtype=torch.bool).scatter(2, idx, top > 0).any(1)
        return sure & ~stays
