"""SViT: a four-stage backbone whose first two stages attend among super tokens, the last two among all tokens.

Parameters are named as in the released weights. Maps lie channels last in memory from the stem on.

Source: Huang, Zhou, Cao, He, Tan, "Vision Transformer with Super Token Sampling", CVPR 2023 (stvit_small, stvit_base
and stvit_large in the authors' code). Stochastic depth there: 0.1, 0.4 and 0.6 for training at 224.
"""

# no postponed annotations here: torch.fx writes that of `forward` into its code, and TorchScript reads it there
from typing import Any

import torch
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ...layers.pointwise import PointwiseConv
from .._config import config
from .._place import made_on
from .._pooled import PooledClassifier
from .blocks import Stem, SuperTokenBlock, SuperTokenStage, init_weights


class SViT(PooledClassifier):
    """Super token backbone.

    Args:
        in_chans: channels of the image.
        num_classes: classes; 0 has no classifier.
        global_pool: pooling of the last map; "" only without classes.
        embed_dim: channels of the four stages.
        depths: blocks per stage.
        num_heads: heads per stage.
        stoken_size: side of a cell in tokens, a stage.
        n_iter: rounds of the association, a stage.
        layerscale: which stages have layer scales.
        init_values: where layer scales start.
        projection: channels before pooling.
        mlp_ratio: hidden channels of the MLPs over their inputs'.
        qkv_bias: bias of the attentions' first projections.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout in the MLPs.
        drop_path_rate: stochastic depth of the last block.
        mask_borders: see `tokenzoo.layers.SuperTokenAttention`.
        img_size: image size in pixels that costs are given for, one number or (high, wide); every size runs.
        device: where parameters are made; None for torch's default.
        dtype: number format of the parameters; None for torch's default.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: tuple[int, ...] = (64, 128, 320, 512),
        depths: tuple[int, ...] = (3, 5, 9, 3),
        num_heads: tuple[int, ...] = (1, 2, 5, 8),
        stoken_size: tuple[int, ...] = (8, 4, 1, 1),
        n_iter: tuple[int, ...] = (1, 1, 1, 1),
        layerscale: tuple[bool, ...] = (False, False, False, False),
        init_values: float = 1e-6,
        projection: int = 1024,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        mask_borders: bool = False,
        img_size: int | tuple[int, int] = 224,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = projection
        self.embed_dim = embed_dim[-1]
        with made_on(device):
            self.patch_embed = Stem(in_chans, embed_dim[0], img_size)
            total = sum(depths)
            rates = [drop_path_rate * i / max(1, total - 1) for i in range(total)]
            outputs = (*embed_dim[1:], None)
            self.layers = nn.Sequential()
            for stage, depth in enumerate(depths):
                first = sum(depths[:stage])
                self.layers.append(
                    SuperTokenStage(
                        embed_dim[stage],
                        outputs[stage],
                        rates[first : first + depth],
                        num_heads=num_heads[stage],
                        stoken_size=stoken_size[stage],
                        n_iter=n_iter[stage],
                        mlp_ratio=mlp_ratio,
                        qkv_bias=qkv_bias,
                        drop=proj_drop_rate,
                        init_values=init_values if layerscale[stage] else None,
                        mask_borders=mask_borders,
                    )
                )
            self.feature_info = [
                {"module": f"layers.{i}", "num_chs": dim, "reduction": 4 * 2**i} for i, dim in enumerate(embed_dim)
            ]
            self.proj = PointwiseConv(embed_dim[-1], projection)
            self.norm = nn.BatchNorm2d(projection)
            self.act = nn.SiLU()
            self.head_drop = nn.Dropout(drop_rate)
            self._set_classifier(num_classes, global_pool)
            self.apply(init_weights)
        self.to(dtype=dtype)

    __jit_unused_properties__ = ["blocks"]

    @property
    def blocks(self) -> tuple[SuperTokenBlock, ...]:
        """The blocks with plain attention, which methods of token reduction act in, through the stages in order."""
        return tuple(block for stage in self.layers if stage.is_plain for block in stage.blocks)

    # ---- timm's conventions

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Gives costs for images of another size (pixels, one number or high, wide) from now on; every size runs."""
        self.patch_embed.img_size = to_2tuple(img_size)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter groups for layer-wise learning rates: one group per stage (coarse), or per block."""
        if coarse:
            return {"stem": r"^patch_embed", "blocks": r"^layers\.(\d+)"}
        blocks = [(r"^layers\.(\d+)\.blocks\.(\d+)", None), (r"^layers\.(\d+)\.downsample", (0,))]
        return {"stem": r"^patch_embed", "blocks": [*blocks, (r"^proj|^norm", (99999,))]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass; in training, BatchNorm then sees every batch twice."""
        for stage in self.layers:
            stage.grad_checkpointing = enable

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps that leave the blocks of chosen stages, before they are halved.

        Args:
            x: images [B, C, H, W].
            indices: stages; a number takes the last ones, None all.
            norm: refused: the only norm at the end belongs to the projection.
            stop_early: do not run stages behind the last chosen one.
            output_fmt: "NCHW".
            intermediates_only: return the maps alone.

        Returns:
            The maps, or (features of `forward_features`, maps).

        Raises:
            ValueError: another format, or `norm`.
        """
        if output_fmt != "NCHW" or norm:
            raise ValueError("SViT: intermediates are maps in NCHW without a norm; leave output_fmt and norm alone")
        wanted, last = feature_take_indices(len(self.layers), indices)
        maps = []
        x = self.patch_embed(_channels_last(x))
        stop = last + 1 if stop_early else len(self.layers)
        for index in range(stop):
            stage = self.layers[index]
            x = stage.run_blocks(x)
            if index in wanted:
                maps.append(x)
            x = stage.downsample(x)
        if intermediates_only:
            return maps
        return self._project(x) if stop == len(self.layers) else x, maps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the stages behind the last chosen one, and what follows them.

        Args:
            indices: stages that stay readable.
            prune_norm: drop projection and norm, which fit the last stage and go with it in any case.
            prune_head: drop pooling and classifier, which go with the last stage in any case.

        Returns:
            The chosen stages.
        """
        wanted, last = feature_take_indices(len(self.layers), indices)
        cut = last + 1 < len(self.layers)
        self.layers = self.layers[: last + 1]
        self.layers[-1].downsample = nn.Identity()
        if cut or prune_norm:
            self.proj, self.norm, self.act = nn.Identity(), nn.Identity(), nn.Identity()
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if cut or prune_head:
            self.reset_classifier(0, "")
        return wanted

    # ---- forward

    def _project(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.proj(x)))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> projected map [B, `num_features`, H / 32, W / 32]."""
        return self._project(self.layers(self.patch_embed(_channels_last(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


default_cfgs = generate_default_cfgs({
    name: config(first_conv="patch_embed.proj.0", pool_size=(7, 7))
    for name in ("svit_small", "svit_base", "svit_large")
})  # fmt: skip


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> SViT:
    feature_cfg = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}
    return build_model_with_cfg(SViT, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


@register_model
def svit_small(pretrained: bool = False, **kwargs: Any) -> SViT:
    """SViT-S: 25.5 M parameters, 4.4 GMACs at 224."""
    return _create("svit_small", pretrained, kwargs)


@register_model
def svit_base(pretrained: bool = False, **kwargs: Any) -> SViT:
    """SViT-B: 51.7 M parameters, 9.9 GMACs at 224."""
    args = {
        "embed_dim": (96, 192, 384, 512), "depths": (4, 6, 14, 6), "num_heads": (2, 3, 6, 8),
        "layerscale": (False, False, True, True),
    }  # fmt: skip
    return _create("svit_base", pretrained, {**args, **kwargs})


@register_model
def svit_large(pretrained: bool = False, **kwargs: Any) -> SViT:
    """SViT-L: 95.0 M parameters, 15.6 GMACs at 224."""
    args = {
        "embed_dim": (96, 192, 448, 640), "depths": (4, 7, 19, 8), "num_heads": (2, 3, 7, 10),
        "layerscale": (False, False, True, True),
    }  # fmt: skip
    return _create("svit_large", pretrained, {**args, **kwargs})
