"""Models of other libraries than timm, tiny and random: the tables of test_other_libraries.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from cases import NEEDS_CONVOLUTION, VIT, shaken
from torch import Tensor, nn
from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer

SIZE = (3, 32, 32)
TORCHVISION = partial(
    VisionTransformer, image_size=32, patch_size=8, num_layers=4, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=7
)


def open_clip(**options: object) -> nn.Module:
    transformer = pytest.importorskip("open_clip.transformer")
    sizes = dict(image_size=32, patch_size=8, width=32, layers=4, heads=2, mlp_ratio=2, output_dim=24)
    return transformer.VisionTransformer(**{**sizes, **options})


def _narrow(**options: object) -> nn.Module:
    """open_clip with attention pooling of few heads and queries."""
    return open_clip(attn_pooler_heads=2, attn_pooler_queries=5, **options)


# name -> model; everything that the adapters of torchvision and open_clip claim to serve
TOWERS: dict[str, Callable[[], nn.Module]] = {
    "torchvision": TORCHVISION,
    "torchvision_dropout": partial(TORCHVISION, dropout=0.1, attention_dropout=0.1, representation_size=16),
    "torchvision_stem": partial(TORCHVISION, conv_stem_configs=[ConvStemConfig(8, 3, 2), ConvStemConfig(16, 3, 4)]),
    "open_clip": open_clip,
    "open_clip_layer_scale": partial(open_clip, ls_init_value=0.1, no_ln_pre=True, pos_embed_type="sin_cos_2d"),
    "open_clip_custom": partial(
        open_clip, qk_norm=True, scale_heads=True, scale_attn_inner=True, scale_attn=True, scale_fc=True
    ),
    "open_clip_avg": partial(open_clip, pool_type="avg"),
    "open_clip_avg_last_norm": partial(open_clip, pool_type="avg", final_ln_after_pool=True),
    "open_clip_all": partial(open_clip, pool_type="none"),
    "open_clip_tokens": partial(open_clip, output_tokens=True),
    "open_clip_attention_pool": partial(_narrow, attentional_pool=True),
    "open_clip_coca": partial(_narrow, attentional_pool=True, output_tokens=True, output_dim=32),
    "open_clip_parallel": partial(_narrow, attentional_pool="parallel", output_dim=32, output_tokens=True),
    "open_clip_cascade": partial(_narrow, attentional_pool="cascade", output_dim=32),
}  # fmt: skip


def build(name: str, seed: int = 0) -> nn.Module:
    """A tiny model with random weights in which mistakes show."""
    torch.manual_seed(seed)
    return rough(TOWERS[name]())


@torch.no_grad()
def rough(model: nn.Module) -> nn.Module:
    """`shaken`, for models whose norms have other names."""
    shaken(model)
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(std=0.3)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model


def images(batch: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(batch, *SIZE, generator=torch.Generator().manual_seed(seed))


def pooled(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    """What a model answers, without the tokens that open_clip's may hand out besides."""
    return out if isinstance(out, Tensor) else out[0]


def serves(method: str, name: str) -> bool:
    """Whether a method accepts a model."""
    return not (method in NEEDS_CONVOLUTION and name == "torchvision_stem")


# ---- the same weights in timm's model


def timm_twin(model: nn.Module) -> nn.Module:
    """timm's `VisionTransformer` with the weights of a torchvision model, or of an open_clip tower that pools by its
    class token or by the mean."""
    return (_of_torchvision if isinstance(model, VisionTransformer) else _of_open_clip)(model).eval()


def _of_torchvision(model: nn.Module) -> nn.Module:
    twin, weights = VIT(), {}
    for key, value in model.state_dict().items():
        key = key.replace("class_token", "cls_token").replace("conv_proj.", "patch_embed.proj.")
        key = key.replace("encoder.pos_embedding", "pos_embed").replace("encoder.ln.", "norm.")
        key = key.replace("encoder.layers.encoder_layer_", "blocks.").replace("heads.head.", "head.")
        key = key.replace("self_attention.in_proj_", "attn.qkv.").replace("self_attention.out_proj.", "attn.proj.")
        key = key.replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.").replace(".ln_", ".norm")
        weights[key] = value
    twin.load_state_dict(weights)
    return twin


def _of_open_clip(model: nn.Module) -> nn.Module:
    pool = "avg" if model.pool_type == "avg" else "token"
    after = model.final_ln_after_pool
    norm = partial(nn.LayerNorm, eps=1e-5)
    twin = VIT(pre_norm=True, global_pool=pool, num_classes=24, norm_layer=norm, fc_norm=after)
    weights = {"head.weight": model.proj.T, "head.bias": torch.zeros(24)}
    for key, value in model.state_dict().items():
        key = key.replace("conv1.", "patch_embed.proj.").replace("ln_pre.", "norm_pre.")
        key = key.replace("ln_post.", "fc_norm." if after else "norm.").replace("transformer.resblocks.", "blocks.")
        key = key.replace("attn.in_proj_", "attn.qkv.").replace("attn.out_proj.", "attn.proj.")
        key = key.replace("mlp.c_fc.", "mlp.fc1.").replace("mlp.c_proj.", "mlp.fc2.").replace(".ln_", ".norm")
        if key == "class_embedding":
            key, value = "cls_token", value.view(1, 1, -1)
        elif key == "positional_embedding":
            key, value = "pos_embed", value[None]
        if key != "proj":
            weights[key] = value
    twin.load_state_dict(weights)
    return twin


# ---- the same weights in transformers' model


def clip_twin(model: nn.Module) -> nn.Module:
    """transformers' `CLIPVisionModelWithProjection` with the weights of a plain open_clip tower."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=4, num_attention_heads=2)
    config = transformers.CLIPVisionConfig(**sizes, intermediate_size=64, projection_dim=24, hidden_act="gelu")
    twin, weights = transformers.CLIPVisionModelWithProjection(config).eval(), {}
    own, inner = model.state_dict(), "transformer.resblocks"
    names = {
        "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
        "attn.out_proj": "self_attn.out_proj",
    }  # fmt: skip
    for kind in ("weight", "bias"):
        for index in range(4):
            layer = f"encoder.layers.{index}"
            for ours, theirs in names.items():
                weights[f"{layer}.{theirs}.{kind}"] = own[f"{inner}.{index}.{ours}.{kind}"]
            for part, value in zip("qkv", own[f"{inner}.{index}.attn.in_proj_{kind}"].chunk(3)):
                weights[f"{layer}.self_attn.{part}_proj.{kind}"] = value
        weights[f"pre_layrnorm.{kind}"] = own[f"ln_pre.{kind}"]  # spelled so
        weights[f"post_layernorm.{kind}"] = own[f"ln_post.{kind}"]
    weights["embeddings.class_embedding"] = own["class_embedding"]
    weights["embeddings.patch_embedding.weight"] = own["conv1.weight"]
    weights["embeddings.position_embedding.weight"] = own["positional_embedding"]
    twin.vision_model.load_state_dict(weights)
    twin.visual_projection.weight.data = own["proj"].T.clone()
    return twin
