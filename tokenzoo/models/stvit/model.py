"""STViT-R: Swin whose third stage goes through a few semantic tokens and writes them back into the whole map.

Parameters are named as in the released weights, those of the convolutional stem aside, which `rename_released` takes by
their order.

Source: Chang, Wang, Lin, Wang, Zhang, Jin, Shou, "Making Vision Transformers Efficient from A Token Sparsification
View", CVPR 2023 (STViT-R-Swin-S and -B in the authors' code). Stochastic depth there: 0.3 and 0.4.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.models._features import feature_take_indices
from torch import Tensor, nn

from .._place import made_on
from .._pooled import PooledClassifier
from .forms import Whole, Windowed
from .options import SEMANTIC, check_options
from .stage import SemanticStage, SwinStage, init_weights, semantic_blocks, swin_blocks
from .stem import ConvStem
from .swin import PatchMerging

_NORM = partial(nn.LayerNorm, eps=1e-5)


class STViTR(PooledClassifier):
    """Swin with semantic tokens in its third stage.

    Args:
        in_chans: channels of the image.
        num_classes: classes; 0 has no classifier.
        global_pool: pooling of the last map; "" only without classes.
        form: "classification": all semantic tokens see all image tokens, on maps of two windows a side. "dense": they
            see what lies around their window, on maps of any size.
        embed_dim: channels of the first stage; every stage doubles them.
        depths: blocks per stage; the third holds whole units of six.
        num_heads: heads per stage.
        window_size: tokens of a window's side.
        sample_window_size: semantic tokens of a window's side.
        use_global: add a learned prompt to the semantic tokens of the first unit; None for True in the form for
            classification, which alone has it.
        shortcut: add the pooled tokens to what is generated from them; None for what each form was released with: False
            for classification, True for dense.
        reach: sides of what the windows of the dense form read, see `tokenzoo.models.stvit.forms.Windowed`.
        pad_mask: which keys the dense form hides: "released", "exact" or None, see there.
        output_norms: norm the map of every stage that `forward_intermediates(norm=True)` hands out, not the last alone.
        patch_norm: norm the tokens of the stem, as Swin's patch embedding does.
        init_values: where layer scales of the semantic blocks start.
        mlp_ratio: hidden channels of the MLPs over their inputs'.
        qkv_bias: bias of the projections to queries, keys and values.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout of projections and MLPs.
        attn_drop_rate: dropout of attention maps.
        drop_path_rate: stochastic depth of the last block.
        norm_layer: norm of channels.
        img_size: image size in pixels, one number or (high, wide). The dense form runs every size.
        device: where parameters are made; None for torch's default.
        dtype: number format of the parameters; None for torch's default.

    Raises:
        ValueError: an option, or a combination of options, that there is no such model for.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        form: str = "classification",
        embed_dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 18, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        window_size: int = 7,
        sample_window_size: int = 3,
        use_global: bool | None = None,
        shortcut: bool | None = None,
        reach: tuple[int, int, int] = (14, 21, 27),
        pad_mask: str | None = "released",
        output_norms: bool = False,
        patch_norm: bool = False,
        init_values: float = 1e-5,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Any = _NORM,
        img_size: int | tuple[int, int] = 224,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        dense = form == "dense"
        use_global = not dense if use_global is None else use_global
        check_options(form, depths, num_heads, window_size, sample_window_size, use_global, reach, pad_mask)
        self.form = form
        self.in_chans = in_chans
        self.embed_dim = embed_dim
        self.num_features = self.head_hidden_size = embed_dim * 2 ** (len(depths) - 1)
        shape = Windowed(window_size, sample_window_size, tuple(reach), pad_mask) if dense else None
        shape = shape or Whole(window_size, sample_window_size)
        self._shape = shape
        shared = {
            "mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias, "drop": proj_drop_rate, "attn_drop": attn_drop_rate,
            "norm_layer": norm_layer,
        }  # fmt: skip
        total = sum(depths)
        rates = [drop_path_rate * i / max(1, total - 1) for i in range(total)]
        with made_on(device):
            self.patch_embed = ConvStem(in_chans, embed_dim, img_size, norm_layer if patch_norm else None)
            self._check_size(self.patch_embed.grid_size)
            self.layers = nn.Sequential()
            for stage, depth in enumerate(depths):
                dim, own = embed_dim * 2**stage, rates[sum(depths[:stage]) :][:depth]
                options = {"num_heads": num_heads[stage], **shared}
                step = PatchMerging(dim, norm_layer) if stage + 1 < len(depths) else nn.Identity()
                if stage == SEMANTIC:
                    direct = dense if shortcut is None else shortcut
                    blocks = semantic_blocks(dim, own, window_size, direct, init_values, **options)
                    self.layers.append(SemanticStage(blocks, step, shape, dim if use_global else 0))
                else:
                    self.layers.append(SwinStage(swin_blocks(dim, own, window_size, **options), step))
            self.feature_info = [
                {"module": f"layers.{i}", "num_chs": embed_dim * 2**i, "reduction": 4 * 2**i}
                for i in range(len(depths))
            ]
            for stage in range(len(depths) - 1 if output_norms else 0):
                self.add_module(f"norm{stage}", norm_layer(embed_dim * 2**stage))
            self.output_norms = output_norms
            self.norm = norm_layer(self.num_features)
            self.head_drop = nn.Dropout(drop_rate)
            self._set_classifier(num_classes, global_pool)
            self.apply(init_weights)
        self.to(dtype=dtype)

    def _check_size(self, grid: tuple[int, int]) -> None:
        """Refuses a map of the first stage that the third cannot take."""
        high, wide = (-(-side // 2**SEMANTIC) for side in grid)
        self._shape.check((high, wide))

    # ---- timm's conventions

    def __prepare_scriptable__(self) -> nn.Module:
        return self.layers[SEMANTIC].__prepare_scriptable__()  # refuses in a sentence

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Images of another size from now on, in pixels, one number or (high, wide).

        Raises:
            ValueError: a size that the form for classification does not take.
        """
        before = self.patch_embed.img_size
        self.patch_embed.set_input_size(img_size)
        try:
            self._check_size(self.patch_embed.grid_size)
        except ValueError:
            self.patch_embed.set_input_size(before)
            raise

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay."""
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter groups for layer-wise learning rates: one group per stage (coarse), or per block."""
        if coarse:
            return {"stem": r"^patch_embed", "blocks": [(r"^layers\.(\d+)", None), (r"^norm", (99999,))]}
        blocks = [
            (r"^layers\.(\d+)\.semantic_token", (2,)), (r"^layers\.(\d+)\.blocks\.(\d+)", None),
            (r"^layers\.(\d+)\.downsample", (99999,)), (r"^norm", (99999,)),
        ]  # fmt: skip
        return {"stem": r"^patch_embed", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass."""
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
            norm: norm the map of the last stage, and with `output_norms` of every one.
            stop_early: do not run stages behind the last chosen one.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: return the maps alone.

        Returns:
            The maps, or (features of `forward_features`, maps).

        Raises:
            ValueError: another format.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"STViTR: output_fmt={output_fmt!r}; choose 'NCHW' or 'NHWC'")
        wanted, last = feature_take_indices(len(self.layers), indices)
        maps = []
        x = self.patch_embed(x)
        stop = last + 1 if stop_early else len(self.layers)
        for index in range(stop):
            stage = self.layers[index]
            x = stage.run_blocks(x)
            if index in wanted:
                y = self._output_norm(index)(x) if norm else x
                maps.append(y.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else y)
            x = stage.downsample(x)
        if intermediates_only:
            return maps
        return (self.norm(x) if stop == len(self.layers) else x).permute(0, 3, 1, 2), maps

    def _output_norm(self, stage: int) -> nn.Module:
        if stage + 1 == len(self.feature_info):
            return self.norm
        return getattr(self, f"norm{stage}") if self.output_norms else nn.Identity()

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the stages behind the last chosen one, and what follows them.

        Args:
            indices: stages that stay readable.
            prune_norm: drop the norms of outputs; the last one fits the last stage and goes with it in any case.
            prune_head: drop pooling and classifier, which go with the last stage in any case.

        Returns:
            The chosen stages.
        """
        wanted, last = feature_take_indices(len(self.layers), indices)
        cut = last + 1 < len(self.layers)
        self.layers = self.layers[: last + 1]
        self.layers[-1].downsample = nn.Identity()
        for stage in range(len(self.feature_info) - 1 if self.output_norms else 0):
            if prune_norm or stage not in wanted:
                self.add_module(f"norm{stage}", nn.Identity())
        if cut or prune_norm:
            self.norm = nn.Identity()
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if cut or prune_head:
            self.reset_classifier(0, "")
        return wanted

    # ---- forward

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> normed map [B, `num_features`, H / 32, W / 32]."""
        return self.norm(self.layers(self.patch_embed(x))).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
