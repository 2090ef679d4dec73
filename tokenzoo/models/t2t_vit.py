"""T2T-ViT: the tokens-to-token module in front of a narrow, deep ViT.

The model is timm's VisionTransformer with another embedding and fixed positions, so its blocks are timm's own.
Weights are named as in the released ones. What is never trained there (positions, random features) is a buffer here;
published counts of parameters include it.

Source: Yuan et al., "Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet", ICCV 2021.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ._config import config
from ._embed import fit_positions
from .t2t_tokens import TokensToToken

_NORM = partial(nn.LayerNorm, eps=1e-5)


def sinusoid_positions(length: int, dim: int) -> Tensor:
    """Fixed position embedding [1, length, dim] float32: sines on even channels, cosines on odd ones.

    Args:
        length: positions, the class token included.
        dim: channels.
    """
    position = torch.arange(length, dtype=torch.float64, device="cpu").unsqueeze(1)
    channel = torch.arange(dim, device="cpu")
    angle = position / 10000 ** (2 * (channel // 2).double() / dim)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float().unsqueeze(0)


class T2TViT(VisionTransformer):
    """VisionTransformer on tokens from overlapping neighbourhoods.

    Args:
        img_size: image size in pixels, multiples of 16.
        tokens_type: "performer" or "transformer", the layers inside the tokens-to-token module.
        token_dim: channels inside the tokens-to-token module.
        qkv_bias: bias of queries, keys and values in the blocks.
        norm_layer: norm of the blocks, by default with the released models' epsilon of 1e-5.
        vit_options: any other option of timm's VisionTransformer.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        tokens_type: str = "performer",
        token_dim: int = 64,
        qkv_bias: bool = False,
        norm_layer: Any = _NORM,
        **vit_options: Any,
    ):
        super().__init__(
            img_size=img_size,
            qkv_bias=qkv_bias,
            norm_layer=norm_layer,
            embed_layer=partial(TokensToToken, tokens_type=tokens_type, token_dim=token_dim),
            **vit_options,
        )
        self._fix_positions()

    def _fix_positions(self) -> None:
        """Makes a buffer of the positions, which timm makes a parameter: what is never trained has no gradient."""
        positions = self.pos_embed
        if isinstance(positions, nn.Parameter):
            del self.pos_embed
            self.register_buffer("pos_embed", positions.detach())

    def __setattr__(self, name: str, value: Any) -> None:
        # timm's model keeps its embedding as `patch_embed`; released weights call it `tokens_to_token`
        super().__setattr__("tokens_to_token" if name == "patch_embed" else name, value)

    __jit_unused_properties__ = ["patch_embed"]

    def __prepare_scriptable__(self) -> nn.Module:
        """What `torch.jit.script` compiles: the same modules as a VisionTransformer, which needs timm's name."""
        if type(self) is not T2TViT:
            return self
        twin = VisionTransformer.__new__(VisionTransformer)
        twin.__dict__.update(self.__dict__)
        renamed = {"tokens_to_token": "patch_embed"}
        twin.__dict__["_modules"] = {renamed.get(name, name): module for name, module in self._modules.items()}
        return twin

    @property
    def patch_embed(self) -> TokensToToken:
        """The tokens-to-token module, by the name that timm gives to embeddings."""
        return self.tokens_to_token

    def init_weights(self, mode: str = "", **options: Any) -> None:
        """Published start: truncated normal linear layers and class token, zero biases, sinusoid positions."""
        super().init_weights(mode, **options)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)
        if self.pos_embed is not None:
            with torch.no_grad():
                self.pos_embed.copy_(sinusoid_positions(*self.pos_embed.shape[1:]))

    def set_input_size(
        self, img_size: tuple[int, int] | None = None, patch_size: tuple[int, int] | None = None
    ) -> None:
        """Takes images of another size from now on; positions are interpolated and stay fixed.

        Args:
            img_size: new size in pixels.
            patch_size: None, or the present one.
        """
        super().set_input_size(img_size, patch_size)
        self._fix_positions()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, besides norms and biases."""
        return super().no_weight_decay() - {"pos_embed"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter groups for layer-wise learning rates."""
        groups = super().group_matcher(coarse)
        return {**groups, "stem": groups["stem"].replace("patch_embed", "tokens_to_token")}


# name -> channels, depth, heads, MLP ratio, kind
_SIZES: dict[str, tuple[int, int, int, float, str]] = {
    "t2t_vit_7": (256, 7, 4, 2.0, "performer"),
    "t2t_vit_10": (256, 10, 4, 2.0, "performer"),
    "t2t_vit_12": (256, 12, 4, 2.0, "performer"),
    "t2t_vit_14": (384, 14, 6, 3.0, "performer"),
    "t2t_vit_19": (448, 19, 7, 3.0, "performer"),
    "t2t_vit_24": (512, 24, 8, 3.0, "performer"),
    "t2t_vit_t_14": (384, 14, 6, 3.0, "transformer"),
    "t2t_vit_t_19": (448, 19, 7, 3.0, "transformer"),
    "t2t_vit_t_24": (512, 24, 8, 3.0, "transformer"),
}
# what reads the unfolded pixels, as there is no convolution
_FIRST = {"performer": "tokens_to_token.attention1.kqv", "transformer": "tokens_to_token.attention1.attn.qkv"}
default_cfgs = generate_default_cfgs(
    {name: config(fixed_input_size=True, first_conv=_FIRST[sizes[-1]]) for name, sizes in _SIZES.items()}
)


def _fit(state_dict: dict[str, Tensor], model: T2TViT) -> dict[str, Tensor]:
    """Positions for the image size; weights for other channels are refused, as timm could not turn them over."""
    norm = "tokens_to_token.attention1.norm1.weight"
    given, own = state_dict.get(norm), model.state_dict()[norm]
    if given is not None and given.shape != own.shape:
        raise ValueError(
            f"T2TViT: the weights are for images of {len(given) // 49} channels, the model for {len(own) // 49}; its "
            "first layer norms unfolded pixels and cannot be adapted: create the model with the in_chans of the weights"
        )
    return fit_positions(state_dict, model)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> T2TViT:
    dim, depth, heads, ratio, kind = _SIZES[variant]
    sizes = {"embed_dim": dim, "depth": depth, "num_heads": heads, "mlp_ratio": ratio, "tokens_type": kind}
    feature_cfg = {"out_indices": 3, "feature_cls": "getter"}
    return build_model_with_cfg(
        T2TViT, variant, pretrained, feature_cfg=feature_cfg, pretrained_filter_fn=_fit, **{**sizes, **kwargs}
    )


@register_model
def t2t_vit_7(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-7 (performer): 4.3 M parameters, 1.2 GMACs at 224."""
    return _create("t2t_vit_7", pretrained, kwargs)


@register_model
def t2t_vit_10(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-10 (performer): 5.9 M parameters, 1.5 GMACs at 224."""
    return _create("t2t_vit_10", pretrained, kwargs)


@register_model
def t2t_vit_12(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-12 (performer): 6.9 M parameters, 1.8 GMACs at 224."""
    return _create("t2t_vit_12", pretrained, kwargs)


@register_model
def t2t_vit_14(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-14 (performer): 21.5 M parameters, 4.8 GMACs at 224."""
    return _create("t2t_vit_14", pretrained, kwargs)


@register_model
def t2t_vit_19(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-19 (performer): 39.2 M parameters, 8.5 GMACs at 224."""
    return _create("t2t_vit_19", pretrained, kwargs)


@register_model
def t2t_vit_24(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-24 (performer): 64.1 M parameters, 13.7 GMACs at 224."""
    return _create("t2t_vit_24", pretrained, kwargs)


@register_model
def t2t_vit_t_14(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT_t-14 (transformer): 21.5 M parameters, 6.1 GMACs at 224."""
    return _create("t2t_vit_t_14", pretrained, kwargs)


@register_model
def t2t_vit_t_19(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT_t-19 (transformer): 39.2 M parameters, 9.8 GMACs at 224."""
    return _create("t2t_vit_t_19", pretrained, kwargs)


@register_model
def t2t_vit_t_24(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT_t-24 (transformer): 64.0 M parameters, 15.0 GMACs at 224."""
    return _create("t2t_vit_t_24", pretrained, kwargs)
