"""open_clip's transformer.py: the image towers of CLIP, CoCa, MetaCLIP, DFN, ... that are its own `VisionTransformer`.

Read from open_clip 2.27 to 3.3. Differences from upstream: the model's subclass runs the parts of `transformer` one by
one; attention runs through `scaled_dot_product_attention` in every mode, and its output projection is called; attention
pooling sees sizes and padding. With `output_tokens` the tokens handed out are those that are left, all of them with
`dense=True`; those of attention pooling are its queries, as ever. Of whole CLIP models
the image tower is patched, never the text tower.
"""

from __future__ import annotations

from typing import Any

import torch
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from ...core.tokens import Layout, Tokens
from ...ops.attention import key_bias
from ..backbone import Around, Family
from ..features import Reads
from ..halving import half_tokens
from ..model import ReducingModel
from ..registry import register_family
from .blocks import ATTENTIONS, BLOCKS, check_block
from .pooling import pool_by_attention, pool_macs


class ReducingOpenClipTransformer(ReducingModel, VisionTransformer):
    """`VisionTransformer` whose blocks reduce tokens."""

    num_prefix_tokens, has_class = 1, True

    @property
    def blocks(self) -> nn.ModuleList:
        return self.transformer.resblocks

    @property
    def patch_embed(self) -> nn.Module:
        return self.conv1

    @property
    def norm_pre(self) -> nn.Module:
        """Of tokens that join the sequence in front of block 0, as of those in it."""
        return self.ln_pre

    @property
    def own_grid(self) -> tuple[int, int]:
        return tuple(self.grid_size)

    @property
    def norm(self) -> nn.Module:
        """What every token goes through in front of pooling."""
        if self.attn_pool is not None:
            return nn.Identity() if self.attn_pool_contrastive is None else self.ln_post
        return nn.Identity() if self.final_ln_after_pool else self.ln_post

    def checkpoints(self, index: int) -> bool:
        return self.transformer.grad_checkpointing

    def embed(self, x: Tensor) -> tuple[Tensor, Any]:
        size, places = tuple(x.shape[-2:]), self.positional_embedding
        x = self.conv1(x).flatten(2).transpose(1, 2)
        if x.shape[1] + 1 != len(places):
            raise ValueError(
                f"{type(self).__name__} has positions for images of {tuple(self.image_size)}, not of {size}; resize "
                "the images, or create the model with force_image_size"
            )
        first = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        return self.ln_pre(torch.cat([first, x], dim=1) + places.to(x.dtype)), None

    def embed_half(self, images: Tensor) -> Tensor:
        return half_tokens(self, images, self.conv1, self.positional_embedding[None, 1:], self.own_grid)

    # ---- the head

    @property
    def pooling(self) -> str:
        return {"tok": "token", "avg": "avg", "none": ""}[self.pool_type]

    @property
    def pools_all(self) -> bool:
        # written out: a property of `super()` is an object without a value in compiled graphs, and true
        return self.tokenzoo_recipe.dense and (self.output_tokens or not self.pooling or any(self.head_reads()))

    def head_reads(self) -> Reads:
        return Reads.of(self.pooling) if self.attn_pool is None else Reads(attends=True)

    def forward_head(self, x: Tensor | Tokens) -> Tensor | tuple[Tensor, Tensor]:
        """Image features, and tokens where the model was made with `output_tokens`."""
        tokens = self.read(x)
        if self.attn_pool is not None:
            pooled, rest = self._attended(tokens)
        else:
            pooled = self.pool_tokens(tokens, self.pooling)
            pooled = self.ln_post(pooled) if self.final_ln_after_pool else pooled
            rest = tokens.x[:, tokens.layout.num_prefix if self.pooling else 0 :]
        pooled = pooled if self.proj is None else pooled @ self.proj
        return (pooled, rest) if self.output_tokens else pooled

    def _attended(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Attention pooling, and what comes after it."""
        bias = key_bias(tokens.size if self.tokenzoo_recipe.proportional else None, tokens.valid)
        bias = bias if tokens.gate is None else tokens.gate.bias(bias)
        queries = pool_by_attention(self.attn_pool, tokens.x, bias)
        if self.attn_pool_contrastive is None:
            return self._global_pool(self.ln_post(queries))
        if self.attn_pool_type == "parallel":
            return pool_by_attention(self.attn_pool_contrastive, tokens.x, bias), queries
        return self.attn_pool_contrastive(queries), queries

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        stop_early: bool = False,
        normalize_intermediates: bool = False,
        intermediates_only: bool = False,
        output_fmt: str = "NCHW",
        output_extra_tokens: bool = False,
    ) -> dict[str, Any]:
        """open_clip's `forward_intermediates`; NCHW maps are lifted to the full grid, NLC lists are not.

        Args:
            x: images [B, C, H, W].
            indices: last n blocks if int, all if None, else the blocks named.
            stop_early: stop after the last block named.
            normalize_intermediates: apply the final norm to the intermediates.
            intermediates_only: leave the image features out.
            output_fmt: "NCHW" or "NLC".
            output_extra_tokens: also return the class token of each intermediate.
        """
        options = dict(norm=normalize_intermediates, stop_early=stop_early, output_fmt=output_fmt, output_dict=True)
        options["intermediates_only"] = intermediates_only
        out = super().forward_intermediates(x, indices, output_extra_tokens, **options)
        if not intermediates_only:
            features = self.forward_head(out["image_features"])
            out["image_features"] = features[0] if self.output_tokens else features
        return out

    def tap(self, x: Tensor, index: int, norm: bool) -> Tensor:
        return self.ln_post(x) if norm else x

    def head_macs(self, n: int, layout: Layout) -> int:
        total, rows = 0, n
        if self.attn_pool is not None:
            total, rows = pool_macs(self.attn_pool, n), len(self.attn_pool.query)
            second = self.attn_pool_contrastive
            if second is not None:
                total += pool_macs(second, rows if self.attn_pool_type == "cascade" else n)
                rows = len(second.query)
        return total + (0 if self.proj is None else self.proj.numel() * (1 if self.pooling else rows))


def check(model: nn.Module) -> None:
    """Refuses settings of a model that reduction cannot serve.

    Raises:
        ValueError: patch dropout is on.
    """
    if not isinstance(model.patch_dropout, nn.Identity):
        raise ValueError(
            f"{type(model).__name__}.patch_dropout drops random patches before block 0 and forgets which; set "
            "model.patch_dropout = torch.nn.Identity() (or create the model with patch_dropout=0) before patching"
        )


def bypassed(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Modules that are never called as a whole, and what to do instead."""
    found = [("transformer", model.transformer, "hook the blocks one by one (model.transformer.resblocks[i])")]
    for name in ("attn_pool", "attn_pool_contrastive"):
        pool = getattr(model, name, None)
        if pool is not None:
            found.append((name, pool, f"hook its parts ({name}.ln_q, {name}.ln_k, {name}.attn)"))
    return found


FAMILY = register_family(
    Family(
        name="open_clip",
        summary="open_clip transformer.py: the image towers of CLIP, CoCa, DFN, MetaCLIP, alone and inside CLIP models",
        models={VisionTransformer: ReducingOpenClipTransformer},
        blocks=BLOCKS,
        attentions=ATTENTIONS,
        around={cls: Around("visual") for cls in (CLIP, CustomTextCLIP, CoCa)},
        tried="open_clip 2.27 to 3.3",
        check=check,
        check_block=check_block,
        bypassed=bypassed,
    )
)
