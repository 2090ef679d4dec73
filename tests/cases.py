"""The table that the matrix runs over: one row per method, one row per backbone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import timm
import torch
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.convit import ConVit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import (
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos
from timm.models.xcit import Xcit
from torch import nn

from tokenzoo import create_method, method_class
from tokenzoo.adapters.inspect import describe
from tokenzoo.core.learned import Learned, needs_training
from tokenzoo.models import LVViT, T2TViT

# method -> (options that remove nothing, options that reduce, options of a static shape where they differ)
ZOO: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "algm": ({"threshold": 2.0, "layers": (0,)}, {"threshold": 0.1, "layers": (0, 2)}, {"r": 2}),
    "atc": ({"keep_rate": 1.0}, {"keep_rate": 0.6}, {}),
    "ats": ({"layers": (3,)}, {"layers": (1, 2)}, {"layers": (1, 2), "max_tokens": 10}),
    "catanet": ({"group_size": 16}, {"group_size": 3, "centres": 4}, {}),
    "cluster": ({"scale": 1.0}, {"layers": 0, "where": "before", "scale": 0.5}, {}),
    "cts": ({"shared": 0}, {"shared": 2}, {}),
    "dct": ({"keep_rate": 1.0}, {"keep_rate": 0.6}, {}),
    "dpcknn": ({"keep_rate": 1.0}, {"keep_rate": 0.6, "neighbours": 3}, {}),
    "diffrate": ({"prune": 1.0, "merge": 1.0}, {"prune": 0.9, "merge": 0.7}, {}),
    "dynamicvit": ({"keep_rate": 1.0}, {"keep_rate": 0.6}, {}),
    "evit": ({"keep_rate": 1.0}, {"keep_rate": 0.6}, {}),
    "evo": ({"keep_rate": 1.0}, {"keep_rate": 0.5}, {}),
    "flowcut": ({"keep_rate": 1.0}, {"keep_rate": 0.1, "layers": (1, 2)}, {"entropy": 0.7}),
    "fourier": ({"stride": 1}, {"stride": 2}, {}),
    "gtp": ({"r": 0}, {"r": 2, "neighbours": 4, "alpha": 0.4}, {}),
    "kmedoids": ({"keep_rate": 1.0}, {"keep_rate": 0.6}, {}),
    "ia_red2": ({"threshold": 0.0}, {"threshold": 0.881, "layers": (0, 2)}, {"max_tokens": 12}),
    "mctf": ({"r": 0}, {"r": 3, "min_tokens": 4}, {}),
    "mod": ({"keep_rate": 1.0}, {"keep_rate": 0.5}, {}),
    "patchmerger": ({"keep_rate": 1.0}, {"keep_rate": 0.6}, {}),
    "pitome": ({"keep_rate": 1.0}, {"keep_rate": 0.6}, {}),
    "pool": ({"stride": 1}, {"stride": 2}, {}),
    "ppt": ({"r": 0}, {"r": 2, "threshold": 7e-3}, {}),
    "radial": ({"keep_rate": 1.0}, {"keep_rate": 0.6}, {}),
    "random": ({"keep_rate": 1.0}, {"keep_rate": 0.6}, {}),
    "reconstruct": ({"layers": 2}, {"layers": 2}, {}),
    "sinkhorn": ({"keep_rate": 1.0}, {"keep_rate": 0.6}, {}),
    # layers that rebuild are bound to the depth of the model
    "sit": ({"keep_rate": 1.0}, {"keep_rate": 0.6, "feature_weight": 0.0}, {}),
    "soft_transform": ({"keep_rate": 1.0}, {"keep_rate": 0.6}, {}),
    "sparsifiner": ({"keep_rate": 1.0}, {"keep_rate": 0.4, "coefficients": 2}, {}),
    "sta": ({"cell": 1}, {"cell": 2, "layers": (0,)}, {}),
    "tap": ({"num_scales": 1, "adl_weight": 0.0}, {"num_scales": 3, "layers": (0,)}, {}),
    "thresholds": ({}, {"alike": 0.7, "least": 0.4}, {"max_tokens": 12}),
    "tofu": ({"r": 0}, {"r": 2}, {}),
    "tome": ({"r": 0}, {"r": 2}, {}),
    "tomesd": ({"ratio": 0.0}, {"ratio": 0.75, "branches": ("attention", "mlp")}, {}),
    "topk": ({"keep_rate": 1.0}, {"keep_rate": 0.6}, {}),
    "turbo": ({"r": 0}, {"r": 2, "min_tokens": 0}, {}),
    "uniform": ({"keep_rate": 1.0}, {"keep_rate": 0.6}, {}),
    "vggt": ({"ratio": 0.0}, {"ratio": 0.25, "protected": 0.2}, {}),
}
EVERY = sorted(ZOO)
# those without parameters of their own: a method that learns starts anew wherever it is put on, so tests that compare
# two patched models, or names of weights, take these alone; test_learned_matrix.py holds the others to the same
METHODS = [name for name in EVERY if not needs_training(method_class(name))]
# methods that only make sense after another one
COMPANION = {"reconstruct": "cluster"}
# methods after which all tokens are there again: no shorter sequence, nothing in the trace
KEEPS_LENGTH = {"catanet", "evo", "mod", "reconstruct", "sparsifiner", "sta", "tap", "tomesd", "vggt"}


def released_numbers(model: nn.Module) -> int:
    """How many numbers the authors' code counts as parameters: those that are never trained are buffers here."""
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    fixed = (value.numel() for name, value in model.named_buffers() if name.split(".")[-1] not in statistics)
    return sum(p.numel() for p in model.parameters()) + sum(fixed)


def given(method: str, kind: str = "reduce", **more: Any) -> Any:
    """The recipe of a row.

    Args:
        method: name of the method.
        kind: "zero", "reduce" or "static".
        more: options of the method on top.
    """
    zero, reduce, static = ZOO[method]
    options = {"zero": zero, "reduce": reduce, "static": {**reduce, **static}}[kind]
    recipe = {"method": method, **options, **more}
    return [given(COMPANION[method], kind), recipe] if method in COMPANION else recipe


VIT = partial(
    VisionTransformer, img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, mlp_ratio=2, num_classes=7
)
EVA = partial(Eva, img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, mlp_ratio=2, num_classes=7)
BEIT = partial(Beit, img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, mlp_ratio=2, num_classes=7)
RELPOS = partial(
    VisionTransformerRelPos,
    img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, mlp_ratio=2, num_classes=7, init_values=0.3,
)  # fmt: skip
NAFLEX = partial(
    NaFlexVit, patch_size=8, embed_dim=32, depth=4, num_heads=2, mlp_ratio=2, num_classes=7, class_token=False,
    pos_embed_grid_size=(4, 4),
)  # fmt: skip

CAIT = partial(
    Cait, img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=4, mlp_ratio=2, num_classes=7,
    depth_token_only=2, mlp_ratio_token_only=2,
)  # fmt: skip

XCIT = partial(
    Xcit, img_size=64, patch_size=16, embed_dim=32, depth=4, num_heads=2, mlp_ratio=2, num_classes=7, eta=0.3,
)  # fmt: skip

CONVIT = partial(
    ConVit, img_size=32, patch_size=8, embed_dim=16, depth=4, num_heads=2, mlp_ratio=2, num_classes=7,
    local_up_to_layer=2,
)  # fmt: skip


def _gated(**kwargs: Any) -> nn.Module:
    """A ViT whose attention is gated and has its own width (timm builds it for GenLIP-like models)."""
    model = VIT(**kwargs)
    for block in model.blocks:
        block.attn = timm.layers.Attention(32, 2, attn_head_dim=24, qkv_bias=True, gated=True)
    return model


def _differential(**kwargs: Any) -> nn.Module:
    return VIT(attn_layer="diff", **kwargs)


def _diff_parallel() -> nn.Module:
    from timm.models.vision_transformer import DiffParallelScalingBlock

    return VIT(block_fn=DiffParallelScalingBlock)


def _tower(file: str, name: str, **kwargs: Any) -> nn.Module:
    """A vision tower that newer releases of timm have: an encoder or a classifier around one."""
    cls = getattr(import_module(f"timm.models.{file}"), name)
    more = {"num_classes": 7} if name.endswith("Classifier") else {}
    more |= {"pos_embed_grid_size": 4} if file == "qwen3_vit" else {}
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "mlp_ratio": 2}
    return cls(**sizes, **more, **kwargs)


def _gemma4(name: str, **kwargs: Any) -> nn.Module:
    """A tiny Gemma 4 tower; its image size is what the configuration says."""
    cls = getattr(import_module("timm.models.gemma4_vit"), name)
    more = {"num_classes": 7} if name.endswith("Classifier") else {}
    sizes = {"embed_dim": 32, "depth": 4, "num_heads": 2, "head_dim": 16, "intermediate_size": 48, "patch_size": 8}
    model = cls(pooling_kernel_size=2, position_embedding_size=16, **sizes, **more, **kwargs)
    model.default_cfg = {"input_size": (3, 32, 32)}
    return model


# name -> model; everything that the adapters claim to serve
BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "deit": VIT,
    "layer_scale": partial(VIT, init_values=0.3),
    "qk_norm": partial(VIT, qk_norm=True),
    "scale_norms": partial(VIT, scale_attn_norm=True, scale_mlp_norm=True),
    "res_post": partial(VIT, block_fn=ResPostBlock, init_values=0.3),
    "parallel_scaling": partial(VIT, block_fn=ParallelScalingBlock, qk_norm=True, init_values=0.3),
    "parallel_things": partial(VIT, block_fn=ParallelThingsBlock, init_values=0.3),
    "gated": _gated,
    "differential": _differential,
    "diff_parallel": _diff_parallel,
    "distilled": partial(
        VisionTransformerDistilled,
        img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, mlp_ratio=2, num_classes=7,
    ),
    "registers": partial(VIT, reg_tokens=4, no_embed_class=True, init_values=0.3),
    "registers_only": partial(VIT, class_token=False, reg_tokens=1, no_embed_class=True, global_pool="avg"),
    "gap": partial(VIT, class_token=False, global_pool="avg"),
    "gap_with_class": partial(VIT, global_pool="avg"),
    "avgmax": partial(VIT, class_token=False, global_pool="avgmax"),
    "max": partial(VIT, class_token=False, global_pool="max"),
    "map": partial(VIT, class_token=False, global_pool="map"),
    "map_with_class": partial(VIT, global_pool="map"),
    "prr": partial(VIT, global_pool="prr"),
    "prr_gap": partial(VIT, class_token=False, global_pool="prr"),
    "no_head": partial(VIT, num_classes=0, global_pool=""),
    "dynamic": partial(VIT, dynamic_img_size=True),
    "non_square": partial(VIT, img_size=(32, 48)),
    "clip_like": partial(VIT, pre_norm=True),
    "siglip_like": partial(VIT, class_token=False, global_pool="map", norm_layer=partial(nn.LayerNorm, eps=1e-6)),
    "dinov2_like": partial(
        VIT, img_size=28, patch_size=7, init_values=1e-5, mlp_layer=timm.layers.SwiGLUPacked, reg_tokens=4,
        no_embed_class=True,
    ),
    "eva02": partial(EVA, swiglu_mlp=True, scale_mlp=True, qkv_fused=False, use_rot_pos_emb=True),
    "eva_giant": partial(EVA, global_pool="avg"),
    "eva_post_norm": partial(EVA, use_post_norm=True, use_rot_pos_emb=True),
    "dinov3": partial(
        EVA, qkv_bias=False, init_values=1e-5, num_reg_tokens=4, use_rot_pos_emb=True, use_abs_pos_emb=False,
        rope_type="dinov3", rope_rotate_half=True, no_embed_class=True,
    ),
    "rope_mixed": partial(EVA, use_rot_pos_emb=True, rope_type="mixed", num_reg_tokens=1, global_pool="avg"),
    "pe_like": partial(
        EVA, attn_type="rope", use_pre_transformer_norm=True, use_rot_pos_emb=True, global_pool="map",
        ref_feat_shape=(8, 8),
    ),
    "beit": partial(BEIT, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1),
    "beit_shared": partial(
        BEIT, use_shared_rel_pos_bias=True, global_pool="token", swiglu_mlp=True, scale_mlp=True, qkv_bias=False
    ),
    "relpos_mlp": partial(RELPOS, rel_pos_type="mlp", rel_pos_dim=16, fc_norm=True, qk_norm=True, init_values=0.3),
    "relpos_bias": partial(
        RELPOS, rel_pos_type="bias", class_token=True, global_pool="token", block_fn=ResPostRelPosBlock
    ),
    "relpos_shared": partial(RELPOS, rel_pos_type="swin", shared_rel_pos=True, class_token=True),
    "naflex": partial(NAFLEX, class_token=True, global_pool="token", init_values=0.3),
    "naflex_siglip": partial(NAFLEX, embed_proj_type="linear", global_pool="map", pre_norm=True),
    "naflex_rope": partial(NAFLEX, rope_type="axial", pos_embed="none", reg_tokens=2, global_pool="avg", img_size=32),
    "naflex_mixed": partial(NAFLEX, rope_type="mixed", pos_embed="factorized", global_pool="avgmax", swiglu_mlp=True),
    "qwen3": partial(_tower, "qwen3_vit", "Qwen3VitClassifier"),
    "qwen3_merge": partial(_tower, "qwen3_vit", "Qwen3VitClassifier", encoder_pool="merge", out_features=24),
    "qwen3_enc": partial(_tower, "qwen3_vit", "Qwen3VitEncoder", out_features=24),
    "qwen3_enc_avg": partial(_tower, "qwen3_vit", "Qwen3VitEncoder", global_pool="avg"),
    "qwen3_enc_all": partial(_tower, "qwen3_vit", "Qwen3VitEncoder", global_pool=""),
    "deepseek": partial(_tower, "deepseek_vit", "DeepseekVitClassifier"),
    "deepseek_align": partial(_tower, "deepseek_vit", "DeepseekVitClassifier", encoder_pool="align", out_features=24),
    "deepseek_enc": partial(_tower, "deepseek_vit", "DeepseekVitEncoder", out_features=24),
    "gemma4": partial(_gemma4, "Gemma4VitClassifier"),
    "gemma4_soft": partial(_gemma4, "Gemma4VitClassifier", encoder_pool="soft", standardize=True, num_kv_heads=1),
    "gemma4_enc": partial(_gemma4, "Gemma4VitEncoder", use_clipped_linears=True),
    "t2t_vit": partial(
        T2TViT, img_size=64, embed_dim=32, depth=4, num_heads=2, mlp_ratio=2, num_classes=7, token_dim=16
    ),
    "lv_vit": partial(
        LVViT, img_size=64, embed_dim=32, depth=4, num_heads=2, mlp_ratio=2, num_classes=7, skip_lam=2.0
    ),
    "cait": CAIT,
    "cait_avg": partial(CAIT, global_pool="avg"),
    "convit": CONVIT,
    "convit_avg": partial(CONVIT, global_pool="avg", use_pos_embed=False, local_up_to_layer=3),
    "convit_plain": partial(CONVIT, local_up_to_layer=0),
    "xcit": XCIT,
    "xcit_avg": partial(XCIT, global_pool="avg", tokens_norm=True, use_pos_embed=False),
}  # fmt: skip
NEEDS_CLASS = {"ats"}
NEEDS_CONVOLUTION = {"cts"}  # images of half the size have to be embedded
WITHOUT_HALF = (T2TViT, LVViT, Xcit, NaFlexVit)
NEEDS_ATTENTION_ALONE = {"sta"}  # another form of attention, where no MLP shares its branch


def _shared_branch() -> tuple[type, ...]:
    import timm.models.vision_transformer as vit

    names = ("ParallelScalingBlock", "DiffParallelScalingBlock")
    return tuple(getattr(vit, name) for name in names if hasattr(vit, name))


SHARED_BRANCH = _shared_branch()


def _supported(name: str) -> bool:
    """Whether the installed timm has what a row needs (the oldest served release lacks differential attention)."""
    try:
        BACKBONES[name]()
    except (ImportError, TypeError, AssertionError):
        return False
    return True


def backbone_names() -> list[str]:
    """Rows that the installed timm can build."""
    return [name for name in BACKBONES if _supported(name)]


def build(name: str, seed: int = 0) -> nn.Module:
    """A tiny model with random weights in which mistakes show."""
    torch.manual_seed(seed)
    return shaken(BACKBONES[name]())


@torch.no_grad()
def shaken(model: nn.Module) -> nn.Module:
    """Random weights: gammas 0.1 to 0.5, norms and tokens off their start."""
    for key, parameter in model.named_parameters():
        if "gamma" in key or ".ls" in key:
            parameter.uniform_(0.1, 0.5)
        elif "norm" in key and key.endswith("weight"):
            parameter.uniform_(0.5, 1.5)
        elif key.endswith("bias") or "token" in key or "pos_embed" in key:
            parameter.normal_(std=0.3)
        elif "lambda" in key or parameter.dim() < 2:
            parameter.uniform_(-0.3, 0.3)
        elif "rope" not in key:
            parameter.normal_(std=1.5 / parameter[0].numel() ** 0.5)
    return model.eval()


def size_of(model: nn.Module) -> tuple[int, int]:
    """Pixels of the model's own images; a classifier around an encoder has no patch embedding of its own."""
    if isinstance(model, NaFlexVit):
        return tuple(8 * side for side in model.embeds.pos_embed_grid_size or (4, 4))
    if "Gemma4" in type(model).__name__:
        return model.default_cfg["input_size"][1:]
    return tuple(getattr(model, "encoder", model).patch_embed.img_size)


def images(model: nn.Module, batch: int = 3, seed: int = 1) -> torch.Tensor:
    """Random images of the model's size."""
    return torch.randn(batch, 3, *size_of(model), generator=torch.Generator().manual_seed(seed))


def serves(method: str, model: nn.Module) -> bool:
    """Whether a method accepts a model (others refuse by name, see test_bad_input)."""
    if method in NEEDS_CONVOLUTION and (isinstance(model, WITHOUT_HALF) or "Gemma4" in type(model).__name__):
        return False
    if isinstance(model, Xcit) and issubclass(method_class(method), Learned) and method_class(method).gates:
        return False
    if isinstance(model, Xcit) and (method in NEEDS_ATTENTION_ALONE or create_method(method).reads_maps):
        return False
    if method in NEEDS_ATTENTION_ALONE and isinstance(getattr(model, "encoder", model).blocks[0], SHARED_BRANCH):
        return False
    return method not in NEEDS_CLASS or describe(model).layout.has_class
