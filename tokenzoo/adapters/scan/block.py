"""A reducing block that scans its tokens: the flow around the mixer and everything about maps, once for all."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...core.method import BlockShape, Step
from ...core.mixer_signals import MixerSignals
from ...core.mixins import Scanning
from ...core.tokens import Layout, Tokens
from ...maps import ChainMap, KeepMap, TokenMap
from ...models._scan_signals import ScanSignals
from ...ops.rows import stable_order
from ...ops.scan_order import Rows, natural_rows
from ..block import BlockPlan
from ..flow import Flow
from ..hooked import Aside, HookedBlock

PLACES = ("before", "ahead", "between", "after")  # "between" is behind the mixer too, the block's only half


class ScanContext(NamedTuple):
    """What a scanning block needs besides tokens.

    Attributes:
        drop_path: stochastic depth of this block's mixer.
        gap_rule: how pruned positions let the state decay, see `layers.scan.gaps.stretch`; None where they do not.
    """

    drop_path: nn.Module
    gap_rule: str | None


class ScanBlock(HookedBlock):
    """Mixin that lets a scanning block take and return `Tokens`.

    A family's subclass says how its parts are spelled: `mixer_input`, `mix`, `finish`, `shape` and `macs`.
    """

    tokenzoo: BlockPlan
    training: bool

    def mixer_input(self, x: Tensor) -> Tensor:
        """What the mixer reads of the residual stream."""
        raise NotImplementedError

    def mix(self, z: Tensor, tokens: Tokens, context: ScanContext, scan: ScanSignals | None) -> Tensor:
        """Output of the mixer for z [B, N, C], both with prefix tokens in front; fills `scan` if given."""
        raise NotImplementedError

    def to_tokens(self, values: Tensor, tokens: Tokens) -> Tensor:
        """Values of the mixer [B, D, L] in the order of tokens [B, N, D]."""
        raise NotImplementedError

    def finish(self, x: Tensor, tokens: Tokens) -> Tensor:
        """What follows the residual addition."""
        return x

    def shape(self) -> BlockShape:
        """Sizes for cost formulas; the scan has no heads."""
        raise NotImplementedError

    def macs(self, tokens: int, layout: Layout, directions: int | None = None) -> int:
        """Multiply-adds for a number of tokens, with all directions of the scan counted (None) or one."""
        raise NotImplementedError

    fused = None  # there is no attention

    def cost(self, flow: Flow, directions: int | None = None) -> int:
        """Multiply-adds of the block for one image."""
        return self.macs(flow.values, flow.layout, directions)

    def overhead(self, flow: Flow) -> int:
        """Reduction asks nothing of the block besides."""
        return 0

    def run(self, tokens: Tokens, context: ScanContext) -> Tokens:
        """One block on tokens."""
        plan = self.tokenzoo
        for step in plan.at("before"):
            tokens, _, _ = self._act(step, tokens, MixerSignals(self.training))
        z = self.mixer_input(tokens.x)
        signals = MixerSignals(self.training, z)
        for step in plan.at("ahead"):
            tokens, signals, token_map = self._act(step, tokens, signals)
            z = z if token_map is None else token_map.apply(z)
        behind = (*plan.at("between"), *plan.at("after"))
        scan = ScanSignals() if any(step.method.keeps_scan_values for step in behind) else None
        h = self.mix(z, tokens, context, scan)
        mixed = tokens
        tokens = tokens._replace(x=self.finish(tokens.x + context.drop_path(h), tokens))
        signals = MixerSignals(self.training, z, h, scan, partial(self.to_tokens, tokens=mixed))
        for step in behind:
            tokens, signals, _ = self._act(step, tokens, signals)
        return tokens

    def _act(self, step: Step, tokens: Tokens, signals: MixerSignals) -> tuple[Tokens, MixerSignals, TokenMap | None]:
        signals = signals.with_module(getattr(self, step.key, None) if step.key else None)
        token_map = step.decide(tokens, signals)
        if token_map is None:
            return tokens, signals, None
        if token_map.notes:
            return tokens.reduce(token_map), signals, None
        if not step.method.keeps_order:
            token_map = in_order(token_map, tokens)
        rows = step.method.scan_rows(tokens, token_map, step) if isinstance(step.method, Scanning) else None
        tokens = tokens.reduce(token_map, step.block, step.method.name)
        if rows is None:
            layout = tokens.layout
            patches = tokens.positions[:, layout.num_prefix :] - layout.num_prefix
            rows = natural_rows(patches, layout.scan_rows, layout.num_patches)
        return tokens._replace(rows=rows), signals.after(token_map), token_map

    def forward(
        self,
        x: Tokens,
        rope: ScanContext | None = None,
        attn_mask: Tensor | None = None,
        aside: Aside | None = None,
    ) -> Any:
        """Tokens to tokens.

        Args:
            x: tokens.
            rope: what the block needs besides.
            attn_mask: refused, there is no attention.
            aside: what goes past the hooks of the block, where it has some; then values come in and go out.
        """
        x = x if aside is None else aside.given(x, self.tokenzoo.name)
        if not isinstance(x, Tokens):
            raise TypeError(
                f"{type(self).__name__} reduces tokens and was called without its model; call the model, or unpatch it"
            )
        if attn_mask is not None:
            raise ValueError(f"{type(self).__name__} has no attention that an attn_mask could act on; leave it out")
        tokens = self.run(x, rope)
        return tokens if aside is None else aside.left(tokens)


def in_order(token_map: TokenMap, tokens: Tokens) -> TokenMap:
    """The map with its patches put into the order of the scan, by the places of the tokens that head them."""
    prefix = tokens.layout.num_prefix
    places = tokens.original_positions().gather(1, token_map.heads.clamp(min=0))
    order = stable_order(places[:, prefix:]) + prefix
    front = torch.arange(prefix, device=order.device).expand(order.shape[0], -1)  # len() would fix an exported batch
    return ChainMap(token_map, KeepMap(torch.cat([front, order], dim=1), token_map.n_out))


def rows_of(tokens: Tokens) -> Rows:
    """Where the prefix tokens are in the scanned sequence."""
    return tokens.layout.scan_rows if tokens.rows is None else tokens.rows
