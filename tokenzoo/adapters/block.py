"""A reducing block: the flow between attention and MLP, and everything about maps, written once for all families."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention import Heads, attend, key_bias
from ..maps import TokenMap
from ..methods.base import BlockShape, Step
from ..signals import Signals, attend_through
from ..tokens import Layout, Tokens
from .hooked import Aside, HookedBlock
from .merging import Merging, lifted_heads
from .refusals import refuse_symbols

_SLICE = 1024  # tokens


class BlockPlan(NamedTuple):
    """What one block does about tokens; the only thing patching adds to it.

    Attributes:
        index: index of the block.
        depth: blocks of the model, or the block behind the last one that sees the same sequence.
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


class ReducingBlock(HookedBlock):
    """Mixin that lets an attention block take and return `Tokens`.

    A family's subclass says how its halves are spelled: `attention_input`, `heads`, `query_keys`, `values`,
    `attention_branch`, `mlp_input`, `mlp_branch`, `shape` and `macs`. The residual stream, the flow between the halves,
    and everything about maps, is here once.
    """

    tokenzoo: BlockPlan
    training: bool
    mlp_follows: bool = True  # False where the MLP runs beside attention and is part of its branch
    mlp_pointwise: bool = True  # False where the MLP looks at neighbours

    # ---- spelled by the family; z is what a branch reads, x the residual stream

    def attention_input(self, x: Tensor) -> Tensor:
        """What attention reads: the norm in front of it (the residual stream itself where there is none)."""
        return x

    def heads(self, tokens: Tokens, rope: Any) -> Heads:
        """Queries, keys and values of tokens whose values are attention inputs z."""
        raise NotImplementedError

    def query_keys(self, tokens: Tokens, rope: Any) -> Heads:
        """Queries and keys only; `v` is None."""
        raise NotImplementedError

    def values(self, z: Tensor) -> Tensor:
        """Values of rows z [B, N, C] -> [B, H, N, Dv]."""
        raise NotImplementedError

    def attention_branch(self, out: Tensor, z: Tensor | None) -> Tensor:
        """What attention adds to the residual stream: out [B, N, H * Dv]; z as `output_reads_input` asks for."""
        raise NotImplementedError

    def mlp_input(self, x: Tensor) -> Tensor:
        """What the MLP reads."""
        return x

    def mlp_branch(self, z: Tensor) -> Tensor:
        """What the MLP adds to the residual stream."""
        raise NotImplementedError

    @property
    def output_reads_input(self) -> bool:
        """Whether `attention_branch` needs z (a gate, an MLP beside attention)."""
        return False

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
            tokens = self._act(step, tokens, self._signals_of(step, tokens, rope, mask))[0]
        merging = Merging(plan.at("around"), tokens, partial(self._signals_of, rope=rope, mask=mask))
        tokens, signals = self._attend(tokens, rope, mask, merging)
        for step in plan.at("between"):
            tokens, signals = self._act(step, tokens, self._with_module(signals, step))
        merging.moved = any(plan.at(place) for place in ("ahead", "queries", "between"))
        after = plan.at("after")
        if not after:
            signals = None  # queries, keys and values need not outlive attention
        if self.mlp_follows:
            tokens = self._transform(tokens, merging)
        for step in after:
            tokens, signals = self._act(step, tokens, self._with_module(signals, step))
        return tokens

    def _transform(self, tokens: Tokens, merging: Merging) -> Tokens:
        """The MLP half."""
        merge, z = merging.enter("mlp", tokens, self.mlp_input)
        y = self._mlp(z)
        return tokens._replace(x=tokens.x + (y if merge is None else merge.lift(y)))

    def _mlp(self, z: Tensor) -> Tensor:
        """The MLP, at inference in slices of long sequences: else its hidden layer is the largest thing in memory."""
        whole = self.training or torch.is_grad_enabled() or not self.mlp_pointwise
        if whole or z.shape[1] <= 2 * _SLICE or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self.mlp_branch(z)
        return torch.cat([self.mlp_branch(part) for part in z.split(_SLICE, dim=1)], dim=1)

    def _attend(self, tokens: Tokens, rope: Any, mask: Tensor | None, merging: Merging) -> tuple[Tokens, Signals]:
        """The attention half, with the steps that act inside it."""
        merge, z = merging.enter("attention", tokens, self.attention_input)
        if merge is not None:
            if mask is not None:
                _refuse_mask(merging.steps)
            return self._attend_merged(merging.recorded(tokens, merge, "attention"), z, merge, rope, mask)
        ahead, kept = self.tokenzoo.at("ahead"), self.tokenzoo.at("queries")
        bias = self._bias(tokens, mask)
        inputs = tokens._replace(x=z)
        heads = self.query_keys(inputs, rope) if ahead else self.heads(inputs, rope)
        signals = Signals(heads, bias, tokens, self.training)
        tokens = self._scored(tokens, signals)
        ahead_maps: list[TokenMap] = []
        kept_maps: list[TokenMap] = []
        for step in ahead:
            tokens, signals = self._act(step, tokens, self._with_module(signals, step), ahead_maps)
        if ahead:
            z = self.attention_input(tokens.x)
            heads = heads._replace(v=self.values(z))
            signals = signals.with_values(heads.v)
        for step in kept:
            tokens, signals = self._act(step, tokens, self._with_module(signals, step), kept_maps)
        out = attend_through(heads, bias, ahead_maps, kept_maps)
        if self.output_reads_input and kept:
            z = self.attention_input(tokens.x)
        y = self.attention_branch(out, z if self.output_reads_input else None)
        return tokens._replace(x=tokens.x + y), signals

    def _attend_merged(
        self, tokens: Tokens, z: Tensor, merge: TokenMap, rope: Any, mask: Tensor | None
    ) -> tuple[Tokens, Signals]:
        """The attention half on merged tokens, its output read back by every token.

        Methods that act inside attention see every token with the keys of the one it merged into; attention has run by
        then, so they act on its output. `z` is what the branch reads behind the map.
        """
        inner = tokens._replace(trace=None).reduce(merge, values=z)
        heads, bias = self.heads(inner, rope), self._bias(inner, mask)
        y = self.attention_branch(attend(heads, bias), z)
        y = merge.lift(y)
        tokens = self._scored(tokens, Signals(heads, bias, inner, self.training), merge)
        signals = Signals(partial(lifted_heads, heads, merge), self._bias(tokens, mask), tokens, self.training)
        maps: list[TokenMap] = []
        for step in (*self.tokenzoo.at("ahead"), *self.tokenzoo.at("queries")):
            tokens, signals = self._act(step, tokens, self._with_module(signals, step), maps)
        for token_map in maps:
            y = token_map.apply(y)
        return tokens._replace(x=tokens.x + y), signals

    def _scored(self, tokens: Tokens, signals: Signals, merge: TokenMap | None = None) -> Tokens:
        """The tokens with the scores that a method carries from block to block, brought up to date."""
        for step in self.tokenzoo.steps:
            if step.method.scores_tokens:
                tokens = tokens._replace(scores=step.method.score(tokens, signals, merge, step))
        return tokens

    def _signals_of(self, step: Step, tokens: Tokens, rope: Any, mask: Tensor | None) -> Signals:
        """Signals in front of attention: queries and keys are projected only if the method looks."""

        def project() -> Heads:
            return self.query_keys(tokens._replace(x=self.attention_input(tokens.x)), rope)

        return self._with_module(Signals(project, self._bias(tokens, mask), tokens, self.training), step)

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

    def call(
        self, x: Tensor | Tokens, rope: Any, attn_mask: Tensor | None, is_causal: bool, aside: Aside | None = None
    ) -> Tensor | Tokens:
        """What a family's `forward` does: tokens to tokens.

        A plain tensor (the blocks called without their model) is wrapped by the first block and unwrapped by the last;
        with `aside` (the block has hooks) values come in and values go out.
        """
        refuse_symbols(self, x)
        refuse_causal(self, is_causal)
        if aside is not None:
            return aside.left(self.call(aside.given(x, self.tokenzoo.index), rope, attn_mask, is_causal))
        if not isinstance(x, Tokens):
            layout = self.tokenzoo.layout
            layout.check_length(x.shape[1], f"blocks.{self.tokenzoo.index}")
            layout = layout._replace(standalone=True, track_positions=layout.track_positions or attn_mask is not None)
            x = Tokens(x, layout, trace=() if layout.keep_values else None)
            _refuse_alone(self)
        if attn_mask is not None and attn_mask.dim() < 4:
            attn_mask = four_dims(attn_mask, attn_mask.shape[-1])
        tokens = self.run(x, rope, attn_mask)
        if tokens.layout.standalone and self.tokenzoo.index == self.tokenzoo.depth - 1:
            return tokens.x
        return tokens


def _refuse_mask(steps: tuple[Step, ...]) -> None:
    """A mask says which tokens see which; it says nothing about tokens that another form of attention makes."""
    for step in steps:
        if step.method.replaces_attention:
            raise step.error("its attention runs among tokens that no attn_mask covers; call the model without a mask")


def _refuse_alone(block: ReducingBlock) -> None:
    """Blocks called without their model cannot do what only the model can."""
    for place in ("embed", "norm"):
        for step in block.tokenzoo.at(place):
            raise step.error(
                "acts outside of the blocks, which were called without their model; call the model, or "
                "model.forward_tokens(images)"
            )


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


def four_dims(mask: Tensor, length: int) -> Tensor:
    """A mask [N, N], [B, N, N] or [B, H, N, N] as four dimensions, checked against the sequence."""
    if mask.dim() not in (2, 3, 4) or mask.shape[-1] != length or mask.shape[-2] not in (1, length):
        raise ValueError(
            f"attn_mask has shape {tuple(mask.shape)}; give [N, N], [B, N, N] or [B, H, N, N] with N = {length} tokens"
        )
    if mask.dim() == 3:
        return mask.unsqueeze(1)
    return mask.reshape(1, 1, *mask.shape) if mask.dim() == 2 else mask


def refuse_causal(model: Any, is_causal: bool) -> None:
    if is_causal:
        raise ValueError(
            f"{type(model).__name__}: is_causal=True needs tokens in their original order, which reduction does not "
            "keep; unpatch the model or pass an attn_mask"
        )
