"""A reducing block: the flow between attention and MLP, and everything about maps, written once for all families."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core.method import BlockShape, Step
from ..core.signals import Signals
from ..core.tokens import Tokens
from ..maps import TokenMap
from ..ops.attention import Heads
from ..ops.layer_macs import linear_macs
from .attending import Attending, join_heads
from .flow import Flow
from .hooked import Aside, HookedBlock
from .masks import four_dims, logit_bias, refuse_uneven, visible_tokens
from .merging import Merging
from .plan import OUTSIDE, BlockMacs, BlockPlan
from .refusals import refuse_symbols
from .swapping import hooked

_SLICE = 1024  # tokens


class ReducingBlock(HookedBlock):
    """Mixin that lets an attention block take and return `Tokens`.

    A family's subclass says how its halves are spelled: `attention_input`, `attention_layers`, `attention_branch`,
    `mlp_input`, `mlp_branch` and `shape`, and `macs` where attention is not plain. The residual stream, the flow
    between the halves, and everything about maps, is here and in `Attending` once.
    """

    tokenzoo: BlockPlan
    training: bool
    mlp_follows: bool = True  # False where the MLP runs beside attention and is part of its branch
    mlp_pointwise: bool = True  # False where the MLP looks at neighbours

    # ---- spelled by the family; z is what a branch reads, x the residual stream

    def attention_input(self, x: Tensor) -> Tensor:
        """What attention reads: the norm in front of it (the residual stream itself where there is none)."""
        return x

    def attention_layers(self) -> tuple[Any, ...]:
        """The `AttentionLayer`s that stand side by side; the block itself where attention is part of it."""
        return (self.attn,)

    def layer_input(self, index: int, z: Tensor) -> Tensor:
        """What one attention layer reads of z, where each has a norm of its own."""
        return z

    def call_layer(self, layer: Any, z: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        """Calls one of these with the arguments that the unpatched block gives it, and `attend`; its output alone."""
        return layer(z, attend=attend)

    def rotations(self, tokens: Tokens, rope: Any) -> Tensor | None:
        """Rotations of the tokens as they are now, None without rotary positions."""
        return None

    def position_bias(self, rope: Any) -> Tensor | None:
        """What attention adds to its logits by the places of query and key [1, H, N0, N0], for the original sequence.

        Rows and columns of the tokens that are left are gathered: behind a reduction a block holds [B, H, N, N], where
        the unpatched one has [1, H, N0, N0]; no other N x N is stored. The model says `reads_positions`.
        """
        return None

    def attention_branch(self, outs: list[Tensor]) -> Tensor:
        """What attention adds to the residual stream, of the outputs of its layers [B, N, C]."""
        return outs[0]

    def mlp_input(self, x: Tensor) -> Tensor:
        """What the MLP reads."""
        return x

    def mlp_branch(self, z: Tensor) -> Tensor:
        """What the MLP adds to the residual stream."""
        return self.mlp(z)

    def shape(self) -> BlockShape:
        """Sizes for cost formulas."""
        raise NotImplementedError

    def macs(self) -> BlockMacs:
        """Multiply-adds by what they scale with; those of plain attention and of the layers in `mlp` by default."""
        shape = self.shape()
        width, dim = shape.num_heads * shape.head_dim, shape.dim
        return BlockMacs(2 * width * dim, width * dim, 2 * width, width * dim, linear_macs(self.mlp))

    @property
    def fused(self) -> bool | None:
        """Whether attention runs on the fused kernel."""
        return all(getattr(layer, "fused_attn", True) for layer in self.attention_layers())

    # ---- what it costs, for one image

    def cost(self, flow: Flow) -> int:
        """Multiply-adds of the block itself."""
        macs = self.macs()
        total = macs.qk * flow.projected + macs.v * flow.values + macs.pair * flow.pairs
        return total + macs.out * flow.attended + macs.mlp * flow.mlp

    def overhead(self, flow: Flow) -> int:
        """Multiply-adds of what reduction asks of the block besides, without those of the methods."""
        return self.macs().qk * flow.looked if flow.looked else 0

    # ---- the projections of all attention layers together

    def heads(self, tokens: Tokens, rope: Any) -> Heads:
        """Queries, keys and values of tokens whose values are attention inputs z."""
        return self._joined(tokens, rope, True)

    def query_keys(self, tokens: Tokens, rope: Any) -> Heads:
        """Queries and keys only; `v` is None."""
        return self._joined(tokens, rope, False)

    def values(self, z: Tensor) -> Tensor:
        """Values of rows z [B, N, C] -> [B, H, N, Dv]."""
        layers = enumerate(self.attention_layers())
        return torch.cat([layer.project_values(self.layer_input(index, z)) for index, layer in layers], dim=1)

    def _joined(self, tokens: Tokens, rope: Any, with_values: bool) -> Heads:
        rows, layers = self.rotations(tokens, rope), enumerate(self.attention_layers())
        return join_heads([layer.project(self.layer_input(i, tokens.x), rows, with_values) for i, layer in layers])

    # ---- the flow

    def run(self, tokens: Tokens, rope: Any = None, mask: Tensor | None = None) -> Tokens:
        """One block on tokens.

        Args:
            tokens: what the block before left.
            rope: the family's rotary table or None.
            mask: the user's attention mask in original positions, [B or 1, 1 or H, N0 or 1, N0], or None.
        """
        plan = self.tokenzoo
        for step in plan.steps:
            if step.method.remembers and tokens.remembered(step.scorer) is None:
                tokens = tokens.remembering(step.method.remember(tokens, step), step.scorer)
        tokens, signals, merging = self._attend(tokens, rope, mask)
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
        if merge is not None:
            tokens.tell()
        return tokens._replace(x=tokens.x + (y if merge is None else merge.back(y)))

    def _mlp(self, z: Tensor) -> Tensor:
        """The MLP, at inference in slices of long sequences: else its hidden layer is the largest thing in memory.

        Hooks see all tokens at once.
        """
        # in a traced graph sizes are operations: none may depend on whether gradients were on
        whole = torch.compiler.is_compiling() or torch.jit.is_tracing() or self.training or torch.is_grad_enabled()
        if whole or not self.mlp_pointwise or z.shape[1] <= 2 * _SLICE:
            return self.mlp_branch(z)
        if any(hooked(module) for module in self.modules() if module is not self):
            return self.mlp_branch(z)
        return torch.cat([self.mlp_branch(part) for part in z.split(_SLICE, dim=1)], dim=1)

    def _attend(self, tokens: Tokens, rope: Any, mask: Tensor | None) -> tuple[Tokens, Signals, Merging]:
        """The attention half, with the steps in front of it and inside of it."""
        outs, decided = Attending(self, tokens, rope, mask).result()
        y = self.attention_branch(outs)
        if decided.merge is not None:  # every token reads the output of the one it merged into
            y = decided.merge.back(y)
            decided.tokens.tell()
        for token_map in decided.maps:
            y = token_map.apply(y)
        tokens = decided.tokens
        return tokens._replace(x=tokens.x + y), decided.signals, decided.merging

    def _scored(self, tokens: Tokens, signals: Signals, merge: TokenMap | None = None) -> Tokens:
        """The tokens with the scores that a method carries from block to block, brought up to date."""
        for step in self.tokenzoo.steps:
            if step.method.scores_tokens:
                scores = step.method.carry(tokens.seen_by(step.scorer), signals, merge, step)
                tokens = tokens.with_scores(scores, step.scorer)
        return tokens

    def _signals_of(
        self,
        step: Step,
        tokens: Tokens,
        rope: Any,
        mask: Tensor | None,
        project: Callable[[], Heads] | None = None,
    ) -> Signals:
        """Signals in front of attention: queries and keys are projected only if the method looks."""

        def query_keys() -> Heads:
            return self.query_keys(tokens._replace(x=self.attention_input(tokens.x)), rope)

        heads = query_keys if project is None else project
        bias = partial(self._bias, tokens, mask, rope)
        return self._with_module(Signals(heads, bias, tokens, self.training), step)

    def _act(
        self, step: Step, tokens: Tokens, signals: Signals, maps: list[TokenMap] | None = None
    ) -> tuple[Tokens, Signals]:
        token_map = step.decide(tokens, signals)
        if token_map is None:
            return tokens, signals
        if token_map.notes:
            return tokens.reduce(token_map), signals
        if maps is not None:
            maps.append(token_map)
        return tokens.reduce(token_map, step.block, step.method.name), signals.after(token_map)

    def _with_module(self, signals: Signals, step: Step) -> Signals:
        return signals.with_module(getattr(self, step.key, None) if step.key else None)

    def _bias(self, tokens: Tokens, mask: Tensor | None, rope: Any) -> Tensor | None:
        return logit_bias(tokens, self.tokenzoo.proportional, mask, self.position_bias(rope))

    def forward(
        self,
        x: Any,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        rope: Any = None,
        aside: Aside | None = None,
    ) -> Any:
        """Tokens to tokens; the arguments behind the first are timm's."""
        return self.call(x, rope, attn_mask, is_causal, aside)

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
            return aside.left(self.call(aside.given(x, self.tokenzoo.name), rope, attn_mask, is_causal))
        if not isinstance(x, Tokens):
            layout = self.tokenzoo.layout
            layout.check_length(x.shape[1], self.tokenzoo.name)
            layout = layout._replace(standalone=True, track_positions=layout.track_positions or attn_mask is not None)
            x = Tokens(x, layout, trace=() if layout.keep_values else None)
            refuse_alone(self.tokenzoo)
        if attn_mask is not None and attn_mask.dim() < 4:
            attn_mask = four_dims(attn_mask, attn_mask.shape[-1])
        if attn_mask is not None and x.layout.standalone:
            x = self._seen_alone(x, attn_mask)
        tokens = self.run(x, rope, attn_mask)
        if tokens.layout.standalone and self.tokenzoo.index == self.tokenzoo.depth - 1:
            return tokens.x
        return tokens

    def _seen_alone(self, tokens: Tokens, mask: Tensor) -> Tokens:
        """Reads a mask where no model has done so for all blocks: its blocks are called by hand."""
        prefix, at = tokens.layout.num_prefix, tokens.positions
        if at is None and tokens.length != mask.shape[-1]:
            raise ValueError(
                f"block {self.tokenzoo.index}: attn_mask is for {mask.shape[-1]} tokens, but {tokens.length} are left "
                "and nobody kept their places; give all blocks the same mask, or call the model with it"
            )
        visible = visible_tokens(mask, tokens.x.shape[0], prefix)
        refuse_uneven(mask, visible, prefix, self.tokenzoo.steps, self)
        if tokens.visible is not None:
            return tokens
        return tokens._replace(visible=visible if at is None else (at < 0) | visible.gather(1, at.clamp(min=0)))


def refuse_alone(plan: BlockPlan) -> None:
    """Blocks called without their model cannot do what only the model can."""
    for step in plan.outside:
        if step.method.place in OUTSIDE:
            raise step.error(
                "acts outside of the blocks, which were called without their model; call the model, or "
                "model.forward_tokens(images)"
            )


def refuse_causal(model: Any, is_causal: bool) -> None:
    if is_causal:
        raise ValueError(
            f"{type(model).__name__}: is_causal=True needs tokens in their original order, which reduction does not "
            "keep; unpatch the model or pass an attn_mask"
        )
