"""Tiny random towers of transformers: a row per class and setting that the family claims to serve."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import NEEDS_CLASS, given, shaken
from torch import Tensor, nn

from tokenzoo.adapters.inspect import describe, is_patched
from tokenzoo.adapters.wrappers import backbone_of

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8, "num_labels": 7,
}  # fmt: skip
DINO = {key: value for key, value in SIZES.items() if key != "intermediate_size"} | {"mlp_ratio": 2}


def _made(model: str, config: str, sizes: dict[str, Any] = SIZES, **more: Any) -> nn.Module:
    return getattr(transformers, model)(getattr(transformers, config)(**{**sizes, **more}))


def _vision(model: str, config: str, package: str, **more: Any) -> nn.Module:
    """A tower that transformers hands out as part of a model of images and text alone."""
    files = [f"transformers.models.{package}.{kind}_{package}" for kind in ("modeling", "configuration")]
    modeling, configuration = map(importlib.import_module, files)
    sizes = SQUARE if package == "internvl" else PATCHES
    return getattr(modeling, model)(getattr(configuration, config)(**{**sizes, **more}))


def _whole(model: str, config: str, **more: Any) -> nn.Module:
    """A model of two towers, or a classifier whose configuration says so."""
    text = {**SIZES, "vocab_size": 20, "max_position_embeddings": 8, "eos_token_id": 1, "projection_size": 32}
    options = {
        "vision_config": SIZES | ({"num_patches": 16} if "Siglip2" in model else {}),
        "text_config": text,
        "projection_dim": 16,
        "num_labels": 7,
        **more,
    }
    return getattr(transformers, model)(getattr(transformers, config)(**options))


PATCHES = {key: value for key, value in SIZES.items() if key != "num_labels"}
SQUARE = {**PATCHES, "image_size": [32, 32], "patch_size": [8, 8]}
dinov3 = partial(_made, config="DINOv3ViTConfig", sizes={**PATCHES, "num_register_tokens": 3, "layerscale_value": 0.3})
biased = partial(_made, config="BeitConfig", use_relative_position_bias=True)
data2vec = partial(_made, config="Data2VecVisionConfig", use_relative_position_bias=True)
dino = partial(_made, config="Dinov2Config", sizes=DINO)
registers = partial(_made, config="Dinov2WithRegistersConfig", sizes=DINO)
# name -> model
TOWERS: dict[str, Callable[[], nn.Module]] = {
    "vit": partial(_made, "ViTModel", "ViTConfig"),
    "vit_classes": partial(_made, "ViTForImageClassification", "ViTConfig"),
    "deit": partial(_made, "DeiTModel", "DeiTConfig"),
    "deit_classes": partial(_made, "DeiTForImageClassification", "DeiTConfig"),
    "deit_teacher": partial(_made, "DeiTForImageClassificationWithTeacher", "DeiTConfig"),
    "dinov2": partial(dino, "Dinov2Model"),
    "dinov2_swiglu": partial(dino, "Dinov2Model", use_swiglu_ffn=True),
    "dinov2_classes": partial(dino, "Dinov2ForImageClassification"),
    "dinov2_maps": partial(dino, "Dinov2Backbone", out_features=["stage1", "stage4"]),
    "registers": partial(registers, "Dinov2WithRegistersModel"),
    "registers_classes": partial(registers, "Dinov2WithRegistersForImageClassification"),
    "registers_maps": partial(registers, "Dinov2WithRegistersBackbone", reshape_hidden_states=False),
    "clip": partial(_made, "CLIPVisionModel", "CLIPVisionConfig"),
    "clip_projected": partial(_made, "CLIPVisionModelWithProjection", "CLIPVisionConfig"),
    "clip_classes": partial(_whole, "CLIPForImageClassification", "CLIPConfig"),
    "siglip": partial(_made, "SiglipVisionModel", "SiglipVisionConfig"),
    "siglip_headless": partial(_made, "SiglipVisionModel", "SiglipVisionConfig", vision_use_head=False),
    "siglip_classes": partial(_whole, "SiglipForImageClassification", "SiglipConfig"),
    "siglip2": partial(_made, "Siglip2VisionModel", "Siglip2VisionConfig", num_patches=16),
    "siglip2_classes": partial(_whole, "Siglip2ForImageClassification", "Siglip2Config"),
    "dinov3": partial(dinov3, "DINOv3ViTModel"),
    "dinov3_gated": partial(dinov3, "DINOv3ViTModel", use_gated_mlp=True, num_register_tokens=0),
    "dinov3_maps": partial(dinov3, "DINOv3ViTBackbone", out_features=["stage2", "stage4"], return_class_token=True),
    "beit": partial(biased, "BeitModel"),
    "beit_classes": partial(biased, "BeitForImageClassification", use_mean_pooling=True),
    "beit_shared": partial(
        biased, "BeitModel", use_shared_relative_position_bias=True, use_absolute_position_embeddings=True,
        use_mean_pooling=False,
    ),
    "beit_plain": partial(biased, "BeitModel", use_relative_position_bias=False, layer_scale_init_value=0.0),
    "beit_maps": partial(biased, "BeitBackbone", out_features=["stage1", "stage4"]),
    "data2vec": partial(data2vec, "Data2VecVisionModel"),
    "data2vec_classes": partial(
        data2vec, "Data2VecVisionForImageClassification", use_shared_relative_position_bias=True
    ),
    "mae": partial(_made, "ViTMAEModel", "ViTMAEConfig", mask_ratio=0.0),
    "idefics3": partial(_vision, "Idefics3VisionTransformer", "Idefics3VisionConfig", "idefics3"),
    "smolvlm": partial(_vision, "SmolVLMVisionTransformer", "SmolVLMVisionConfig", "smolvlm"),
    "internvl": partial(_vision, "InternVLVisionModel", "InternVLVisionConfig", "internvl", use_qk_norm=True),
    "internvl_rms": partial(
        _vision, "InternVLVisionModel", "InternVLVisionConfig", "internvl", norm_type="rms_norm", use_mean_pooling=False
    ),
}  # fmt: skip
# classifiers around towers that take a mean of patches themselves
MEANS = ("dinov2_classes", "registers_classes", "clip_classes", "siglip_classes")
# the shortest way through every kind of tower
FEW = ("vit_classes", "dinov2_classes", "clip_projected", "siglip")


def build(name: str, seed: int = 0) -> nn.Module:
    """A tiny model with random weights in which mistakes show."""
    torch.manual_seed(seed)
    model = shaken(TOWERS[name]())
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "position_embedding" in key or "probe" in key or "bias_table" in key:
                parameter.normal_(std=0.3)
            elif "lambda" in key:
                parameter.uniform_(0.1, 0.5)
    return model


def whole(name: str, seed: int = 0) -> nn.Module:
    """A CLIP or SigLIP model with both of its towers."""
    torch.manual_seed(seed)
    return shaken(_whole(f"{name}Model", f"{name}Config"))


def images(model: nn.Module, batch: int = 3, seed: int = 1, size: tuple[int, int] | None = None) -> Tensor:
    """Random images, of the model's own size if none is given."""
    size = (32, 32) if size is None else size
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def ask(model: nn.Module, x: Tensor, **options: Any) -> Any:
    """Calls a model: MAE's encoder without its shuffle, as a patched one is; SigLIP 2, unless patched, with patches."""
    if type(model).__name__.startswith("Siglip2") and not is_patched(model):
        high, wide = x.shape[-2] // 8, x.shape[-1] // 8
        options["spatial_shapes"] = torch.tensor([[high, wide]]).expand(len(x), -1)
        options["pixel_attention_mask"] = torch.ones(len(x), high * wide, dtype=torch.long)
        x = x.unflatten(2, (high, 8)).unflatten(4, (wide, 8)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    if type(model).__name__ == "ViTMAEModel":
        n = (x.shape[-2] // 8) * (x.shape[-1] // 8)
        options["noise"] = torch.arange(n, dtype=torch.float32).expand(len(x), -1)
    return model(x, **options)


def answers(output: Any) -> list[Tensor]:
    """The tensors of an output, but for the hidden states, and MAE's notes of a shuffle."""
    found = []
    for key, value in output.items():
        if key not in ("hidden_states", "mask", "ids_restore") and value is not None:
            found += list(value) if isinstance(value, tuple) else [value]
    return found


def served(method: str, model: nn.Module) -> bool:
    """Whether a method accepts a model."""
    return method not in NEEDS_CLASS or describe(backbone_of(model)).layout.has_class


__all__ = ["FEW", "MEANS", "TOWERS", "answers", "ask", "build", "given", "images", "served", "whole"]
