"""The family of transformers' own vision towers."""

from __future__ import annotations

from torch import nn
from transformers.models.beit.modeling_beit import BeitModel
from transformers.models.data2vec.modeling_data2vec_vision import Data2VecVisionModel

from ...core.recipe import Recipe
from ..backbone import Family
from ..refusals import refuse_unplaced
from ..registry import register_family
from . import beit, clip, data2vec, dinov2, dinov3, idefics, internvl, mae, siglip, siglip2, vit

_TOWERS = (vit, dinov2, dinov3, clip, siglip, siglip2, beit, data2vec, mae, idefics, internvl)


def check(model: nn.Module) -> None:
    """Refuses settings of a model that reduction cannot serve.

    Raises:
        ValueError: an attention implementation for batches without padding ("paged|..."); ViT-MAE with a mask ratio
            other than zero.
    """
    mae.check_masking(model)
    chosen = model.config._attn_implementation or ""
    if chosen.startswith("paged|"):
        raise ValueError(
            f"{type(model).__name__} attends by {chosen!r}, which lays all images of a batch into one sequence; call "
            "model.set_attn_implementation('sdpa') before patching"
        )


def check_recipe(model: nn.Module, recipe: Recipe) -> None:
    """Refuses recipes that a model cannot follow.

    Raises:
        ValueError: tokens added behind the prefix (protect), or mean positions, where a position bias knows neither
            (BEiT, Data2Vec).
    """
    if isinstance(model, (BeitModel, Data2VecVisionModel)):
        refuse_unplaced(model, recipe)


def bypassed(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Modules that are never called as a whole, and what to do instead."""
    names = ("encoder", "layers", "model", "encoder.layer", "encoder.layers", "model.layer")
    parts = {name: module for name, module in model.named_modules() if name in names}
    found = [(name, module, "hook the layers one by one") for name, module in parts.items()]
    if getattr(model, "pooler", None) is not None and getattr(model.pooler, "layernorm", None) is not None:
        found.append(("pooler", model.pooler, "hook its norm (pooler.layernorm)"))
    for name, module in model.named_modules():
        if type(module).__name__ in ("Data2VecVisionSelfAttention", "Data2VecVisionSdpaSelfAttention"):
            found.append((name, module, "hook its parts (query, key, value)"))
    return found


FAMILY = register_family(
    Family(
        name="transformers",
        summary=(
            "vision towers of Hugging Face transformers: ViT, DeiT, DINOv2 (registers), DINOv3, CLIP, SigLIP, "
            "SigLIP 2, BEiT, Data2Vec, MAE, Idefics3, SmolVLM, InternVL"
        ),
        tried="transformers 5.18 to 5.24",
        models={plain: kind for tower in _TOWERS for plain, kind in tower.MODELS.items()},
        blocks={plain: kind for tower in _TOWERS for plain, kind in tower.BLOCKS.items()},
        attentions={plain: kind for tower in _TOWERS for plain, kind in tower.ATTENTIONS.items()},
        parts=siglip.PARTS_OUTSIDE | siglip2.PARTS_OUTSIDE,
        around={plain: known for tower in _TOWERS for plain, known in getattr(tower, "AROUND", {}).items()},
        check=check,
        check_recipe=check_recipe,
        bypassed=bypassed,
    )
)
