"""DINOv2's released linear segmentation heads on timm's backbones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from .checkpoints import load_state, read_checkpoint
from .heads import BNLinearHead
from .multi import LayersSegmenter
from .segmenter import Segmenter

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_dinov2_linear(
    backbone: nn.Module, checkpoint: str | Path, layers: int | Sequence[int] = 1
) -> Segmenter | LayersSegmenter:
    """A timm DINOv2 backbone with a released linear segmentation head.

    Images are padded with zeros all around to whole patches, as published; the padding is cut off the scores again
    (mmsegmentation squeezes the scores of the padded image into the size of the image instead).

    Args:
        backbone: `vit_*_patch14_dinov2` or `vit_*_patch14_reg4_dinov2`, with dynamic_img_size=True for other sizes.
        checkpoint: the head's file, keys `decode_head.bn.*` and `decode_head.conv_seg.*`.
        layers: blocks whose normed features are concatenated: how many, from the last (1 for "linear", 4 for
            "multi-scale"), or their indices.

    Raises:
        ValueError: the file is not readable, or belongs to another width or number of layers.

    Source: Oquab et al., "DINOv2", TMLR 2024.
    """
    state = read_checkpoint(checkpoint)
    state = {k.removeprefix("decode_head."): v for k, v in state.items() if k.startswith("decode_head.")}
    if "conv_seg.weight" not in state:
        raise ValueError(f"{checkpoint} holds no decode_head.conv_seg.weight: it is not a linear segmentation head")
    count = layers if isinstance(layers, int) else len(layers)
    num_classes, width = state["conv_seg.weight"].shape[:2]
    if width != count * backbone.embed_dim:
        raise ValueError(
            f"{checkpoint} reads {width} channels, but {count} layers of {type(backbone).__name__} give "
            f"{count * backbone.embed_dim}; use another backbone or other layers"
        )
    head = BNLinearHead(width, num_classes)
    load_state(head, state, str(checkpoint))
    options = {"mean": _MEAN, "std": _STD, "pad": "center"}
    if layers == 1:
        return Segmenter(backbone, head, num_classes, **options).eval()
    return LayersSegmenter(backbone, head, num_classes, layers, **options).eval()
