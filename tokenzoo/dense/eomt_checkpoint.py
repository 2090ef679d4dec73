"""EoMT as its authors release it: the weights of the whole network in one file."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from .checkpoints import load_state, read_checkpoint
from .eomt import EoMT

_TRAINING = ("criterion.", "metrics.")  # parts of the authors' training module


def load_eomt(backbone: nn.Module, checkpoint: str | Path, num_blocks: int | None = None) -> EoMT:
    """EoMT with released weights; sizes are read off the file.

    Args:
        backbone: the timm model it was built on (num_classes=0, with the image and patch size of the weights); its own
            weights are replaced.
        checkpoint: the file, keys `encoder.backbone.*`, `q.weight`, `class_head.*`, ..., perhaps behind `network.`.
        num_blocks: blocks that the queries take part in; None where the file tells (`attn_mask_probs`).

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: the file is not readable, or belongs to another model (the keys are listed).

    Source: Kerssies et al., "Your ViT is Secretly an Image Segmentation Model", CVPR 2025.
    """
    state = {k.removeprefix("network."): v for k, v in read_checkpoint(checkpoint).items()}
    state = {k: v for k, v in state.items() if not k.startswith(_TRAINING)}
    lacking = [key for key in ("q.weight", "class_head.weight", "encoder.backbone.patch_embed.proj.weight") if
               key not in state]  # fmt: skip
    if lacking:
        raise ValueError(f"checkpoint {checkpoint} is none of EoMT in the authors' key names: it lacks {lacking}")
    probs = state.get("attn_mask_probs")
    if num_blocks is None:
        if probs is None:
            raise ValueError(f"checkpoint {checkpoint} has no attn_mask_probs to tell num_blocks; pass num_blocks=...")
        num_blocks = len(probs)
    model = EoMT(backbone, len(state["class_head.weight"]) - 1, len(state["q.weight"]), num_blocks)
    for name in ("attn_mask_probs", "encoder.pixel_mean", "encoder.pixel_std"):  # no weights: the defaults serve
        state.setdefault(name, model.state_dict()[name])
    load_state(model, state, str(checkpoint))
    return model.eval()
