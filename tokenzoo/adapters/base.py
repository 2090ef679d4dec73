"""What every family shares: the flow through a reducing block and the one loop over the blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..attention import Heads, full_precision, key_bias
from ..maps import TokenMap
from ..methods.base import BlockShape, Step
from ..recipes import Recipe
from ..signals import Signals, attend_through
from ..tokens import Layout, Tokens, lift


class BackboneInfo(NamedTuple):
    """What patching needs to know about a model.

    Attributes:
        depth: number of blocks.
        dim: channels of the residual stream.
        layout: token layout at the model's own image size.
    """

    depth: int
    dim: int
    layout: Layout


class BlockPlan(NamedTuple):
    """What one block does about tokens; the only thing patching adds to it.

    Attributes:
        index: index of the block.
        depth: blocks of the model.
        steps: methods in the order in which they act.
        proportional: attention adds log sizes.
        layout: layout at the model's own image size, used when the block is called with a plain tensor.
    """

    index: int
    depth: int
    steps: tuple[Step, ...]
    proportional: bool
    layout: Layout

    def at(self, place: str) -> tuple[Step, ...]:
        """The steps at one place."""
        return tuple(s for s in self.steps if s.method.place == place)


class BlockMacs(NamedTuple):
    """Multiply-adds of a block by what they scale with.

    Attributes:
        qk: per token that is projected to queries and keys.
        v: per token that is projected to values.
        pair: per (query, key) pair.
        out: per token that leaves attention (output projection, gate).
        mlp: per token of the MLP.
    """

    qk: int
    v: int
    pair: int
    out: int
    mlp: int


class ReducingBlock:
    """Mixin that lets an attention block take and return `Tokens`.

    A family's subclass says how its halves are spelled: `heads`, `query_keys`, `values`, `close_attention`,
    `close_mlp`, `shape` and `macs`. The flow between them, and everything about maps, is here once.
    """

    tokenzoo: BlockPlan
    training: bool

    # ---- spelled by the family

    def heads(self, tokens: Tokens, rope: Any) -> Heads:
        """Queries, keys and values of the tokens (the block's own first norm included)."""
        raise NotImplementedError

    def query_keys(self, tokens: Tokens, rope: Any) -> Heads:
        """Queries and keys only; `v` is None."""
        raise NotImplementedError

    def values(self, x: Tensor) -> Tensor:
        """Values of rows x [B, N, C] -> [B, H, N, Dv]."""
        raise NotImplementedError

    def close_attention(self, x: Tensor, out: Tensor) -> Tensor:
        """Residual stream after attention: x [B, N, C] the rows that remain, out [B, N, H * Dv] their heads."""
        raise NotImplementedError

    def close_mlp(self, x: Tensor) -> Tensor:
        """Residual stream after the MLP."""
        raise NotImplementedError

    def shape(self) -> BlockShape:
        """Sizes for cost formulas."""
        raise NotImplementedError

    def macs(self) -> BlockMacs:
        """Multiply-adds by what they scale with."""
        raise NotImplementedError

    @property
    def fused(self) -> bool:
        """Whether attention runs on the fused kernel."""
        raise NotImplementedError

    # ---- the flow

    def run(self, tokens: Tokens, rope: Any = None, mask: Tensor | None = None) -> Tokens:
        """One block on tokens.

        Args:
            tokens: what the block before left.
            rope: the family's rotary table or None.
            mask: the user's attention mask in original positions, [B or 1, 1 or H, N0 or 1, N0], or None.
        """
        plan = self.tokenzoo
        for step in plan.at("before"):
            signals = Signals(lambda now=tokens: self.query_keys(now, rope), self._bias(tokens, mask), tokens, self.training)
            tokens = self._act(step, tokens, self._with_module(signals, step))[0]

        ahead, kept = plan.at("ahead"), plan.at("queries")
        bias = self._bias(tokens, mask)
        heads = self.query_keys(tokens, rope) if ahead else self.heads(tokens, rope)
        signals = Signals(heads, bias, tokens, self.training)
        ahead_maps: list[TokenMap] = []
        kept_maps: list[TokenMap] = []
        for step in ahead:
            tokens, signals = self._act(step, tokens, self._with_module(signals, step), ahead_maps)
        if ahead:
            heads = heads._replace(v=self.values(tokens.x))
            signals = signals.with_values(heads.v)
        for step in kept:
            tokens, signals = self._act(step, tokens, self._with_module(signals, step), kept_maps)
        out = attend_through(heads, bias, ahead_maps, kept_maps)

        tokens = tokens._replace(x=self.close_attention(tokens.x, out))
        for step in plan.at("between"):
            tokens, signals = self._act(step, tokens, self._with_module(signals, step))
        tokens = tokens._replace(x=self.close_mlp(tokens.x))
        for step in plan.at("after"):
            tokens, signals = self._act(step, tokens, self._with_module(signals, step))
        return tokens

    def _act(
        self, step: Step, tokens: Tokens, signals: Signals, maps: list[TokenMap] | None = None
    ) -> tuple[Tokens, Signals]:
        token_map = step.method.map(tokens, signals, step)
        if token_map is None:
            return tokens, signals
        if maps is not None:
            maps.append(token_map)
        return tokens.reduce(token_map, step.block, step.method.name), signals.after(token_map)

    def _with_module(self, signals: Signals, step: Step) -> Signals:
        return signals.with_module(getattr(self, step.key, None) if step.key else None)

    def _bias(self, tokens: Tokens, mask: Tensor | None) -> Tensor | None:
        size = tokens.size if self.tokenzoo.proportional else None
        bias = key_bias(size, tokens.valid)
        if mask is None:
            return bias
        rows = _gather_mask(mask, tokens)
        return rows if bias is None else rows + bias

    def call(self, x: Tensor | Tokens, rope: Any, attn_mask: Tensor | None, is_causal: bool) -> Tensor | Tokens:
        """What a family's `forward` does: tokens to tokens.

        A plain tensor (the blocks called without their model) is wrapped by the first block and unwrapped by the last.
        """
        _refuse_causal(self, is_causal)
        if not isinstance(x, Tokens):
            positions = self.tokenzoo.layout.track_positions or attn_mask is not None
            x = Tokens(x, self.tokenzoo.layout._replace(standalone=True, track_positions=positions))
        if attn_mask is not None and attn_mask.dim() < 4:
            attn_mask = _four_dims(attn_mask, attn_mask.shape[-1])
        tokens = self.run(x, rope, attn_mask)
        if tokens.layout.standalone and self.tokenzoo.index == self.tokenzoo.depth - 1:
            return tokens.x
        return tokens


def _gather_mask(mask: Tensor, tokens: Tokens) -> Tensor:
    """The user's mask for the tokens that are left, as an additive float mask [B, 1 or H, N or 1, N]."""
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, float("-inf"))
    if tokens.positions is None:
        return mask
    batch = tokens.x.shape[0]
    index = tokens.positions.clamp(min=0)
    mask = mask.expand(batch, *mask.shape[1:])
    columns = index[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1)
    mask = mask.gather(3, columns)
    if mask.shape[2] > 1:
        mask = mask.gather(2, index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    return mask


class ReducingModel:
    """Mixin that owns the loop over the blocks, for features, intermediates and logits alike.

    A family's subclass gives `embed` (image to tokens and a rotary table) and `rope_of` (the table of one block).
    """

    tokenzoo_recipe: Recipe
    blocks: nn.Module
    norm: nn.Module
    grad_checkpointing: bool
    num_prefix_tokens: int

    # ---- spelled by the family

    def embed(self, x: Tensor) -> tuple[Tensor, Any]:
        """Image [B, C, H, W] -> token values before block 0 and the rotary table (None without)."""
        raise NotImplementedError

    def rope_of(self, rope: Any, index: int) -> Any:
        """The rotary table of one block."""
        return rope

    def layout(self, grid: tuple[int, int], rope: Any = None) -> Layout:
        """Facts about the sequence at a patch grid."""
        recipe = self.tokenzoo_recipe
        return Layout(
            self.num_prefix_tokens,
            self.cls_token is not None,
            grid,
            recipe.track_size,
            recipe.track_positions or rope is not None,
        )

    # ---- the loop

    def walk(
        self, x: Tensor, mask: Tensor | None, last: int | None = None, trace: bool = False, dense: bool = False
    ) -> Iterator[Tokens]:
        """Yields the tokens before block 0 and after every block up to `last`.

        Args:
            x: images [B, C, H, W].
            mask: attention mask in original positions, or None.
            last: index of the last block to run, None for all.
            trace: keep the maps.
            dense: also keep the values before each map.
        """
        grid = self.patch_embed.dynamic_feat_size(x.shape[-2:])
        x, rope = self.embed(x)
        layout = self.layout(tuple(grid), rope)
        if mask is not None:
            layout = layout._replace(track_positions=True)
            mask = _four_dims(mask, x.shape[1])
        coords = None
        if rope is not None and self.tokenzoo_recipe.merged_positions == "mean":
            coords = _patch_coords(layout, x)
        tokens = Tokens(x, layout, coords=coords, trace=() if trace or dense else None)
        yield tokens
        blocks = self.blocks if last is None else self.blocks[: last + 1]
        for index, block in enumerate(blocks):
            table = self.rope_of(rope, index)
            if self.grad_checkpointing and torch.is_grad_enabled() and not torch.jit.is_scripting():
                tokens = checkpoint(_call, block, tokens, table, mask, use_reentrant=False)
            else:
                tokens = _call(block, tokens, table, mask)
            yield tokens

    def forward_tokens(
        self, x: Tensor, attn_mask: Tensor | None = None, trace: bool = False, is_causal: bool = False
    ) -> Tokens:
        """All blocks and the final norm.

        Args:
            x: images [B, C, H, W].
            attn_mask: boolean or additive attention mask in original positions.
            trace: keep the maps, so that `tokens.trace` says where every patch went.
            is_causal: refused: reduction does not keep the order of tokens.

        Returns:
            The remaining tokens with their side data; padding rows are zero.
        """
        _refuse_causal(self, is_causal)
        for tokens in self.walk(x, attn_mask, trace=trace):
            pass
        return self._finish(tokens)

    def _finish(self, tokens: Tokens) -> Tokens:
        x = self.norm(tokens.x)
        if tokens.valid is not None:
            x = x * tokens.valid.unsqueeze(-1).to(x.dtype)
        return tokens._replace(x=x)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Remaining tokens after the final norm [B, N', C]; N' is smaller than in the unpatched model."""
        return self.forward_tokens(x, attn_mask, is_causal=is_causal).x

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Class scores of images [B, C, H, W]."""
        return self.forward_head(self.forward_tokens(x, attn_mask, is_causal=is_causal))

    def pool(self, x: Tensor | Tokens, pool_type: str | None = None) -> Tensor:
        """Pools tokens as the model does, with sizes and padding respected.

        Args:
            x: `Tokens` from `forward_tokens`, or features [B, N, C] where pooling needs neither sizes nor padding.
            pool_type: overrides the model's own pooling.

        Raises:
            ValueError: features without side data where pooling needs it.
        """
        kind = self.global_pool if pool_type is None else pool_type
        if isinstance(x, Tokens):
            return self.pool_tokens(x, kind)
        recipe = self.tokenzoo_recipe
        uneven = recipe.mass_weighted_pool or any(m.pads for m in recipe.methods)
        if kind not in ("token", "") and (uneven or (self.attn_pool is not None and recipe.proportional)):
            raise ValueError(
                f"{type(self).__name__}.forward_head: pooling {kind!r} needs the size or validity of every token, which "
                "a plain tensor lacks; call model(images), or model.forward_head(model.forward_tokens(images))"
            )
        return super().pool(x, pool_type)

    def pool_tokens(self, tokens: Tokens, kind: str) -> Tensor:
        """Pooling with side data at hand."""
        raise NotImplementedError

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """timm's `forward_intermediates`; NCHW maps are lifted to the full grid, NLC lists hold the reduced tokens.

        Args:
            x: images [B, C, H, W].
            indices: last n blocks if int, all if None, else the blocks named.
            return_prefix_tokens: also return the prefix tokens of each intermediate.
            norm: apply the final norm to the intermediates.
            stop_early: stop after the last block named.
            output_fmt: "NCHW" (every patch reads the token it went into, dropped ones keep their last value) or "NLC".
            intermediates_only: leave the final features out.
            output_dict: return a dict as timm does.
            attn_mask: see `forward_tokens`.
            is_causal: refused.
        """
        from timm.models._features import feature_take_indices

        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r}; use 'NCHW' or 'NLC'")
        _refuse_causal(self, is_causal)
        take, max_index = feature_take_indices(len(self.blocks), indices)
        dense, prefix = output_fmt == "NCHW", self.num_prefix_tokens
        spatial: list[Tensor] = []
        prefixes: list[Tensor] = []
        for index, tokens in enumerate(self.walk(x, attn_mask, max_index if stop_early else None, dense=dense), -1):
            if index not in take:
                continue
            y = lift(tokens.x, tokens.trace) if dense else tokens.x
            y = self.norm(y) if norm else y
            if not dense and tokens.valid is not None:
                y = y * tokens.valid.unsqueeze(-1).to(y.dtype)
            prefixes.append(y[:, :prefix])
            y = y[:, prefix:]
            if dense:
                y = y.transpose(1, 2).unflatten(2, tokens.layout.grid).contiguous()
            spatial.append(y)
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": spatial}
            if prefix and return_prefix_tokens:
                result["image_intermediates_prefix"] = prefixes
            if not intermediates_only:
                result["image_features"] = self._finish(tokens).x
            return result
        out = list(zip(spatial, prefixes)) if return_prefix_tokens and prefix else spatial
        return out if intermediates_only else (self._finish(tokens).x, out)


def _call(block: nn.Module, tokens: Tokens, rope: Any, mask: Tensor | None) -> Tokens:
    return block(tokens, rope=rope, attn_mask=mask)


def _refuse_causal(model: Any, is_causal: bool) -> None:
    if is_causal:
        raise ValueError(
            f"{type(model).__name__}: is_causal=True needs tokens in their original order, which reduction does not "
            "keep; unpatch the model or pass an attn_mask"
        )


def _four_dims(mask: Tensor, length: int) -> Tensor:
    """A mask [N, N], [B, N, N] or [B, H, N, N] as four dimensions, checked against the sequence."""
    if mask.dim() not in (2, 3, 4) or mask.shape[-1] != length or mask.shape[-2] not in (1, length):
        raise ValueError(
            f"attn_mask has shape {tuple(mask.shape)}; give [N, N], [B, N, N] or [B, H, N, N] with N = {length} tokens"
        )
    if mask.dim() == 3:
        return mask.unsqueeze(1)
    return mask.reshape(1, 1, *mask.shape) if mask.dim() == 2 else mask


def _patch_coords(layout: Layout, x: Tensor) -> Tensor:
    """(row, column) of every token [B, N, 2] float32; prefix tokens get 0."""
    high, wide = layout.grid
    index = torch.arange(high * wide, device=x.device)
    coords = torch.stack([index.div(wide, rounding_mode="floor"), index % wide], dim=1).float()
    coords = torch.cat([coords.new_zeros(layout.num_prefix, 2), coords])
    return coords.expand(x.shape[0], -1, -1)


def pool_plain(tokens: Tokens, kind: str, include_prefix: bool, mass_weighted: bool) -> Tensor:
    """Pooling without parameters: "token", "avg", "avgmax", "max" or "" (none).

    Args:
        tokens: tokens after the final norm.
        kind: the pooling.
        include_prefix: prefix tokens take part.
        mass_weighted: averages weigh tokens by size, so that they equal the mean over patches where values are equal.
    """
    if kind == "":
        return tokens.x
    if kind == "token":
        return tokens.x[:, 0]
    first = 0 if include_prefix else tokens.layout.num_prefix
    x = tokens.x[:, first:]
    valid = None if tokens.valid is None else tokens.valid[:, first:].unsqueeze(-1)
    mean = greatest = None
    if kind in ("avg", "avgmax"):
        mean = _weighted_mean(x, tokens.sizes()[:, first:] if mass_weighted and tokens.size is not None else None, valid)
    if kind in ("max", "avgmax"):
        greatest = (x if valid is None else x.masked_fill(~valid, float("-inf"))).amax(1)
    if kind == "avgmax":
        return 0.5 * (greatest + mean)
    return mean if kind == "avg" else greatest


def _weighted_mean(x: Tensor, size: Tensor | None, valid: Tensor | None) -> Tensor:
    if size is None and valid is None:
        return x.mean(1)
    weight = valid.float() if size is None else size
    if size is not None and valid is not None:
        weight = weight * valid
    with full_precision(x):
        return ((x.float() * weight).sum(1) / weight.sum(1)).to(x.dtype)
