"""The family of transformers' own vision towers."""

from __future__ import annotations

from torch import nn

from ..backbone import Family
from ..registry import register_family
from . import clip, dinov2, siglip, vit

_TOWERS = (vit, dinov2, clip, siglip)


def check(model: nn.Module) -> None:
    """Refuses settings of a model that reduction cannot serve.

    Raises:
        ValueError: an attention implementation for batches without padding ("paged|...").
    """
    chosen = model.config._attn_implementation or ""
    if chosen.startswith("paged|"):
        raise ValueError(
            f"{type(model).__name__} attends by {chosen!r}, which lays all images of a batch into one sequence; call "
            "model.set_attn_implementation('sdpa') before patching"
        )


def bypassed(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Modules that are never called as a whole, and what to do instead."""
    found = [(name, getattr(model, name, None)) for name in ("encoder", "layers")]
    return [(name, module, "hook the layers one by one") for name, module in found if module is not None]


FAMILY = register_family(
    Family(
        name="transformers",
        summary="Hugging Face transformers: ViT, DeiT, DINOv2 (registers), CLIP and SigLIP vision towers",
        tried="transformers 5.18 to 5.24",
        models={plain: kind for tower in _TOWERS for plain, kind in tower.MODELS.items()},
        blocks={plain: kind for tower in _TOWERS for plain, kind in tower.BLOCKS.items()},
        attentions={plain: kind for tower in _TOWERS for plain, kind in tower.ATTENTIONS.items()},
        parts=siglip.PARTS_OUTSIDE,
        around={plain: known for tower in _TOWERS for plain, known in tower.AROUND.items()},
        check=check,
        bypassed=bypassed,
    )
)
