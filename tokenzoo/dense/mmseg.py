"""Checkpoints with the key names of mmsegmentation: its plain ViT, and DToP as released on it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from .checkpoints import load_state, read_checkpoint
from .dtop import DToP
from .dtop_head import DToPHead

_NAMES = (  # mmsegmentation's VisionTransformer -> timm's
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^ln1\.", "norm."),
    (r"^layers\.(\d+)\.ln([12])\.", r"blocks.\1.norm\2."),
    (r"^layers\.(\d+)\.attn\.attn\.in_proj_(weight|bias)$", r"blocks.\1.attn.qkv.\2"),
    (r"^layers\.(\d+)\.attn\.attn\.out_proj\.", r"blocks.\1.attn.proj."),
    (r"^layers\.(\d+)\.ffn\.layers\.0\.0\.", r"blocks.\1.mlp.fc1."),
    (r"^layers\.(\d+)\.ffn\.layers\.1\.", r"blocks.\1.mlp.fc2."),
)


def timm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of mmsegmentation's plain ViT under timm's names; other names stay as they are.

    Args:
        state: without the prefix `backbone.`.
    """
    renamed = {}
    for key, value in state.items():
        for pattern, name in _NAMES:
            key = re.sub(pattern, name, key)
        renamed[key] = value
    return renamed


def load_dtop(
    backbone: nn.Module,
    checkpoint: str | Path,
    taps: Sequence[int],
    num_heads: int,
    threshold: float | Sequence[float] = 0.95,
) -> DToP:
    """DToP with weights in the released layout; sizes of the heads are read off the file.

    Args:
        backbone: a timm ViT of the same sizes (num_classes=0, img_size of the training crop); its weights are replaced.
        checkpoint: keys `backbone.*` in mmsegmentation's names, `auxiliary_head.<j>.*`, `decode_head.*`.
        taps: the block after which each head looks, the main head last: (5, 7, 11) for ViT-B, (7, 15, 23) for ViT-L.
        num_heads: attention heads of the decoders: 6 for ViT-B, 8 for ViT-L.
        threshold: as for `DToP`: 0.9 for ADE20K with ViT-B, 0.95 otherwise.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: the file is not readable, or belongs to another model (the keys are listed).

    Source: Tang et al., "Dynamic Token Pruning in Plain Vision Transformers for Semantic Segmentation", ICCV 2023.
    """
    state = read_checkpoint(checkpoint)
    names = [f"auxiliary_head.{j}" for j in range(len(taps) - 1)] + ["decode_head"]
    heads = []
    for name in names:
        proj, queries = state.get(f"{name}.input_proj.weight"), state.get(f"{name}.q.weight")
        if proj is None or queries is None:
            raise ValueError(f"checkpoint {checkpoint} has no {name}.input_proj.weight and {name}.q.weight: no DToP")
        layers = {key.split(".layers.")[1].split(".")[0] for key in state if key.startswith(f"{name}.decoder.layers.")}
        heads.append(DToPHead(proj.shape[1], len(queries), proj.shape[0], num_heads, len(layers)))
    model = DToP(backbone, heads, taps, threshold)
    encoder = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    # the final norm is off in the released configurations, and DToP does not use it
    own = {f"backbone.norm.{key}": value for key, value in backbone.norm.state_dict().items()}
    rest = {k: v for k, v in state.items() if not k.startswith("backbone.")}
    load_state(model, {**own, **{f"backbone.{k}": v for k, v in timm_names(encoder).items()}, **rest}, str(checkpoint))
    return model.eval()
